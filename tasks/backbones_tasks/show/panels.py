"""What the pictures share: panels of images and of maps in one frame, colours of maps, titles."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from .photo import Photo

TITLE = 9  # points; of a panel's title


def grid_of_panels(
    rows: int, columns: int, aspect: float, width: float = 2.4, header: float = 0.42
) -> tuple[Figure, np.ndarray]:
    """A figure of panels whose height is `aspect` times their width, in inches, with room for their titles."""
    figure = _figure(columns * width, rows * (width * aspect + header) + 0.35)
    return figure, _panels(figure, rows, columns)


def rows_of_panels(
    headings: Sequence[str], columns: int, aspect: float, width: float = 2.4, top: float = 0.0
) -> tuple[Figure, FigureBase | None, list[np.ndarray]]:
    """A figure with a row of panels under each heading.

    Returns:
        The figure; what is above the rows, `top` inches high, if asked for; and the panels of each row.
    """
    height = width * aspect + 0.72
    heights = [*([top] if top else []), *([height] * len(headings))]
    figure = _figure(columns * width + 0.3, sum(heights) + 0.3)
    parts = list(np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights)))
    above = parts.pop(0) if top else None
    for part, heading in zip(parts, headings, strict=True):
        set_heading(part, heading, size=TITLE, weight="bold")
    return figure, above, [_panels(part, 1, columns)[0] for part in parts]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    return figure


def _panels(figure: FigureBase, rows: int, columns: int) -> np.ndarray:
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return axes


def set_heading(figure: FigureBase, text: str, size: float = 10, **style: Any) -> None:
    """A title over a figure, or over a part of one, in as many lines as its width takes."""
    characters = int(figure.bbox.width / figure.dpi * 125 / size)
    lines = [wrapped for line in text.splitlines() for wrapped in textwrap.wrap(line, characters)]
    figure.suptitle("\n".join(lines), fontsize=size, **style)


def shape_of(panels: int, most: int) -> tuple[int, int]:
    """Rows and columns, of at most so many, with as few empty places as may be."""
    rows = -(-panels // most)
    return rows, -(-panels // rows)


def draw_photo(axis: Axes, photo: Photo, title: str = "image") -> None:
    """The image, in pixels."""
    axis.imshow(photo.pixels, extent=(0, photo.size[1], photo.size[0], 0))
    axis.set_title(title, fontsize=TITLE)


def draw_map(axis: Axes, cells: np.ndarray, stride: float, size: tuple[int, int], title: str = "", **style: Any) -> Any:
    """Cells (h, w) or (h, w, 3) where they lie in an image of a size, the last ones cut off at its borders."""
    extent = (0, cells.shape[1] * stride, cells.shape[0] * stride, 0)
    drawn = axis.imshow(cells, extent=extent, interpolation="nearest", **style)
    axis.set(xlim=(0, size[1]), ylim=(size[0], 0))
    axis.set_title(title, fontsize=TITLE)
    return drawn


class ChannelColours:
    """Channels as colours: the first three principal components of a map are red, green and blue.

    Args:
        features: (C, h, w); other maps of as many channels are coloured alike.
    """

    def __init__(self, features: Tensor):
        cells = features.flatten(1).T.double().cpu()
        self.mean = cells.mean(0)
        centred = cells - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        self.axes = vectors.flip(1)[:, :3]
        # A component's sign means nothing: its largest weight is positive, so that colours are the same in every run.
        self.axes = self.axes * self.axes.gather(0, self.axes.abs().argmax(0, keepdim=True)).sign()
        total = values.sum()
        #: Share of the variance that the colours show.
        self.share = float(values.flip(0)[:3].sum() / total) if total > 0 else 1.0
        projected = centred @ self.axes
        self.low, self.high = projected.quantile(torch.tensor([[0.01], [0.99]]).double().flatten(), dim=0)

    def __call__(self, features: Tensor) -> np.ndarray:
        """(C, h, w) as (h, w, 3) from 0 to 1."""
        cells = (features.flatten(1).T.double().cpu() - self.mean) @ self.axes
        scaled = ((cells - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)
        rgb = torch.zeros(len(scaled), 3, dtype=scaled.dtype)
        rgb[:, : scaled.shape[1]] = scaled  # a map of one or two channels has no more components
        return rgb.unflatten(0, features.shape[1:]).numpy()


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 1) -> np.ndarray:
    """Images (h, w) of one size, row by row in one image, NaN between them."""
    height, width = images[0].shape
    rows = -(-len(images) // columns)
    tiled = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        tiled[top : top + height, left : left + width] = image
    return tiled
