"""Tables of absolute positions, one per cell of a grid, for maps of another size."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .padding import is_exporting


@dataclass(frozen=True)
class Resampling:
    """How positions between those of a table are found.

    Args:
        mode: as in `F.interpolate`: "bicubic", "bilinear" or "nearest".
        antialias: whether all positions that fall into a cell of a smaller map count.
        corners: whether the corners of both grids are in the same places, as in torchvision, and not their edges.
    """

    mode: str = "bicubic"
    antialias: bool = False
    corners: bool = False

    def __call__(self, table: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Positions (1, cells, C) of a map of `grid` cells, for one of `size`: (1, *size, C)."""
        table = table.unflatten(1, tuple(grid))
        if not is_exporting() and tuple(grid) == tuple(size):  # while exporting, the question would fix the answer
            return table
        corners = self.corners if self.mode in ("bilinear", "bicubic") else None
        cells = table.permute(0, 3, 1, 2).float()
        resized = F.interpolate(cells, size=size, mode=self.mode, align_corners=corners, antialias=self.antialias)
        return resized.permute(0, 2, 3, 1).to(table.dtype)
