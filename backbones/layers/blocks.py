"""Sequences of residual blocks."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Blocks(nn.Sequential):
    """Blocks in turn; with `checkpointing`, each one's activations are recomputed in the backward pass."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


def residual(x: Tensor, update: Tensor) -> Tensor:
    """`x + update`; overwrites `update`, which the caller gives up, where autograd does not need it."""
    needs_grad = torch.is_grad_enabled() and (update.requires_grad or x.requires_grad)
    if torch.compiler.is_compiling() or needs_grad or update.dtype != x.dtype:
        return x + update
    return update.add_(x)
