"""Segmentation models: any backbone under any decoder of segmentation-models-pytorch, or heads of transformers."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from backbones.errors import InputError
from backbones.layers import crop_to, pad_to_multiple

from ..options import nearest, require
from . import heads
from .base import BackboneLike, HoldsBackbone, make_backbone, recorded
from .smp import Levels, named, resize

ARCHITECTURES = (
    "upernet",
    *(f"smp/{name}" for name in smp.MODEL_ARCHITECTURES_MAPPING if name != "dpt"),  # dpt is refused, see below
)
# Pyramid pooling in PAN halves its stride-16 or stride-32 map three times.
_MIN_CELLS = {"smp/pan": 8}
_OURS = {"encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params"}


def build_segmenter(
    architecture: str = "upernet",
    *,
    backbone: BackboneLike,
    num_classes: int,
    aux: bool = False,
    **decoder_options: Any,
) -> HoldsBackbone:
    """Build a model that labels every pixel of images of any size.

    Args:
        architecture: "upernet" (no padding at all), or "smp/NAME" for a decoder of segmentation-models-pytorch,
            which sees the image padded to the multiple it needs; or "hf/upernet", "hf/mask2former" or
            "hf/maskformer" of transformers, whose model is then its `hf`: the last two give classes to masks, and train
            by their `losses`
        backbone: a name, a dict of `build_backbone` options that includes "name", or a module that returns four
            maps of strides 4, 8, 16, 32 and has timm's `feature_info`
        num_classes: number of classes, all of them mapped to a channel of the logits
        aux: add a fully convolutional head on the stride-16 map, to be trained beside the decoder
        decoder_options: options of the smp model's decoder, such as `decoder_channels`, or of transformers'
            configuration, such as `num_queries`

    Returns:
        a module from (B, C, H, W) to logits (B, num_classes, H, W); with `aux`, in training mode, to a pair of them

    Raises:
        InputError: an unknown architecture or option, or a backbone whose maps do not fit
    """
    check_options(architecture, decoder_options)
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}: a segmenter needs at least one class")
    if architecture in heads.SEGMENTERS:
        from . import hf_segmenter

        body = make_backbone(backbone, architecture)
        return hf_segmenter.build(architecture, body, num_classes, aux, decoder_options)
    model_class = find_architecture(architecture)
    known = _defaults(model_class)
    depth = decoder_options.get("encoder_depth", known["encoder_depth"])
    backbone = make_backbone(backbone, architecture, out_indices=tuple(range(depth - 1)))
    if aux and depth < 4:
        raise InputError(f"aux=True needs the stride-16 map, which {architecture} with encoder_depth={depth} lacks")
    if architecture == "upernet":
        decoder_options = {"upsampling": 1, **decoder_options}
    with named(backbone) as encoder_name:
        model = model_class(encoder_name, encoder_weights=None, classes=num_classes, **decoder_options)
    levels = model.encoder.levels
    if architecture == "smp/fpn" and 0 in levels.channels[-4:]:
        raise InputError(
            f"smp/fpn has four levels, and with encoder_depth={depth} the backbone has no map for the finest"
        )
    aux_head = FCNHead(levels.channels[4], num_classes) if aux else None
    segmenter = Segmenter(
        backbone,
        model.decoder,
        model.segmentation_head,
        levels=levels,
        divisor=1 if architecture == "upernet" else 2**depth,
        min_size=_MIN_CELLS.get(architecture, 0) * levels.output_stride,
        aux_head=aux_head,
    )
    own = {"architecture": architecture, "num_classes": num_classes, "aux": aux}
    return recorded(segmenter, "segmentation", **own, **decoder_options)


class Segmenter(HoldsBackbone):
    """A backbone, a decoder of segmentation-models-pytorch and its head; see `build_segmenter`.

    Args:
        backbone: module from (B, C, H, W) to maps of strides 4 to 32, finest first; or from stride 2
        decoder: module from the list [image, stride 2, stride 4, ...] to one map
        head: module from that map to logits
        levels: which maps the decoder sees
        divisor: sides of the image are padded, at the right and bottom, to a multiple of this
        min_size: and to at least this
        aux_head: module from the stride-16 map to logits
    """

    low_precision = True  # see `backbones.for_inference`

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        *,
        levels: Levels,
        divisor: int,
        min_size: int = 0,
        aux_head: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.decoder, self.head, self.aux_head = decoder, head, aux_head
        self.levels, self.divisor, self.min_size = levels, divisor, min_size

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, num_classes, H, W) of images (B, C, H, W); training with an aux head, a pair of them."""
        padded = self._pad(images)
        pyramid = self.levels(padded, list(self.backbone(padded)))
        logits = self._crop(self.head(self.decoder(pyramid)), padded, images)
        if self.aux_head is None or not self.training:
            return logits
        return logits, self._crop(self.aux_head(pyramid[4]), padded, images)

    if TYPE_CHECKING:  # torch says that calling a module gives Any
        __call__ = forward

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        padded = pad_to_multiple(images, self.divisor)
        right, bottom = (max(0, self.min_size - side) for side in (padded.shape[-1], padded.shape[-2]))
        return F.pad(padded, (0, right, 0, bottom)) if right or bottom else padded

    @staticmethod
    def _crop(logits: torch.Tensor, padded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        logits = resize(logits, padded.shape[-2:])
        return logits if padded is images else crop_to(logits, *images.shape[-2:])


def check_options(architecture: str, options: Mapping[str, Any]) -> None:
    """Raise InputError where `build_segmenter` would, as far as that is known without a backbone."""
    if architecture in heads.SEGMENTERS:
        require("a segmenter of transformers", "transformers", "transformers", "scipy")
        from . import hf

        return hf.check_options(architecture, options)
    known = _defaults(find_architecture(architecture))
    for option in options:
        if option not in known:
            raise InputError(f"{architecture} has no option {option!r}; {nearest(option, known)}")


def map_indices(strides: Mapping[int, int], architecture: str = "upernet", **options: Any) -> list[int]:
    """Which of a backbone's maps a segmenter takes, given the stride of each by its index."""
    if architecture in heads.SEGMENTERS:
        return heads.map_indices(strides, architecture)
    default = inspect.signature(find_architecture(architecture)).parameters["encoder_depth"].default
    return [index for index in strides if index < options.get("encoder_depth", default) - 1]


def find_architecture(architecture: str) -> type[nn.Module]:
    """The smp class of an architecture; `InputError` with the nearest name if there is none."""
    if architecture == "smp/dpt":
        raise InputError("smp/dpt reads tokens and a class token from inside a ViT, which feature maps do not carry")
    if architecture not in ARCHITECTURES:
        known = (*ARCHITECTURES, *heads.SEGMENTERS)
        raise InputError(f"unknown architecture {architecture!r}; {nearest(architecture, known)}")
    return smp.MODEL_ARCHITECTURES_MAPPING[architecture.removeprefix("smp/")]


def _defaults(model_class: type[nn.Module]) -> dict[str, Any]:
    """Options of a class of smp that are the decoder's, and what they are unless given."""
    known = {name: parameter.default for name, parameter in inspect.signature(model_class).parameters.items()}
    return {k: v for k, v in known.items() if k not in _OURS and v is not inspect.Parameter.empty}
