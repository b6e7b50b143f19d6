"""What callers ask of a backbone, checked: counts, sizes, and which maps."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from .errors import InputError

#: Beyond any camera, and beyond any list of names; what is larger is a mistake that would take all memory.
MOST_CHANNELS, MOST_CLASSES = 10_000, 10_000_000

OutIndices = int | Sequence[int] | None


#: Options of every backbone of which None is the default, as in timm; of `out_indices`, it is all maps.
NONE_IS_DEFAULT = frozenset(
    {
        *("attn_drop_rate", "checkpointing", "drop_path_rate", "drop_rate", "features_only", "frozen_stages"),
        *("global_pool", "img_size", "in_chans", "norm_eval", "num_classes", "out_norm", "output_stride"),
        *("pos_drop_rate", "proj_drop_rate"),
    }
)


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those of which None is the default."""
    return {name: value for name, value in options.items() if value is not None or name not in NONE_IS_DEFAULT}


def check_size(name: str, img_size: object) -> None:
    """Raise InputError for what is neither None, a side nor (height, width)."""
    sides = list(img_size) if isinstance(img_size, Sequence) else [img_size, img_size]
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and int(side) >= 1 for side in sides)
    if img_size is not None and not (whole and len(sides) == 2):
        raise InputError(f"{name}: img_size={img_size!r} is no size; give a side in pixels, or (height, width)")


def check_count(name: str, option: str, value: object, least: int, most: int) -> None:
    """Raise InputError for an option that is no integer from `least` to `most`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name}: {option}={value!r} must be an integer")
    if not least <= int(value) <= most:
        bound = f"at least {least}" if value < least else f"at most {most:,}"
        raise InputError(f"{name}: {option}={value} must be {bound}")


def resolve_indices(out_indices: OutIndices, count: int, name: str) -> tuple[int, ...]:
    """Non-negative ascending indices of what the caller asked for."""
    valid = f"valid indices are 0 to {count - 1}, or -{count} to -1, ascending; an int n takes the last n"
    if out_indices is None:
        return tuple(range(count))
    if isinstance(out_indices, Iterable):
        try:
            given = [operator.index(i) for i in out_indices]
        except TypeError:
            raise InputError(f"{name}: out_indices={out_indices!r} are not integers; {valid}") from None
    else:
        try:
            last = operator.index(out_indices)
        except TypeError:
            raise InputError(f"{name}: out_indices={out_indices!r} is no integer; {valid}") from None
        if not 1 <= last <= count:
            raise InputError(f"{name}: out_indices={last} takes the last {last} of {count} maps; {valid}")
        given = list(range(count - last, count))
    if not given or any(not -count <= i < count for i in given):
        raise InputError(f"{name}: out_indices={given} is out of range; {valid}")
    resolved = tuple(i % count for i in given)
    if list(resolved) != sorted(set(resolved)):
        raise InputError(f"{name}: out_indices={given} must ascend without repeats; {valid}")
    return resolved
