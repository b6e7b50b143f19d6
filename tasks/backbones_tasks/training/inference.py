"""How a trained segmenter labels images: averaged over sizes and mirrored versions, whole or in windows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backbones.errors import InputError

from .sliding import slide

MIN_WINDOW = 32


@dataclass(frozen=True)
class Inference:
    """How images are labelled when they are measured and by `predict`.

    scales: factors by which each image, or each window of it, is resized; probabilities are averaged over all.
    flip: average over mirrored images as well. window: side in pixels of the windows that larger images are taken in;
    null for whole images. overlap: at least this share of a window is covered by the next one too.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if not self.scales or not all(scale > 0 for scale in self.scales):
            raise InputError(f"scales={self.scales}: at least one is needed, and each must be over 0")
        if self.window is not None and self.window < MIN_WINDOW:
            raise InputError(f"window={self.window} must be at least {MIN_WINDOW}")
        if not 0 <= self.overlap < 1:
            raise InputError(f"overlap={self.overlap} must be from 0 to under 1")

    def logits(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """The model's logits (B, classes, H, W) of images (B, C, H, W); of averages, the logarithm of probabilities."""
        whole = self.window is None or max(images.shape[-2:]) <= self.window
        if whole and tuple(self.scales) == (1.0,) and not self.flip:
            return model(images)
        return self.probabilities(model, images).clamp(min=torch.finfo(torch.float32).tiny).log()

    def probabilities(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Class probabilities (B, classes, H, W) in float32 of images (B, C, H, W), by a model that returns logits."""
        size = images.shape[-2:]
        bands = slide(
            lambda part: average(model, part, self.scales, self.flip),
            lambda top, bottom: images[..., top:bottom, :],
            size,
            self.window or max(size),
            self.overlap,
        )
        return torch.cat(list(bands), dim=-2)


def average(
    model: Callable[[Tensor], Tensor], images: Tensor, scales: tuple[float, ...] = (1.0,), flip: bool = False
) -> Tensor:
    """Class probabilities averaged over resized and mirrored versions of images ("test-time augmentation").

    As in mmsegmentation, the logits of a version are brought to the size of the images before their softmax.

    Args:
        model: from images of any size to logits of that size.
        images: (B, C, H, W).
        scales: factors of the versions' sides.
        flip: take each version from left to right and from right to left.

    Returns:
        (B, classes, H, W) in float32.
    """
    size = tuple(images.shape[-2:])
    total: Any = 0
    count = 0
    for scale in scales:
        scaled_size = tuple(max(1, round(side * scale)) for side in size)
        scaled = _resize(images, scaled_size)
        for mirror in (False, True)[: 1 + flip]:
            logits = model(scaled.flip(-1) if mirror else scaled)
            logits = logits.flip(-1) if mirror else logits
            total = total + _resize(logits.float(), size).softmax(1)
            count += 1
    return total / count if count > 1 else total


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with antialias where it shrinks; as it is where the size is right."""
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
