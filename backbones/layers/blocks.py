"""Residual blocks and how they run in turn."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .activation import may_overwrite
from .checkpointing import checkpoint


def run_blocks(blocks: Iterable[nn.Module], x: Any, *args: Any, checkpointing: bool = False, **kwargs: Any) -> Any:
    """Blocks in turn, `x` through each; with `checkpointing`, activations are recomputed in the backward pass.

    Args:
        blocks: called as `block(x, *args, **kwargs)`.
        x: what the first block takes.
        *args, **kwargs: what every block takes beside it, such as a mask, or a table of rotations.
        checkpointing: see above.
    """
    for block in blocks:
        recompute = checkpointing and torch.is_grad_enabled()
        x = checkpoint(block, x, *args, **kwargs) if recompute else block(x, *args, **kwargs)
    return x


class Blocks(nn.Sequential):
    """Blocks that run in turn, with activation checkpointing, which a `Backbone` that holds them turns on and off.

        self.blocks = Blocks(*(Block(dim, heads, rate) for rate in self.drop_path_rates([depth])[0]))
        x = self.blocks(x, rope)        # each is called as block(x, rope)
        x = self.blocks[:6](x, rope)    # the first six, say for a map of their own

    Called as `run_blocks` has it. A slice shares the blocks, and has the mode and the checkpointing of the whole.
    """

    checkpointing = False

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return run_blocks(self, x, *args, checkpointing=self.checkpointing and self.training, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            found.training, found.checkpointing = self.training, self.checkpointing
        return found


def residual(x: Tensor, update: Tensor, scale: Tensor | None = None, spare: bool = False) -> Tensor:
    """`x + scale * update`.

    Args:
        x: (..., C).
        update: (..., C).
        scale: (C,), a layer scale; None for 1.
        spare: nobody else reads `update`, so that it may be overwritten; for models of `for_inference` alone.
    """
    if spare and update is not x and update.dtype == x.dtype and may_overwrite(x, update, scale):
        return update.add_(x) if scale is None else torch.addcmul(x, update, scale, out=update)
    return x + update if scale is None else torch.addcmul(x, update, scale)
