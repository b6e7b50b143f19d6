"""MyNet under the contract of dense-backbones."""

from collections.abc import Sequence
from typing import Any

from backbones import Backbone, wrap

from .net import Net


def mynet(
    dims: Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[int] = (1, 1, 2, 1),
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **options: Any,
) -> Backbone:
    """A network that others have written, as a backbone.

    What the network is built with is given to it; `wrap` does the rest. Maps may be a tensor, a list or a dict, NCHW,
    NHWC or tokens, finest or coarsest first.

    Args:
        dims: width of each map.
        depths: blocks per stage.
        in_chans, drop_path_rate: as of `backbones.Backbone`.
        **options: the others of `backbones.Backbone`; there is no classifier.
    """
    net = Net(dims, depths, in_chans, drop_path_rate)
    return wrap(net, channels=dims, strides=(4, 8, 16, 32), in_chans=in_chans, **options)
