"""Residual blocks and how they run in turn."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .activation import may_overwrite
from .checkpointing import checkpoint


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool = False) -> Tensor:
    """Blocks in turn; with `checkpointing`, each one's activations are recomputed in the backward pass."""
    for block in blocks:
        x = checkpoint(block, x) if checkpointing and torch.is_grad_enabled() else block(x)
    return x


class Blocks(nn.Sequential):
    """`run_blocks` as a module; a `Backbone` sets its `checkpointing`."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(self, x, self.checkpointing and self.training)


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
