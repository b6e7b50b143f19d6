"""Tables that depend on parameters and on the size of the map."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class TableCache:
    """Keeps the last few tables computed from parameters, while autograd is off.

    With autograd on, while compiling, and after a parameter has changed, the table is computed anew.
    Copies and pickles of a model start with an empty cache.
    """

    def __init__(self, entries: int = 8):
        self.entries = entries
        self._tables: dict[Hashable, Any] = {}

    def get(self, size: Hashable, source: Tensor | Sequence[Tensor], compute: Callable[[], T]) -> T:
        """What was computed for `size`, if the sources are what they were then."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        sources = (source,) if isinstance(source, Tensor) else source
        key = (size, torch.is_inference_mode_enabled(), *map(_state, sources))
        if key not in self._tables:
            if len(self._tables) >= self.entries:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = compute()
        return self._tables[key]

    def __reduce__(self):
        return TableCache, (self.entries,)


def _state(source: Tensor) -> Hashable:
    """Changes with the tensor: optimizers and load_state_dict raise the version; `.data =` and `.to()` move it."""
    version = None if source.is_inference() else source._version
    return source.data_ptr(), version, source.dtype, source.device
