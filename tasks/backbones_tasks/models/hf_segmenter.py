"""Segmenters of transformers: classes of pixels, or of masks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from backbones.errors import InputError
from backbones.layers import crop_to, pad_to_multiple

from . import hf
from .base import HoldsBackbone, recorded
from .heads import SEGMENTERS, Head
from .smp import resize

SMALLEST = 1e-6  # score of a class; its logarithm is a logit


class TransformersSegmenter(HoldsBackbone):
    """What `build_segmenter("hf/NAME")` returns; its `hf` is transformers' model."""

    def __init__(self, model: PreTrainedModel, head: Head, num_classes: int):
        super().__init__()
        self.hf, self.num_classes = model, num_classes
        self.divisor, self.min_size = head.divisor, 0
        self.backbone_path = f"hf.{hf.backbone_path(model)}"

    if TYPE_CHECKING:  # torch says that calling a module gives Any

        def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]: ...


class PixelSegmenter(TransformersSegmenter):
    """UPerNet: called with images (B, C, H, W), it returns logits (B, num_classes, H, W).

    With an auxiliary head, in training mode, a pair of them.
    """

    def __init__(self, model: PreTrainedModel, head: Head, num_classes: int):
        super().__init__(model, head, num_classes)
        for name, module in list(model.named_modules()):
            if name.endswith("psp_modules.0.1.batch_norm"):
                model.set_submodule(name, PooledNorm(module.num_features))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps = self.hf.backbone(images).feature_maps
        logits = resize(self.hf.decode_head(maps), images.shape[-2:])
        if self.hf.auxiliary_head is None or not self.training:
            return logits
        return logits, resize(self.hf.auxiliary_head(maps), images.shape[-2:])


class PooledNorm(nn.BatchNorm2d):
    """A batch norm of what has been pooled to one cell: of a single image, there are no statistics to normalise by."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class MaskSegmenter(TransformersSegmenter):
    """MaskFormer and Mask2Former: called with images (B, C, H, W), it returns logits (B, num_classes, H, W).

    The logits are logarithms of the scores that the papers sum over masks, so that the largest is the class, and their
    softmax the share of each. They are for labelling; training goes by `losses`.
    """

    def forward(
        self, images: Tensor, masks: Tensor | None = None, ignore_index: int = 255
    ) -> Tensor | dict[str, Tensor]:
        """Logits; given masks, what `losses` returns."""
        padded = pad_to_multiple(images, self.divisor)
        if masks is not None:
            return self._losses(padded, masks, ignore_index)
        output = self.hf(pixel_values=padded, output_hidden_states=True)
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        scores = torch.einsum("bqc,bqhw->bchw", classes, output.masks_queries_logits.float().sigmoid())
        scores = crop_to(resize(scores, padded.shape[-2:]), *images.shape[-2:])
        if self.num_classes == 1:  # of the class and of the rest, which share what there is
            return torch.logit(scores, SMALLEST)
        return scores.clamp(min=SMALLEST).log()

    def losses(self, images: Tensor, masks: Tensor, ignore_index: int = 255) -> dict[str, Tensor]:
        """Losses of the last decoder layer and of those before it, to be summed.

        Args:
            images: (B, C, H, W), normalised.
            masks: (B, H, W) of class indices; of a single class, 1 where it is and 0 where it is not.
            ignore_index: of pixels that are of no class.
        """
        found: Any = self(images, masks, ignore_index)  # by its call, which is what wrappers such as FSDP see
        return found

    def _losses(self, padded: Tensor, masks: Tensor, ignore_index: int) -> dict[str, Tensor]:
        first = int(self.num_classes == 1)
        regions, classes = [], []
        right, bottom = (padded.shape[side] - masks.shape[side] for side in (-1, -2))
        for mask in masks:
            found = [c for c in mask.unique().tolist() if first <= c != ignore_index]
            labels = torch.tensor(found, dtype=torch.long, device=mask.device)
            regions.append(F.pad((mask == labels[:, None, None]).to(padded.dtype), (0, right, 0, bottom)))
            classes.append(labels - first)
        return mask_losses(self.hf, padded, regions, classes)


def mask_losses(
    model: PreTrainedModel, images: Tensor, regions: Sequence[Tensor], classes: Sequence[Tensor]
) -> dict[str, Tensor]:
    """transformers' losses of a model that gives classes to masks, of every decoder layer.

    Args:
        model: its `get_loss_dict` weighs them.
        images: (B, C, H, W).
        regions, classes: of each image, masks (N, H, W) of 0 and 1, and their classes (N,).
    """
    output = model(pixel_values=images, output_auxiliary_logits=True, output_hidden_states=True)
    earlier = output.auxiliary_logits if model.config.use_auxiliary_loss else None
    said = (output.masks_queries_logits, output.class_queries_logits)
    losses: dict[str, Tensor] = model.get_loss_dict(*said, list(regions), list(classes), earlier)
    return losses


def build(
    architecture: str, backbone: nn.Module, num_classes: int, aux: bool, options: Mapping[str, Any]
) -> TransformersSegmenter:
    """The model of "hf/NAME" for `build_segmenter`, whose arguments these are."""
    head = SEGMENTERS[architecture]
    pixels = architecture == "hf/upernet"
    if aux and not pixels:
        raise InputError(f"{architecture} trains all of its layers by losses of their own; leave aux at False")
    more = {"use_auxiliary_head": aux} if pixels else {}
    model = hf.build_head(architecture, backbone, num_classes, options, **more)
    segmenter = (PixelSegmenter if pixels else MaskSegmenter)(model, head, num_classes)
    own = {"architecture": architecture, "num_classes": num_classes, "aux": aux}
    return recorded(segmenter, "segmentation", **own, **options)
