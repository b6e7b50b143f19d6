"""Windows: square parts of a map that attend among themselves."""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cuts (B, H, W, C) into windows (B * windows, size * size, C), zero-padded at the right and bottom."""
    _, height, width, channels = x.shape
    bottom, right = -height % size, -width % size
    if torch.compiler.is_compiling() or bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, rows, size, columns, size, C)
    return x.transpose(2, 3).reshape(-1, size * size, channels)


def window_unpartition(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Puts windows (B * windows, size * size, C) back into a map (B, height, width, C)."""
    rows, columns = -(-height // size), -(-width // size)
    x = windows.reshape(-1, rows, columns, size, size, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * size, columns * size, windows.shape[-1])
    return x[:, :height, :width]
