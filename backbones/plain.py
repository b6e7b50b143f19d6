"""Values as a JSON file gives them back: what the configuration of a saved model can hold."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any


def json_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that a JSON file can hold, as it gives them back."""
    recorded = {}
    for name, value in options.items():
        with suppress(TypeError):
            recorded[name] = plain(value)
    return recorded


def plain(value: Any) -> Any:
    """A value as a JSON file gives it back; `TypeError` for one that it cannot hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Integral):  # numpy's
        return int(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(v) for v in value]
    raise TypeError(f"JSON holds no {type(value).__name__}")
