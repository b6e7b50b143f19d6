"""From maps of one stride to a pyramid: how a plain ViT serves dense heads."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .layers import ceil_div, layer_norm_2d, pad_to_multiple


class Pyramid(nn.Module):
    """Brings maps of one stride to several strides, one level each.

    A level finer than its map is up-sampled by 2x2 transposed convolutions, a coarser one by max-pooling;
    where the strides' ratio is no power of two, the nearest power is followed by bilinear interpolation.

    With `halve`, each up-sampling halves the width and LayerNorms stand between: the simple pyramid of
    ViTDet (Li et al., https://arxiv.org/abs/2203.16527). Without, widths stay and BatchNorms stand between,
    as in the dense-prediction code of BEiT.

        channels = Pyramid.channels(dim, 16, (4, 8, 16, 32))    # what a Backbone declares
        self.pyramid = Pyramid(dim, 16, self.strides)           # the levels that `out_indices` asks for
        return dict(zip(self.out_indices, self.pyramid(last_map)))

    Args:
        dim: width of the maps.
        stride: pixels per cell of the maps.
        out_strides: pixels per cell of each level.
        halve: see above.
    """

    def __init__(self, dim: int, stride: int, out_strides: Sequence[int], halve: bool = True):
        super().__init__()
        self.stride = stride
        self.out_strides = tuple(out_strides)
        # Named by stride, so that a pyramid of some levels takes the weights of one of all.
        self.levels = nn.ModuleDict({str(s): _level(dim, _doublings(stride, s), halve) for s in out_strides})

    @staticmethod
    def channels(dim: int, stride: int, out_strides: Sequence[int], halve: bool = True) -> tuple[int, ...]:
        """Widths of the levels that a pyramid of these arguments has."""
        return tuple(dim >> max(0, _doublings(stride, s)) if halve else dim for s in out_strides)

    def forward(self, maps: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """One map (B, dim, h, w) for all levels, or one for each, in; one map per level out."""
        if isinstance(maps, Tensor):
            maps = [maps] * len(self.out_strides)
        if len(maps) != len(self.out_strides):
            raise InputError(
                f"a Pyramid of strides {self.out_strides} takes a map for each, or a tensor for all; got {len(maps)}"
            )
        levels = (
            self._exact(self.levels[str(out_stride)](x), x, out_stride)
            for x, out_stride in zip(maps, self.out_strides, strict=True)
        )
        return [level.contiguous(memory_format=torch.channels_last) for level in levels]

    def _exact(self, y: Tensor, x: Tensor, out_stride: int) -> Tensor:
        if self.stride == out_stride * 2.0 ** _doublings(self.stride, out_stride):
            return y
        height, width = (ceil_div(side * self.stride, out_stride) for side in x.shape[-2:])
        return F.interpolate(y, size=(height, width), mode="bilinear")


def _doublings(stride: int, out_stride: int) -> int:
    """How often to double a map's sides to come nearest to the stride asked for; negative to halve them."""
    return round(math.log2(stride / out_stride))


class _Halve(nn.Module):
    """2x2 max-pooling that keeps the last cell of an odd side."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(pad_to_multiple(x, 2, value=-math.inf), 2)


def _level(dim: int, doublings: int, halve: bool) -> nn.Sequential:
    layers: list[nn.Module] = [_Halve() for _ in range(-doublings)]
    for step in range(doublings):
        width = dim // 2 if halve else dim
        layers.append(nn.ConvTranspose2d(dim, width, kernel_size=2, stride=2))
        if step < doublings - 1:
            layers += [layer_norm_2d(width) if halve else nn.BatchNorm2d(width), nn.GELU()]
        dim = width
    return nn.Sequential(*layers)
