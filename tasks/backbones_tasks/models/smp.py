"""Backbones as encoders of segmentation-models-pytorch: import this module, and smp knows `backbones-NAME`.

    import backbones_tasks.smp
    model = smp.Unet(encoder_name="backbones-pvt_v2_b2", encoder_weights="imagenet", classes=21)

NAME is whatever `build_backbone` takes, those of installed plugins and of catalogues (`timm/resnet18`) included. It
works in every smp model but DPT, which takes timm's vision transformers only, because it reads their tokens. FPN
needs its default `encoder_depth=5`, because it has four levels and a backbone no map of stride 2.

smp's registry `smp.encoders.encoders` holds classes whose weights are a `model.safetensors` under their own names.
Backbones have more sources and key layouts, and options, so `smp.encoders.get_encoder` is what is extended here.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

from backbones import backbone_info, build_backbone, list_backbones
from backbones.errors import InputError, WeightsError
from backbones.layers import ceil_div

PREFIX = "backbones-"

_get_encoder = smp.encoders.get_encoder
_get_encoder_names = smp.encoders.get_encoder_names
_get_preprocessing_params = smp.encoders.get_preprocessing_params
_modules: dict[str, nn.Module] = {}


@dataclass(frozen=True)
class Levels:
    """Which maps a decoder of smp takes: the image, then one map per halving of it.

    Args:
        channels: of the image and of each map; 0 for a stride that the backbone has no map of
        depth: number of halvings
        output_stride: coarsest stride that the decoder works on; coarser maps are resized to it
    """

    channels: list[int]
    depth: int
    output_stride: int

    @classmethod
    def of(cls, backbone: nn.Module, in_channels: int, depth: int, output_stride: int) -> "Levels":
        """The levels that a backbone's `feature_info` tells; `InputError` where a decoder would lack one."""
        channels, told = list(backbone.feature_info.channels()), list(backbone.feature_info.reduction())
        strides = told
        if told[0] != 2:  # no map of stride 2: zero channels, as smp's own transformer encoders have it
            channels, strides = [0, *channels], [2, *told]
        expected = [2**level for level in range(1, depth + 1)]
        finer = [s <= e for s, e in zip(strides, expected, strict=False)]  # those of dilated backbones are
        if len(finer) < depth or not all(finer) or strides[1] != 4:
            raise InputError(
                f"{depth} halvings of the image need maps of strides {expected[1:]}, but the backbone returns "
                f"strides {told}"
            )
        return cls([in_channels, *channels[:depth]], depth, min(output_stride, 2**depth))

    def __call__(self, images: torch.Tensor, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The image (B, C, H, W) and, of strides 2, 4, 8, ..., the backbone's maps of it."""
        height, width = images.shape[-2:]
        if self.channels[1] == 0:
            # of its shape, because len() would fix the batch size of what is exported
            maps = [images.new_empty(images.shape[0], 0, ceil_div(height, 2), ceil_div(width, 2)), *maps]
        strides = [min(2**level, self.output_stride) for level in range(1, self.depth + 1)]
        sizes = [(ceil_div(height, stride), ceil_div(width, stride)) for stride in strides]
        # only maps of other strides than the decoder's are resized
        return [images, *(resize(x, size) for x, size in zip(maps[: self.depth], sizes, strict=True))]


class Encoder(nn.Module):
    """A backbone in the form that smp's models want; see `Levels`."""

    def __init__(self, backbone: nn.Module, in_channels: int = 3, depth: int = 5, output_stride: int = 32):
        super().__init__()
        self.levels = Levels.of(backbone, in_channels, depth, output_stride)
        self.backbone = backbone

    @property
    def out_channels(self) -> list[int]:
        return self.levels.channels

    @property
    def output_stride(self) -> int:
        return self.levels.output_stride

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The image (B, C, H, W) and its maps of strides 2, 4, 8, ...; that of stride 2 may have no channels."""
        return self.levels(images, list(self.backbone(images)))


def get_encoder(
    name: str,
    in_channels: int = 3,
    depth: int = 5,
    weights: str | bool | None = None,
    output_stride: int = 32,
    **options: Any,
) -> nn.Module:
    """smp's `get_encoder`, which also knows names that begin with `backbones-`.

    Args:
        name: `backbones-NAME`, or any of smp's own
        in_channels: channels of the images; published weights are adapted
        depth: number of halvings, 2 to 5
        weights: None for none; True, or smp's word "imagenet", for the first that are published; a tag of
            `backbones info NAME`, or the path of a checkpoint
        output_stride: 8 or 16 for a denser last map: dilated where the backbone can be, resized where it cannot
        options: those of `build_backbone`, such as `drop_path_rate`; smp's models hand on what they do not know

    Raises:
        InputError, UnknownBackbone, WeightsError: as `build_backbone`
    """
    if name in _modules:
        backbone = _modules[name]
        return Encoder(backbone, getattr(backbone, "in_chans", in_channels), depth, output_stride)
    if not name.startswith(PREFIX):
        return _get_encoder(name, in_channels, depth, weights, output_stride, **options)
    if not 2 <= depth <= 5:
        raise InputError(f"{name}: encoder_depth={depth}, and a backbone has maps for 2 to 5 halvings")
    name = name.removeprefix(PREFIX)
    pretrained = bool(weights)
    if pretrained and weights is not True and not (weights == "imagenet" and weights not in _tags(name)):
        pretrained = weights
    options = {
        "in_chans": in_channels,
        "out_indices": tuple(range(depth - 1)),
        "pretrained": pretrained,
        **{k: v for k, v in options.items() if v is not None},
    }
    if output_stride == 32:
        return Encoder(build_backbone(name, **options), in_channels, depth)
    try:
        backbone = build_backbone(name, output_stride=output_stride, **options)
    except InputError:  # if the stride is not why, the next line says so again
        backbone = build_backbone(name, **options)
    return Encoder(backbone, in_channels, depth, output_stride)


def get_encoder_names() -> list[str]:
    """Names of smp's own encoders, then of the installed backbones; catalogues are not listed."""
    return [*_get_encoder_names(), *(f"{PREFIX}{name}" for name in list_backbones())]


def get_preprocessing_params(encoder_name: str, pretrained: str | bool = "imagenet") -> dict[str, Any]:
    """Mean, standard deviation and range of the images that an encoder's weights were trained on, as in smp.

    Raises:
        WeightsError: the backbone has no published weights, or none of this tag
    """
    if not encoder_name.startswith(PREFIX):
        return _get_preprocessing_params(encoder_name, pretrained)
    name = encoder_name.removeprefix(PREFIX)
    tags = _tags(name)
    if pretrained in ("imagenet", True) and tags:
        pretrained = "imagenet" if "imagenet" in tags else next(iter(tags))
    if pretrained not in tags:
        raise WeightsError(f"{name} has no published weights {pretrained!r}; it has {', '.join(tags) or 'none'}")
    row = tags[pretrained]
    return {"input_space": "RGB", "input_range": [0, 1], "mean": list(row.mean), "std": list(row.std)}


@contextmanager
def named(backbone: nn.Module) -> Iterator[str]:
    """A name under which smp's models take a module that is there already, for as long as one is being built."""
    name = f"{PREFIX}{id(backbone)}"
    _modules[name] = backbone
    try:
        yield name
    finally:
        del _modules[name]


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear, and only where the size differs; maps of no channels stay as they are."""
    if tuple(x.shape[-2:]) == tuple(size) or x.shape[1] == 0:
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _tags(name: str) -> dict[str, Any]:
    return {row.tag: row for row in backbone_info(name).weights}


def _extend_smp() -> None:
    """Put the functions above in the place of smp's own, in its modules only."""
    ours = (get_encoder, get_encoder_names, get_preprocessing_params)
    decoders = (sys.modules[model.__module__] for model in smp.MODEL_ARCHITECTURES_MAPPING.values())
    for module in (smp.encoders, *decoders):
        for function in ours:
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


_extend_smp()
