"""Images of any size in windows of bounded size."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def slide(model: Callable[[Tensor], Tensor], image: Tensor, window: int, overlap: float) -> Tensor:
    """Class probabilities (classes, H, W) of an image (1, C, H, W), averaged where windows overlap.

    Args:
        model: from part of the image to its logits (1, classes, h, w).
        image: of any size; a side no larger than `window` is taken whole.
        window: side of the windows, in pixels.
        overlap: share of a window that the next one covers too.
    """
    height, width = image.shape[-2:]
    total = weight = None
    for top, bottom in _spans(height, window, overlap):
        for left, right in _spans(width, window, overlap):
            probabilities = model(image[..., top:bottom, left:right])[0].float().softmax(0)
            if total is None:
                total = probabilities.new_zeros(len(probabilities), height, width)
                weight = probabilities.new_zeros(height, width)
            # A window knows least about its rim, so it counts least there.
            ramp = _ramp(bottom - top, probabilities)[:, None] * _ramp(right - left, probabilities)
            total[:, top:bottom, left:right] += probabilities * ramp
            weight[top:bottom, left:right] += ramp
    return total / weight


def _spans(side: int, window: int, overlap: float) -> Iterator[tuple[int, int]]:
    """Evenly spread (start, end) that cover a side, each `window` long unless the side is shorter."""
    if side <= window:
        yield 0, side
        return
    step = max(1, round(window * (1 - overlap)))
    count = -(-(side - window) // step) + 1
    for i in range(count):
        start = round(i * (side - window) / (count - 1))
        yield start, start + window


def _ramp(length: int, like: Tensor) -> Tensor:
    """Weights (length,) that rise from the ends to the middle."""
    places = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(places, places.flip(0)) / length
