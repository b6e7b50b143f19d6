"""Two strided convolutions."""

from torch import nn

from backbones import Backbone


class GoodNet(Backbone):
    def __init__(self, widths, bias=True, **options):
        super().__init__(channels=widths, strides=(4, 8), **options)
        self.stem = nn.Conv2d(self.in_chans, widths[0], 2, 2, bias=bias)
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.stages = nn.ModuleList(self.wanted(nn.Conv2d(a, b, 2, 2) for a, b in pairs))
