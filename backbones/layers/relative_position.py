"""Relative position biases: what attention adds to its logits for the offset between two cells."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .cache import TableCache
from .inference import Layer
from .padding import ceil_div, is_exporting


class PositionBias(Layer):
    """What attention adds to its logits for the offset between two cells of a grid, by head.

    Called with the height and width of the grid that attends, it returns (1, heads, N, N) for its N cells in
    row-major order; with `whole=False`, what `by_offset` does.
    """

    #: A tensor where the numbers are computed, as precise as they are.
    like: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._biases = TableCache(entries=2)  # the square of a map's cells, times heads: worth keeping few

    def forward(self, height: int, width: int, whole: bool = True) -> Tensor:
        def compute() -> Tensor:
            table = self.by_offset(height, width)
            return by_cell(table) if whole else table

        if not self.fast:
            return compute()
        like = self.like
        return self._biases.get((height, width, whole, like.device, like.dtype), compute)

    def by_offset(self, height: int, width: int) -> Tensor:
        """The numbers themselves, for each offset that the grid has, query minus key.

        Returns:
            (heads, 2 * height - 1, 2 * width - 1); offset 0 is in the middle.
        """
        raise NotImplementedError


class RelativePositionBias(PositionBias):
    """A learned number per head and offset, on any grid; tables for another size are resized bicubically.

    Called as `PositionBias` says.

    Args:
        size: side of the square grid that the table is made for, or its height and width.
        heads: number of heads.
    """

    def __init__(self, size: int | tuple[int, int], heads: int):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.heads = heads
        self.table = nn.Parameter(torch.zeros(_offsets(self.size[0]) * _offsets(self.size[1]), heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    @property
    def like(self) -> Tensor:
        return self.table

    def by_offset(self, height: int, width: int) -> Tensor:
        return _resize(self._grid(), height, width).unflatten(1, (_offsets(height), _offsets(width)))

    def _grid(self) -> Tensor:
        """(heads, rows, columns): the table by signed offset."""
        return self.table.t().unflatten(1, tuple(map(_offsets, self.size)))

    def fit(self, table: Tensor) -> Tensor:
        """A checkpoint's table in this one's shape.

        Args:
            table: (offsets, heads) of a square grid, query minus key, as Swin stores it; or (heads, rows, columns),
                key minus query, as TensorFlow's MaxViT does.
        """
        if table.ndim == 3:
            table = table.flip(1, 2)
        else:
            side = round(len(table) ** 0.5)
            if side * side != len(table):
                raise InputError(f"a table of {len(table)} relative positions is not that of a square grid")
            table = table.t().unflatten(1, (side, side))
        return _resize(table, *self.size).t().contiguous()


class DistanceBias(RelativePositionBias):
    """A `RelativePositionBias` that is the same in all four directions, as LeViT and EfficientFormer have it.

    Its table is (heads, height * width): a number per head and distance |dy|, |dx|, row-major.
    """

    def __init__(self, size: int | tuple[int, int], heads: int):
        super().__init__(size, heads)
        self.table = nn.Parameter(torch.zeros(heads, self.size[0] * self.size[1]))

    def _grid(self) -> Tensor:
        return _mirror(self.table.unflatten(1, self.size))

    def fit(self, table: Tensor) -> Tensor:
        """A checkpoint's table (heads, distances) of a square grid in this one's shape."""
        side = math.isqrt(table.shape[1])
        if side * side != table.shape[1]:
            raise InputError(f"a table of {table.shape[1]} distances is not that of a square grid")
        height, width = self.size
        table = _resize(_mirror(table.unflatten(1, (side, side))), height, width)
        return table.unflatten(1, (_offsets(height), -1))[:, height - 1 :, width - 1 :].flatten(1)


class LogPositionBias(PositionBias):
    """Relative position biases that an MLP computes from the logarithm of the offset, for any grid alike.

    Called as `PositionBias` says. timm's CoAtNet and MaxViT have it (`rmlp`), after Swin v2
    (https://arxiv.org/abs/2111.09883).

    Args:
        heads: number of heads.
        hidden: width of the MLP.
        dilation: how much closer the cells lie than those that offsets are counted in, for `output_stride`.
    """

    def __init__(self, heads: int, hidden: int = 512, dilation: int = 1):
        super().__init__()
        self.heads = heads
        self.dilation = dilation
        self.fc1 = nn.Linear(2, hidden)
        self.dropout = nn.Dropout(0.125)
        self.fc2 = nn.Linear(hidden, heads)
        # Where the layers are and how precise, whatever takes their place.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def by_offset(self, height: int, width: int) -> Tensor:
        like = self.like
        sides = (torch.arange(_offsets(side), device=like.device) - (side - 1) for side in (height, width))
        offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).float() / self.dilation
        offsets = (offsets.sign() * (1 + offsets.abs()).log()).to(like.dtype)
        return self.fc2(self.dropout(F.relu(self.fc1(offsets)))).permute(2, 0, 1)


def by_cell(table: Tensor) -> Tensor:
    """Biases (1, heads, N, N) of a grid's N cells, from those by offset (heads, 2 * height - 1, 2 * width - 1)."""
    height, width = (ceil_div(side, 2) for side in table.shape[1:])
    cells = height * width
    index = _INDICES.get((height, width, table.device), lambda: _index(height, width, table.device))
    return table.flatten(1).index_select(1, index).reshape(1, table.shape[0], cells, cells)


_INDICES = TableCache(entries=32, largest=2**22)  # 32 MB


def _index(height: int, width: int, device: torch.device) -> Tensor:
    """(N * N,), from query to key: where their offset is in the table."""
    rows = _differences(height, device)[:, None, :, None]
    columns = _differences(width, device)[None, :, None, :]
    return (rows * _offsets(width) + columns).flatten()


def _mirror(table: Tensor) -> Tensor:
    """(heads, rows, columns) by distance -> by signed offset, so that resizing leaves distance 0 where it is."""
    for dim in (1, 2):
        table = torch.cat((table.flip(dim).narrow(dim, 0, table.shape[dim] - 1), table), dim)
    return table


def _offsets(side: int) -> int:
    """How many differences there are between two positions of a side."""
    return 2 * side - 1


def _differences(side: int, device: torch.device) -> Tensor:
    """(side, side): query minus key, counted from 0."""
    positions = torch.arange(side, device=device)
    return positions[:, None] - positions + side - 1


def _resize(table: Tensor, height: int, width: int) -> Tensor:
    """(heads, rows, columns) for another grid: (heads, offsets), row-major."""
    size = (_offsets(height), _offsets(width))
    # While exporting, the question would fix the size; to its own size, the table is interpolated to itself.
    if is_exporting() or table.shape[1:] != size:
        table = F.interpolate(table[None].float(), size=size, mode="bicubic")[0].to(table.dtype)
    return table.flatten(1)
