"""Images of any size in windows, in memory that the height of an image does not change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """What a window covers of a side of an image.

    Args:
        start, end: the first pixel, and the one after the last.
        done: pixels before this one are reached by no later window.
        weight: (end - start,) share of this window in each pixel; those of all windows sum to 1.
    """

    start: int
    end: int
    done: int
    weight: Tensor


def slide(
    model: Callable[[Tensor], Tensor],
    rows: Callable[[int, int], Tensor],
    size: tuple[int, int],
    window: int,
    overlap: float,
    reduce: Callable[[Tensor], Tensor] = lambda probabilities: probabilities,
) -> Iterator[Tensor]:
    """Class probabilities of images, averaged where windows overlap, as bands of finished rows from top to bottom.

    Held at any time are a band of the image, one window, and the sums of those rows that windows further down reach
    too: about 4 * classes * overlap * window * W bytes.

    Args:
        model: from parts of images (B, C, h, w) to probabilities (B, classes, h, w) in float32.
        rows: gives the rows of the images from the first to before the second, (B, C, rows, W). Neither number ever
            falls, so that what is stored line by line is read once.
        size: (H, W) of the images; a side no larger than `window` is taken whole.
        window: side of the windows, in pixels.
        overlap: at least this share of a window is covered by the next one too.
        reduce: what to make of each piece of finished probabilities (B, classes, h, w), such as labels (B, h, w).

    Yields:
        what `reduce` returns for the next rows of full width; concatenated along dim -2, it is that of the images.
    """
    across, down = (spans(side, window, overlap) for side in (size[1], size[0]))
    below = None  # sums in the rows from a window's first on that the windows above it reached too
    carried = 0  # how many rows these are
    for vertical in down:
        strip = rows(vertical.start, vertical.end)
        done = vertical.done - vertical.start
        finished = []
        beside = None  # the same for columns
        for horizontal in across:
            sums = model(strip[..., horizontal.start : horizontal.end])
            sums = sums * (vertical.weight[:, None] * horizontal.weight).to(sums)
            if beside is not None:
                sums[..., : beside.shape[-1]] += beside
            columns = slice(horizontal.start, horizontal.done)
            width = horizontal.done - horizontal.start
            sums, beside = sums[..., :width], sums[..., width:]
            if below is None:
                most = max(span.end - span.done for span in down)
                below = sums.new_empty(*sums.shape[:-2], most, size[1])
            sums[..., :carried, :] += below[..., :carried, columns]
            finished.append(reduce(sums[..., :done, :]))
            below[..., : vertical.end - vertical.done, columns] = sums[..., done:, :]
        carried = vertical.end - vertical.done
        yield torch.cat(finished, dim=-1)


def spans(side: int, window: int, overlap: float) -> list[Span]:
    """Evenly spread windows that cover a side, each `window` long unless the side is shorter."""
    if side <= window:
        starts = [0]
    else:
        step = max(1, int(window * (1 - overlap)))
        count = -(-(side - window) // step) + 1
        starts = [round(i * (side - window) / (count - 1)) for i in range(count)]
    length = min(side, window)
    # A window knows least about its rim, so it counts least there.
    places = torch.arange(1, length + 1, dtype=torch.float32)
    ramp = torch.minimum(places, places.flip(0))
    total = torch.zeros(side)
    for start in starts:
        total[start : start + length] += ramp
    return [
        Span(start, start + length, done, ramp / total[start : start + length])
        for start, done in zip(starts, [*starts[1:], side], strict=True)
    ]
