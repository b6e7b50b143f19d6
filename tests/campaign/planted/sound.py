"""A small backbone that keeps every promise, of parts that are easily replaced."""

from collections import OrderedDict

from timm.layers import DropPath
from torch import nn

from backbones import Backbone
from backbones.layers import Blocks


class Block(nn.Module):
    """A residual block."""

    def __init__(self, dim, rate):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm = self.make_norm(dim)
        self.drop_path = self.make_drop_path(rate)

    make_norm = nn.BatchNorm2d
    make_drop_path = DropPath

    def forward(self, x):
        return x + self.drop_path(self.update(x))

    def update(self, x):
        return self.norm(self.conv(x)).relu()


class Sound(Backbone):
    """Three stages of blocks; what breaks a promise overrides one of its parts."""

    size_divisor = 16
    block = Block

    def __init__(self, dims=(8, 12, 16), depths=(1, 2, 2), **options):
        super().__init__(channels=dims, strides=(4, 8, 16), **options)
        self.stem = nn.Sequential(nn.Conv2d(self.in_chans, dims[0], 2, 2), nn.BatchNorm2d(dims[0]))
        widths = zip((dims[0], *dims), dims, self.rates(depths), strict=False)
        self.stages = nn.ModuleList(self.wanted(self.stage(*width) for width in widths))

    def rates(self, depths):
        return self.drop_path_rates(depths)

    def stage(self, in_dim, dim, rates):
        blocks = Blocks(*(self.block(dim, rate) for rate in rates))
        return nn.Sequential(OrderedDict(down=nn.Conv2d(in_dim, dim, 2, 2), blocks=blocks))


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, Block)]
