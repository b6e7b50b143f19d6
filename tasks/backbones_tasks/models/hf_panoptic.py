"""Panoptic models of transformers: what they say of masks, put together to segments."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from backbones.errors import InputError

from ..options import nearest
from . import hf
from .base import HoldsBackbone, image_statistics, recorded
from .heads import SEGMENTERS
from .hf_segmenter import mask_losses
from .resizing import Resizing
from .smp import resize

#: Options of `build_panoptic` beside transformers' own: of what brings images to a size, and of what is given.
RESIZING = ("min_size", "max_size", "image_mean", "image_std")
PICKING = ("score_thresh", "overlap_thresh")


class PanopticSegmenter(HoldsBackbone):
    """A model of transformers that gives classes to masks, which are put together to segments; see `build_panoptic`.

    Args:
        model: transformers' model, which stays available as `hf`.
        transform: brings images to a size, normalises and pads them.
        things: number of classes that are things.
        score_thresh, overlap_thresh: of segments that are given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        transform: Resizing,
        things: int,
        score_thresh: float = 0.5,
        overlap_thresh: float = 0.8,
    ):
        super().__init__()
        self.hf, self.transform, self.things = model, transform, things
        self.score_thresh, self.overlap_thresh = score_thresh, overlap_thresh
        self.backbone_path = f"hf.{hf.backbone_path(model)}"

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode; in eval mode the segments of each image."""
        if not self.training:
            return self._predict(images)
        if targets is None:
            raise InputError("a panoptic model in training mode needs targets; call eval() to predict")
        boxes = [{**target, "boxes": image.new_zeros(0, 4)} for image, target in zip(images, targets, strict=True)]
        batch, resized = self.transform(list(images), boxes)
        height, width = batch.tensors.shape[-2:]
        regions = [
            F.pad(mask.to(batch.tensors.dtype), (0, width - mask.shape[-1], 0, height - mask.shape[-2]))
            for mask in (target["masks"] for target in resized)
        ]
        return mask_losses(self.hf, batch.tensors, regions, [target["labels"] for target in targets])

    if TYPE_CHECKING:  # torch says that calling a module gives Any
        __call__ = forward

    def _predict(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        batch, _ = self.transform(list(images))
        output = self.hf(pixel_values=batch.tensors, output_hidden_states=True)
        found = []
        for i, (image, (height, width)) in enumerate(zip(images, batch.image_sizes, strict=True)):
            scores, labels = output.class_queries_logits[i].float().softmax(-1).max(-1)
            kept = (labels < output.class_queries_logits.shape[-1] - 1) & (scores > self.score_thresh)
            masks = output.masks_queries_logits[i : i + 1, kept].float()
            masks = resize(masks, batch.tensors.shape[-2:])[..., :height, :width]
            masks = resize(masks, image.shape[-2:])[0].sigmoid()
            found.append(merge(masks, scores[kept], labels[kept], self.things, self.overlap_thresh))
        return found


def merge(masks: Tensor, scores: Tensor, labels: Tensor, things: int, overlap_thresh: float) -> dict[str, Tensor]:
    """Masks that overlap put together to segments, as MaskFormer's paper has it (section 3.4).

    Each pixel goes to the mask of the greatest product of score and probability. A mask is left out if it has lost too
    much of what it would have alone, and masks of one kind of stuff become one segment.

    Args:
        masks: (N, H, W) of probabilities.
        scores, labels: of each mask.
        things: how many of the labels, the first ones, are things.
        overlap_thresh: the least share of its own pixels that a mask must have kept.

    Returns:
        "segments" (H, W), where i + 1 is the i-th segment and 0 none, and its "labels", "scores" and "things".
    """
    segments = torch.zeros(masks.shape[-2:], dtype=torch.long, device=masks.device)
    kept: list[int] = []
    stuff: dict[int, int] = {}
    owners = (masks * scores[:, None, None]).argmax(0) if len(masks) else segments
    for i, label in enumerate(labels.tolist()):
        alone = masks[i] >= 0.5
        own = alone & (owners == i)
        if own.sum() == 0 or own.sum() < overlap_thresh * alone.sum():
            continue
        if label not in stuff:
            kept.append(i)
        segments[own] = stuff.get(label, len(kept))
        if label >= things:
            stuff.setdefault(label, len(kept))
    return {"segments": segments, "labels": labels[kept], "scores": scores[kept], "things": labels[kept] < things}


def build(
    architecture: str,
    body: nn.Module,
    num_classes: int,
    things: int,
    batch_norm: Literal["train", "frozen"],
    options: Mapping[str, Any],
) -> PanopticSegmenter:
    """The model of "hf/NAME" for `build_panoptic`, whose arguments these are."""
    head, known = SEGMENTERS[architecture], {*hf.known_options(architecture), *RESIZING, *PICKING}
    for option in options:
        if option not in known:
            raise InputError(f"{architecture} has no option {option!r}; {nearest(option, sorted(known))}")
    theirs = {name: value for name, value in options.items() if name not in (*RESIZING, *PICKING)}
    model = hf.build_head(architecture, body, num_classes, theirs, batch_norm)
    mean, std = image_statistics(body, options)
    statistics = {"image_mean": mean, "image_std": std}
    sized = {name: options[name] for name in RESIZING if name in options}
    shorter, longer = head.sizes
    resizing = Resizing(**{"min_size": shorter, "max_size": longer, **statistics, **sized}, size_divisible=head.divisor)
    thresholds = {name: options[name] for name in PICKING if name in options}
    own = {"architecture": architecture, "num_classes": num_classes, "things": things, "batch_norm": batch_norm}
    panoptic = PanopticSegmenter(model, resizing, things, **thresholds)
    return recorded(panoptic, "panoptic", **own, **{**statistics, **options})
