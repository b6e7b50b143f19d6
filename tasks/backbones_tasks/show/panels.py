"""What the pictures share: panels of images and of maps in one frame, colours of maps, titles."""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from .photo import Photo

TITLE = 9  # points; of a panel's title
ALPHA = 0.6  # of maps over the photograph
MOST_BORDERS = 500  # that leave something to be seen of a photograph
Stride = float | tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """What a kind draws: a figure, and the numbers in it.

    Args:
        figure: what is saved.
        numbers: by backbone, what JSON can hold.
        common: the same, of what all backbones share.
    """

    figure: Figure
    numbers: Sequence[dict[str, Any]]
    common: dict[str, Any]


@dataclass(frozen=True)
class Ground:
    """What is under maps and between their cells.

    Args:
        photo: what they are maps of.
        alpha: of the maps over the photo; None for maps alone.
        grid: whether the borders of their cells are drawn.
    """

    photo: Photo
    alpha: float | None
    grid: bool


def add_ground_arguments(parser: argparse.ArgumentParser) -> None:
    """`--overlay` and `--grid`."""
    parser.add_argument(
        "--overlay",
        type=_alpha,
        nargs="?",
        const=ALPHA,
        metavar="ALPHA",
        help=f"draw maps over the photograph, as opaque as this says, from 0 to 1; {ALPHA} if it says nothing",
    )
    parser.add_argument(
        "--grid", action="store_true", help="draw the borders of cells (patches) on photograph and maps"
    )


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1
    if not 0 <= alpha <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1; names and files come before --overlay")
    return alpha


def ground(photo: Photo, args: argparse.Namespace) -> Ground:
    """The ground that the command line asks for."""
    return Ground(photo, args.overlay, args.grid)


def grid_of_panels(
    rows: int, columns: int, aspect: float, width: float = 2.4, header: float = 0.42
) -> tuple[Figure, np.ndarray]:
    """A figure of panels whose height is `aspect` times their width, in inches, with room for their titles."""
    figure = _figure(columns * width, rows * (width * aspect + header) + 0.5)
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
    if isinstance(figure, Figure):  # the first line has its place
        figure.set_figheight(figure.get_figheight() + (len(lines) - 1) * size / 60)
    figure.suptitle("\n".join(lines), fontsize=size, **style)


def shape_of(panels: int, most: int) -> tuple[int, int]:
    """Rows and columns, of at most so many, with as few empty places as may be."""
    rows = -(-panels // most)
    return rows, -(-panels // rows)


def draw_photo(axis: Axes, photo: Photo, title: str = "image", cells: Stride | None = None, grey: bool = False) -> None:
    """The image, in pixels, with the borders of cells of a stride."""
    height, width = photo.size
    if grey:
        luminance = photo.pixels @ np.array((0.299, 0.587, 0.114))
        axis.imshow(luminance, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    else:
        axis.imshow(photo.pixels, extent=(0, width, height, 0))
    if cells:
        draw_borders(axis, photo.size, cells)
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_title(title, fontsize=TITLE)


def draw_map(
    axis: Axes,
    cells: np.ndarray,
    stride: Stride,
    size: tuple[int, int],
    title: str = "",
    ground: Ground | None = None,
    **style: Any,
) -> Any:
    """Cells (h, w) or (h, w, 3) where they lie in an image of a size, the last ones cut off at its borders."""
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    if ground and ground.alpha is not None:
        draw_photo(axis, ground.photo, grey=cells.ndim == 2)
        style["alpha"] = ground.alpha
    extent = (0, cells.shape[1] * right, cells.shape[0] * down, 0)
    drawn = axis.imshow(cells, extent=extent, interpolation="nearest", **style)
    if ground and ground.grid:
        draw_borders(axis, size, stride)
    axis.set(xlim=(0, size[1]), ylim=(size[0], 0))
    axis.set_title(title, fontsize=TITLE)
    return drawn


def draw_borders(axis: Axes, size: tuple[int, int], stride: Stride) -> None:
    """Lines between all cells of an image of a size."""
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    rows, columns = np.arange(down, size[0], down), np.arange(right, size[1], right)
    lines = [[(0, y), (size[1], y)] for y in rows] + [[(x, 0), (x, size[0])] for x in columns]
    alpha = min(0.7, 25 / max(1, len(rows), len(columns)))  # many lines would hide what is under them
    axis.add_collection(LineCollection(lines, colors="white", linewidths=0.4, alpha=alpha))


def draw_outline(axis: Axes, inside: np.ndarray, stride: Stride) -> None:
    """Borders between cells (h, w) that are inside and cells that are not, unless they would cover all."""
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    padded = np.pad(inside, 1)
    lines = []
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        lines.append([(x * right, y * down), ((x + 1) * right, y * down)])
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        lines.append([(x * right, y * down), (x * right, (y + 1) * down)])
    if len(lines) < MOST_BORDERS:
        axis.add_collection(LineCollection(lines, colors="cyan", linewidths=0.8))


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
