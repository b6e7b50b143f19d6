"""Which of timm's maps each map of the pyramid is made of."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from backbones.pyramid import Pyramid

from .table import Level

STRIDES = (4, 8, 16, 32)


class Source(NamedTuple):
    """Where a map of the pyramid comes from: which of timm's, how wide, at which stride; and what it becomes."""

    index: int
    width: int
    own_stride: int
    stride: int
    channels: int


def sources(levels: Sequence[Level], blocks: int, pyramid: str) -> list[Source]:
    """Of each map of the pyramid, the nearest of timm's maps.

    Args:
        levels: timm's maps of distinct strides.
        blocks: how many of one stride there are; 0 where strides differ.
        pyramid: as in `model.TimmBackbone`.
    """
    if pyramid == "plain":
        return [Source(level.index, level.channels, level.stride, level.stride, level.channels) for level in levels]
    found = []
    for stride, share in zip(STRIDES, (1 / 3, 1 / 2, 2 / 3, 1), strict=True):
        nearest = min(levels, key=lambda level, to=stride: (abs(math.log2(level.stride / to)), -level.stride))
        index = max(1, round(blocks * share)) - 1 if pyramid == "taps" else nearest.index
        (channels,) = Pyramid.channels(nearest.channels, nearest.stride, (stride,), halve=pyramid == "simple")
        found.append(Source(index, nearest.channels, nearest.stride, stride, channels))
    return found
