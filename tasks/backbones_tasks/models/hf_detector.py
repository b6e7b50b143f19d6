"""Detectors of transformers, called as torchvision's are."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, clip_boxes_to_image
from transformers.modeling_utils import PreTrainedModel

from backbones.errors import InputError
from backbones.layers import ceil_div

from . import hf
from .base import Detector, recorded
from .heads import DETECTORS, Head
from .joined import JoinedMaps
from .resizing import Resizing

#: What brings images to a size, and picks from what was found: options of `build_detector` beside transformers' own.
RESIZING = ("min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size", "_skip_resize")
PICKING = ("score_thresh", "detections_per_img")


class SetDetector(Detector):
    """A detector of transformers, trained by matching a set of predictions with the objects; see `build_detector`.

    Args:
        model: transformers' model, which stays available as `hf`.
        transform: brings images to a size, normalises and pads them.
        head: what is to be known of the model.
        score_thresh, detections_per_img: which of the predictions are given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        transform: Resizing,
        head: Head,
        score_thresh: float = 0.0,
        detections_per_img: int = 100,
    ):
        super().__init__()
        self.hf, self.transform, self.head = model, transform, head
        self.score_thresh, self.detections_per_img = score_thresh, detections_per_img
        self.backbone_path = f"hf.{hf.backbone_path(model)}"
        strides = list(self.inner_backbone.feature_info.reduction())
        joined = [module.at for module in model.modules() if isinstance(module, JoinedMaps)]
        #: pixels per cell of the maps that the head sees
        self.strides = [strides[i] for i in joined] or strides

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode; in eval mode boxes, labels and scores of each image, best first."""
        if self.training:
            if targets is None:
                raise InputError("a detector in training mode needs targets; call eval() to predict")
            for i, target in enumerate(targets):
                _check_boxes(i, target["boxes"])
        sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(list(images), targets if self.training else None)
        pixels = self._with_cells(batch.tensors)
        mask = pixels.new_zeros(len(pixels), *pixels.shape[-2:], dtype=torch.long)
        for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
            row[:height, :width] = 1
        # boxes are relative to the image where it is known to end, else to all that is seen
        frames = batch.image_sizes if self.head.sees_padding else [tuple(pixels.shape[-2:])] * len(pixels)
        scales = [pixels.new_tensor([width, height] * 2, dtype=torch.float32) for height, width in frames]
        if not self.training:
            found = self._found(self.hf(pixel_values=pixels, pixel_mask=mask), scales, batch.image_sizes)
            return self.transform.postprocess(found, batch.image_sizes, sizes)
        labels = [
            {"class_labels": t["labels"] - 1, "boxes": box_convert(t["boxes"].float() / scale, "xyxy", "cxcywh")}
            for t, scale in zip(targets, scales, strict=True)
        ]
        return self._losses(self.hf(pixel_values=pixels, pixel_mask=mask, labels=labels))

    def _with_cells(self, pixels: Tensor) -> Tensor:
        """Images padded until their maps have as many cells as the head picks."""
        if not self.head.queries:
            return pixels
        wanted, step = getattr(self.hf.config, self.head.queries), max(*self.strides, self.head.divisor)
        height, width = pixels.shape[-2:]
        while sum(ceil_div(height, s) * ceil_div(width, s) for s in self.strides) < wanted:
            height, width = (height + step, width) if height <= width else (height, width + step)
        return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))

    def _losses(self, output: Any) -> dict[str, Tensor]:
        """Losses of the last decoder layer and of those before it, whose sum is transformers' own loss."""
        losses = {name: value for name, value in output.loss_dict.items() if name.startswith("loss_")}
        if not self.head.weighted:
            losses = {name: value * self._weight(name) for name, value in losses.items()}
        noise = getattr(self.hf.model, "denoising_class_embed", None)
        if noise is not None:  # unused where no image shows anything, and DDP waits for gradients of all
            name = next(iter(losses))
            losses[name] = losses[name] + 0 * noise.weight.sum()
        return losses

    def _weight(self, name: str) -> float:
        """What transformers multiplies a loss by when it adds them up."""
        coefficient = {"loss_ce": "class", "loss_bbox": "bbox", "loss_giou": "giou"}["_".join(name.split("_")[:2])]
        weight: float = getattr(self.hf.config, f"{coefficient}_loss_coefficient", 1)
        return weight

    def _found(
        self, output: Any, scales: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, boxes = output.logits.float(), box_convert(output.pred_boxes.float(), "cxcywh", "xyxy")
        if self.head.softmax:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            queries, labels = order, labels.gather(1, order)
        else:  # a query may be of several classes
            classes = logits.shape[-1]
            scores, order = logits.sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
            queries, labels = order // classes, order % classes
        found = []
        for i, size in enumerate(sizes):
            kept = (scores[i, : self.detections_per_img] >= self.score_thresh).nonzero()[:, 0]
            pixels = clip_boxes_to_image(boxes[i, queries[i, kept]] * scales[i], size)
            found.append({"boxes": pixels, "labels": labels[i, kept] + 1, "scores": scores[i, kept]})
        return found


def build(
    architecture: str,
    body: nn.Module,
    num_classes: int,
    batch_norm: Literal["train", "frozen", "sync"],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    **options: Any,
) -> Detector:
    """The model of "hf/NAME" for `build_detector`, whose arguments these are."""
    head = DETECTORS[architecture]
    if batch_norm == "sync":
        body = convert_sync_batchnorm(body)
    own = {name: options[name] for name in PICKING if name in options}
    sized = {name: options[name] for name in RESIZING if name in options}
    theirs = {name: value for name, value in options.items() if name not in (*PICKING, *RESIZING)}
    kept = "train" if batch_norm == "sync" else batch_norm
    model = hf.build_head(architecture, body, num_classes - 1, theirs, kept)
    resized = {"min_size": head.sizes[0], "max_size": head.sizes[1], "size_divisible": head.divisor, **sized}
    transform = Resizing(image_mean=list(image_mean), image_std=list(image_std), **resized)
    detector = SetDetector(model, transform, head, **own)
    statistics = {"image_mean": list(image_mean), "image_std": list(image_std)}
    return recorded(
        detector,
        "detection",
        architecture=architecture,
        num_classes=num_classes,
        batch_norm=batch_norm,
        **{**statistics, **options},
    )


def known_options(architecture: str) -> set[str]:
    """Names of what a detector of transformers takes: of its configuration, and ours."""
    return {*hf.known_options(architecture), *RESIZING, *PICKING}


def _check_boxes(index: int, boxes: Tensor) -> None:
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise InputError(f"target {index}: boxes are of shape {tuple(boxes.shape)}, and must be (N, 4) as x0 y0 x1 y1")
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        wrong = boxes[~(boxes[:, 2:] > boxes[:, :2]).all(1)][0].tolist()
        raise InputError(f"target {index}: the box {wrong} has no area; boxes are x0 y0 x1 y1 in pixels")
