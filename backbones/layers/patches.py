"""Patches that do not overlap."""

import torch.nn.functional as F
from torch import Tensor, nn

from .padding import pad_to_multiple


def pad_for_patches(x: Tensor, size: int, dilation: int) -> Tensor:
    """Zero-pads (B, C, H, W) at the right and bottom for a kernel of `size` cells a side.

    Args:
        x: a map.
        size: of the kernel, and its stride unless the map stays as fine as it is.
        dilation: of the stage that follows; above 1, the kernel's stride is 1, and its cells lie half of that apart.
    """
    if dilation == 1:
        return pad_to_multiple(x, size)
    reach = (size - 1) * (dilation // 2)
    return F.pad(x, (0, reach, 0, reach))


class PatchEmbed(nn.Module):
    """Patches, filled up with zeros at the right and bottom: (B, C, H, W) -> (B, ceil(H / size), ceil(W / size), dim).

    Args:
        in_chans: C.
        dim: width.
        size: side of a patch.
        dilation: above 1, for `output_stride`: there is a patch at each cell, and sides stay; see `pad_for_patches`.
    """

    def __init__(self, in_chans: int, dim: int, size: int, dilation: int = 1):
        super().__init__()
        self.size = size
        self.dilation = dilation
        stride, reach = (size, 1) if dilation == 1 else (1, dilation // 2)
        self.proj = nn.Conv2d(in_chans, dim, size, stride, dilation=reach)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_for_patches(x, self.size, self.dilation)).permute(0, 2, 3, 1))
