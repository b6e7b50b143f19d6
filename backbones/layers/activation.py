"""Activations that cost a CPU no more than they must."""

import torch
import torch.nn.functional as F
from torch import Tensor

# What each activation is where autograd needs its input, and where it does not.
_ACTIVATIONS = {
    "relu": (F.relu, F.relu_),
    "silu": (F.silu, torch.ops.aten.silu_),
}


def activate(x: Tensor, act: str | None) -> Tensor:
    """ "relu", "silu", "gelu", "gelu_tanh" or None of `x`; overwrites `x` where autograd does not need it."""
    if act is None:
        return x
    if act.startswith("gelu"):
        return gelu(x, "tanh" if act == "gelu_tanh" else "none")
    needs_input = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    return _ACTIVATIONS[act][not needs_input](x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU; overwrites `x` where autograd does not need it, because fresh memory costs more than the arithmetic."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return F.gelu(x, approximate=approximate)
    return torch.ops.aten.gelu_(x, approximate=approximate)
