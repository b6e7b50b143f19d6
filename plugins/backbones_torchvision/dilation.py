"""`output_stride`: the last strides of a model of torchvision left out, and what follows them dilated.

By the rule of torchvision's own `replace_stride_with_dilation`: a layer that has lost its stride sees cells as far
apart as the layers before it, and those after it twice as far, so that each weight meets the same places as before.
Windows of Swin hold as many more cells instead.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)

from backbones.layers import pad_for_patches
from backbones.layers.relative_position import by_cell


class Pad(nn.Module):
    """Zero-pads (B, C, H, W) at the right and bottom to what the kernel of the next layer divides."""

    def __init__(self, multiple: int):
        super().__init__()
        self.multiple = multiple
        self.dilation = 1

    def forward(self, x: Tensor) -> Tensor:
        return pad_for_patches(x, self.multiple, self.dilation)


def keep_resolution(stages: Sequence[Sequence[nn.Module]], dilations: Sequence[int]) -> list[list[nn.Module]]:
    """Stages whose maps are as fine as the last before those with a dilation above 1; their layers are changed.

    Args:
        stages: modules of each stage.
        dilations: per stage, how much closer cells lie then.
    """
    kept = []
    for stage, dilation in zip(stages, dilations, strict=True):
        layers = nn.ModuleList(stage)
        if dilation > 1:
            for name, module in [*layers.named_modules()]:
                change = next((_CHANGES[kind] for kind in type(module).__mro__ if kind in _CHANGES), None)
                if change and (new := change(module, dilation)) is not None:
                    layers.set_submodule(name, new)
        kept.append([*layers])
    return kept


def _change_conv(conv: nn.Conv2d, dilation: int) -> None:
    reach = dilation if conv.stride == (1, 1) else dilation // 2
    conv.stride = (1, 1)
    conv.dilation = tuple(reach if side > 1 else 1 for side in conv.kernel_size)
    conv.padding = tuple(reach * side for side in conv.padding)


def _change_pad(pad: Pad, dilation: int) -> None:
    pad.dilation = dilation


def _change_pool(pool: nn.MaxPool2d, dilation: int) -> nn.Module:
    return MaxPool(pool.kernel_size, pool.padding, dilation if pool.stride == 1 else dilation // 2)


def _change_mean(pool: nn.AvgPool2d, dilation: int) -> nn.Module:
    return Mean(dilation // 2)


def _change_merging(merging: nn.Module, dilation: int) -> None:
    merging.dilation = dilation
    merging.__class__ = DenseMergingV2 if isinstance(merging, PatchMergingV2) else DenseMerging


def _change_windows(attention: ShiftedWindowAttention, dilation: int) -> None:
    attention.dilation = dilation
    attention.window_size = [dilation * side for side in attention.window_size]
    attention.shift_size = [dilation * side for side in attention.shift_size]
    attention.__class__ = WideWindowsV2 if isinstance(attention, ShiftedWindowAttentionV2) else WideWindows


_CHANGES: dict[type[nn.Module], Callable[..., nn.Module | None]] = {
    nn.Conv2d: _change_conv,
    Pad: _change_pad,
    nn.MaxPool2d: _change_pool,
    nn.AvgPool2d: _change_mean,
    PatchMerging: _change_merging,
    PatchMergingV2: _change_merging,
    ShiftedWindowAttention: _change_windows,
}


class MaxPool(nn.Module):
    """Max-pooling of stride 1 over cells that lie `reach` apart, each kernel where that of the strided one began."""

    def __init__(self, kernel: int, padding: int, reach: int):
        super().__init__()
        self.kernel = kernel
        self.before = reach * padding
        self.after = reach * (kernel - 1 - padding)
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.before, self.after) * 2, value=-torch.inf)
        return F.max_pool2d(x, self.kernel, 1, 0, self.reach)


class Mean(nn.Module):
    """The mean of each cell and of those `reach` to the right, below and both; at the edges, of the last ones."""

    def __init__(self, reach: int):
        super().__init__()
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        for dim, pad in ((-2, (0, 0, 0, self.reach)), (-1, (0, self.reach, 0, 0))):
            side = x.shape[dim]
            padded = F.pad(x, pad, mode="replicate")
            x = (x + padded.narrow(dim, self.reach, side)) / 2
        return x


def _squares(x: Tensor, dilation: int) -> Tensor:
    """For each cell of (B, H, W, C), the four of the square that it begins: (B, H, W, 4 * C)."""
    height, width = x.shape[1:3]
    reach = dilation // 2
    x = F.pad(x, (0, 0, 0, reach, 0, reach))
    starts = [(row, column) for column in (0, reach) for row in (0, reach)]
    return torch.cat([x[:, row : row + height, column : column + width] for row, column in starts], dim=-1)


class DenseMerging(PatchMerging):
    """Patch merging that leaves a map as fine as it is."""

    dilation: int

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(_squares(x, self.dilation)))


class DenseMergingV2(PatchMergingV2):
    """The same, for Swin V2."""

    dilation: int

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(_squares(x, self.dilation)))


class WideWindows(ShiftedWindowAttention):
    """Windows of more cells that lie closer; their table of biases is resized."""

    dilation: int

    def get_relative_position_bias(self) -> Tensor:
        rows, columns = (2 * side // self.dilation - 1 for side in self.window_size)
        table = self.relative_position_bias_table.t().unflatten(1, (rows, columns))
        size = [2 * side - 1 for side in self.window_size]
        return by_cell(F.interpolate(table[None].float(), size=size, mode="bicubic")[0].to(table.dtype))


class WideWindowsV2(ShiftedWindowAttentionV2):
    """The same, for Swin V2, whose MLP says biases of any offset."""

    dilation: int

    def get_relative_position_bias(self) -> Tensor:
        like = self.relative_coords_table
        sides = [
            torch.arange(1 - side, side, device=like.device) * (8 / (side - self.dilation)) for side in self.window_size
        ]
        offsets = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).to(like.dtype)
        offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
        return 16 * by_cell(self.cpb_mlp(offsets).permute(2, 0, 1)).sigmoid()
