"""MyNet: residual blocks of a depth-wise 7 x 7 convolution and an MLP over the channels, in four stages."""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from backbones import Backbone
from backbones.layers import Blocks, ConvNorm, Mlp, residual


class MyNet(Backbone):
    """A convolutional pyramid at strides 4, 8, 16 and 32.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        **options: those of `backbones.Backbone`.
    """

    def __init__(self, dims: Sequence[int] = (32, 64, 128, 256), depths: Sequence[int] = (1, 1, 2, 1), **options: Any):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        drop_path = self.drop_path_rates(depths)
        self.stem = ConvNorm(self.in_chans, dims[0], stride=2, act="relu")
        # A stage that no map asked for needs is never built: `wanted` takes what it needs of a lazy iterable.
        self.stages = nn.ModuleList(
            self.wanted(Stage(dims[max(i - 1, 0)], dims[i], drop_path[i]) for i in range(len(dims)))
        )


class Stage(nn.Module):
    """(B, in_dim, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, in_dim: int, dim: int, drop_path: Sequence[float]):
        super().__init__()
        self.down = ConvNorm(in_dim, dim, stride=2)
        self.blocks = Blocks(*(Block(dim, rate) for rate in drop_path))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.down(x))


class Block(nn.Module):
    """Mixes cells, then channels, and adds the result to its input."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)  # (B, H, W, C): convolutions hand on channels-last maps, so no copy
        return residual(x, self.drop_path(self.mlp(self.norm(y)).permute(0, 3, 1, 2)))
