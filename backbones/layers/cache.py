"""Tables that depend on parameters and on the size of the map."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class TableCache:
    """Keeps the last few tables computed from parameters, while autograd is off.

    With autograd on, while compiling, and after a parameter has changed, the table is computed anew.
    Copies and pickles of a model start with an empty cache.

    Args:
        entries: how many sizes to keep.
        largest: numbers in the largest tensor to keep, so that huge maps do not fill the memory with their tables.
    """

    def __init__(self, entries: int = 8, largest: int = 2**24):
        self.entries = entries
        self.largest = largest
        self._forget(())

    def get(self, size: Hashable, source: Tensor | Sequence[Tensor], compute: Callable[[], T]) -> T:
        """What was computed for `size`, if the sources are what they were then."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        sources = (source,) if isinstance(source, Tensor) else source
        if [*map(_state, sources)] != self._states or any(
            ref() is not s for ref, s in zip(self._sources, sources, strict=True)
        ):
            self._forget(sources)
        key = (size, torch.is_inference_mode_enabled())
        if key in self._tables:
            return self._tables[key]
        table = compute()
        if not isinstance(table, Tensor) or table.numel() <= self.largest:
            if len(self._tables) >= self.entries:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = table
        return table

    def _forget(self, sources: Sequence[Tensor]) -> None:
        """Start anew, with these sources as they are now."""
        self._tables: dict[Hashable, Any] = {}
        self._states = [*map(_state, sources)]
        self._sources = [*map(weakref.ref, sources)]  # another tensor may come to lie where one was

    def __reduce__(self):
        return TableCache, (self.entries, self.largest)


def _state(source: Tensor) -> Hashable:
    """Changes with the tensor: optimizers and load_state_dict raise the version; `.data =` and `.to()` move it."""
    version = None if source.is_inference() else source._version
    return source.data_ptr(), version, source.dtype, source.device
