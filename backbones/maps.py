"""Whether what an architecture returns are the maps that it declared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import PluginError
from .layers import ceil_div

_CHANNELS_FIRST = "return maps as (B, C, H, W)"


def declared_map(
    features: Any, index: int, levels: Sequence[Any], images: Sequence[int], padded: Sequence[int], name: str
) -> Tensor:
    """The map of one index of what `forward_features` returned, for images of these shapes, as given and as padded.

    Raises:
        PluginError: cropping takes away what padding brought, and would hide another difference; it says which.
    """
    if isinstance(features, Tensor):
        raise PluginError(
            f"{name}: forward_features returned one tensor {tuple(features.shape)}; return a list of maps, finest first"
        )
    try:
        m = features[index]
    except LookupError:
        raise PluginError(
            f"{name}: forward_features returned {len(features)} maps, and map {index} was asked for; return one per "
            f"stride, which are {[level['reduction'] for level in levels]}"
        ) from None
    if not isinstance(m, Tensor):
        raise PluginError(f"{name}: map {index} is a {type(m).__name__}; {_CHANNELS_FIRST}")
    if _is(m.shape, levels[index], images, padded):
        return m
    level = levels[index]
    told = f"{name}: map {index} of images {tuple(images)}, padded to {tuple(padded[-2:])}, is {tuple(m.shape)}, which "
    raise PluginError(told + _difference(m.shape, index, level, levels, images, padded))


def in_one_dtype(maps: list[Tensor]) -> list[Tensor]:
    """Under autocast, where some maps come from layers that keep float32, all in the dtype of the others."""
    device = maps[0].device.type
    if len({m.dtype for m in maps}) == 1 or not torch.is_autocast_enabled(device):
        return maps
    return [m.to(torch.get_autocast_dtype(device)) for m in maps]


def _is(shape: Sequence[int], level: Any, images: Sequence[int], padded: Sequence[int]) -> bool:
    """Whether a shape is that of a level's map, before or after it is cropped."""
    return len(shape) == 4 and shape[1] == level["num_chs"] and _is_grid(shape[2:], level, images, padded)


def _is_grid(sides: Sequence[int], level: Any, images: Sequence[int], padded: Sequence[int]) -> bool:
    stride = level["reduction"]
    rows = zip(sides, images[-2:], padded[-2:], strict=True)
    return all(ceil_div(image, stride) <= side <= ceil_div(pad, stride) for side, image, pad in rows)


def _difference(
    shape: Sequence[int], index: int, level: Any, levels: Sequence[Any], images: Sequence[int], padded: Sequence[int]
) -> str:
    """What a map is instead, and how to mend it."""
    channels, stride = level["num_chs"], level["reduction"]
    if len(shape) == 3:
        return f"is a sequence of tokens; {_CHANNELS_FIRST}, such as tokens.mT.unflatten(2, (height, width))"
    if len(shape) != 4:
        return f"has {len(shape)} dimensions; {_CHANNELS_FIRST}"
    if shape[3] == channels and _is_grid(shape[1:3], level, images, padded):
        return "has its channels last; return them first, as m.permute(0, 3, 1, 2)"
    if shape[1] == channels and _is_grid(shape[:1:-1], level, images, padded):
        return "has height and width exchanged; look for a reshape or a meshgrid that takes width first"
    others = [i for i, other in enumerate(levels) if i != index and _is(shape, other, images, padded)]
    if others:
        return f"is what is declared for map {others[0]}; return maps finest first, one per stride"
    if shape[1] != channels and _is_grid(shape[2:], level, images, padded):
        return f"has {shape[1]} channels, and {channels} are declared; correct `channels`"
    return (
        f"is not stride {stride}; declare the strides that the maps have, or pad what a stage cannot divide "
        "(size_divisor, or backbones.layers.pad_to_multiple)"
    )
