"""Tables that are computed once."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class TableCache:
    """Keeps the last few tables, by whatever they depend on.

    A table that depends on parameters may be kept only where no parameter changes any more, which is in models of
    `for_inference`. While compiling or tracing, a table is computed anew, so that the graph holds how. Copies and
    pickles start with an empty cache, and threads may share one.

    Args:
        entries: how many to keep.
        largest: numbers in the largest tensor to keep, so that huge maps do not fill the memory with their tables.
    """

    def __init__(self, entries: int = 8, largest: int = 2**24):
        self.entries = entries
        self.largest = largest
        self._tables: dict[Hashable, Any] = {}
        self._lock = Lock()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What was computed for `key`."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        with self._lock:
            table = self._tables.get(key)
        if table is not None:
            return table
        with torch.inference_mode(False), torch.no_grad():  # serves autograd later on
            table = compute()
        # A subclass of tensors, such as a fake one, stands for this call alone.
        if any(type(tensor) is not Tensor or tensor.numel() > self.largest for tensor in _tensors(table)):
            return table
        with self._lock:
            while len(self._tables) >= self.entries:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = table
        return table

    def __reduce__(self) -> tuple[Any, ...]:
        return TableCache, (self.entries, self.largest)


def _tensors(table: Any) -> Iterator[Tensor]:
    """Those in a tensor, a tuple or a dataclass."""
    if isinstance(table, Tensor):
        yield table
    parts = (getattr(table, f.name) for f in dataclasses.fields(table)) if dataclasses.is_dataclass(table) else table
    if isinstance(table, tuple) or dataclasses.is_dataclass(table):
        for part in parts:
            yield from _tensors(part)
