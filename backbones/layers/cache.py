"""Tables that depend on a parameter and on the size of the map."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class TableCache:
    """Keeps the last few tables computed from a parameter, while autograd is off.

    With autograd on, while compiling, and after the parameter has changed, the table is computed anew.
    Copies and pickles of a model start with an empty cache.
    """

    def __init__(self, entries: int = 8):
        self.entries = entries
        self._tables: dict[Hashable, Tensor] = {}

    def get(self, size: Hashable, source: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The table for `size`, from the cache if `source` is what it was when the table was computed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        # Optimizers and load_state_dict raise the version; `.data =` and `.to()` change the address.
        version = None if source.is_inference() else source._version
        inference = torch.is_inference_mode_enabled()
        key = (size, source.data_ptr(), version, source.dtype, source.device, inference)
        if key not in self._tables:
            if len(self._tables) >= self.entries:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = compute()
        return self._tables[key]

    def __reduce__(self):
        return TableCache, (self.entries,)
