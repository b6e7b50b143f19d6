"""Cells of an image that tokens or values of a map stand for."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .places import varies


@dataclass(frozen=True)
class Grid:
    """Equal cells over an image, in row-major order.

    Args:
        height, width: rows and columns.
        stride: height and width of a cell, in pixels.
    """

    height: int
    width: int
    stride: tuple[float, float]

    def cell(self, x: float, y: float) -> int:
        """The cell of a pixel."""
        row, column = (int(at // side) for at, side in zip((y, x), self.stride, strict=True))
        return min(row, self.height - 1) * self.width + min(column, self.width - 1)

    def middles(self, cells: Tensor) -> Tensor:
        """(..., 2): rows and columns of pixels, of the middles of cells."""
        at = torch.stack((cells // self.width, cells % self.width), -1) + 0.5
        return at * torch.tensor(self.stride, device=cells.device)

    def spread(self, values: Tensor, cells: Tensor) -> Tensor:
        """Values (..., N) of cells (N,), summed where they lie: (..., height, width). Cell -1 is none."""
        flat = values.new_zeros(*values.shape[:-1], self.height * self.width)
        inside = cells >= 0
        flat.index_add_(-1, cells[inside], values[..., inside])
        return flat.unflatten(-1, (self.height, self.width))


def grid_of(places: Tensor, size: tuple[int, int]) -> tuple[Grid, Tensor] | None:
    """The grid over an image of a size in whose cells places are, one or none in each, and the cell of each place.

    Cells are as far apart as places are. What is from no place, or from padding, is in cell -1. None where no two
    places differ.
    """
    finite = places.isfinite()
    if not bool(finite.any()):
        return None
    found = places[finite]
    strides = [_stride(at) for at in (found.real, found.imag)]
    if strides == [None, None]:
        return None
    (height, down, row), (width, right, column) = (
        _lines(at, side, stride or max(filter(None, strides)))
        for at, side, stride in zip((found.real, found.imag), size, strides, strict=True)
    )
    cells = torch.full(places.shape, -1, device=places.device)
    cells[finite] = row * width + column
    return Grid(height, width, (down, right)), cells


def _stride(at: Tensor) -> float | None:
    """Pixels from one row (or column) to the next; None where there is one."""
    steps = at.mul(16).round().unique().diff() / 16
    steps = steps[steps > 0.5]  # a resized map may be a trifle uneven
    return float(steps.median()) if len(steps) else None


def _lines(at: Tensor, side: int, stride: float) -> tuple[int, float, Tensor]:
    """Number of rows (or columns) along a side of an image, pixels between them, and which one each place is in."""
    if abs(stride - round(stride)) > 0.1:  # a map that was resized to some number of cells
        lines = at.mul(16).round().unique() / 16
        lines = lines[torch.cat((lines.diff() > 0.5, lines.new_ones(1, dtype=torch.bool)))]
        return len(lines), side / len(lines), torch.searchsorted(lines, at - 0.25).clamp(max=len(lines) - 1)
    stride = round(stride)
    count = math.ceil(side / stride)
    return count, stride, at.div(stride).floor().clamp(0, count - 1).long()


def as_map(values: Tensor, places: Tensor, size: tuple[int, int]) -> tuple[Grid, Tensor] | None:
    """What a layer returned as a map (C, h, w) over an image, whether it is NCHW, NHWC, tokens or windows of them.

    Args:
        values: any shape; of one image.
        places: where they are from, in the same shape.
        size: of the image.

    Returns:
        Cells of the map, and the map, NaN where there is no value; None where all values are in one place.
    """
    along = [dim for dim in range(values.ndim) if varies(places, dim)]
    across = [dim for dim in range(values.ndim) if dim not in along]
    one = places[tuple(slice(None) if dim in along else 0 for dim in range(values.ndim))]  # of any channel
    found = grid_of(one.flatten(), size)
    if found is None:
        return None
    grid, cells = found
    table = values.permute(*across, *along).reshape(-1, one.numel()).float()
    count = grid.spread(torch.ones_like(table[:1]), cells)
    return grid, grid.spread(table, cells) / count
