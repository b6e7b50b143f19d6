"""Windows: square parts of a map that attend among themselves."""

from torch import Tensor

from .padding import ceil_div, crop_to, is_exporting, pad_to_multiple


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cuts (B, H, W, C) into windows (B * windows, size * size, C), zero-padded at the right and bottom."""
    x = pad_to_multiple(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    if is_exporting():  # the other way asks whether the number of rows divides a side, which it cannot prove
        x = x.unfold(1, size, size).unfold(2, size, size).permute(0, 1, 2, 4, 5, 3)
    else:
        x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.contiguous().flatten(0, 2).flatten(1, 2)  # (B, rows, columns, size, size, C) -> windows


def window_unpartition(windows: Tensor, size: int, batch: int, height: int, width: int) -> Tensor:
    """Puts windows (B * windows, size * size, C) back into a map (B, height, width, C)."""
    x = windows.unflatten(1, (size, size)).unflatten(0, (batch, ceil_div(height, size), ceil_div(width, size)))
    x = x.transpose(2, 3).contiguous().flatten(3, 4).flatten(1, 2)  # (B, rows * size, columns * size, C)
    return crop_to(x.permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)
