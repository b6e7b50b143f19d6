"""Activations that cost a CPU no more than they must."""

import torch
import torch.nn.functional as F
from torch import Tensor

# What each activation is where autograd needs its input, and where it does not.
_ACTIVATIONS = {
    "relu": (F.relu, F.relu_),
    "silu": (F.silu, torch.ops.aten.silu_),
}


def may_overwrite(*tensors: Tensor | None) -> bool:
    """Whether an operation on these may write its result into one that its caller gives up."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None))


def activate(x: Tensor, act: str | None) -> Tensor:
    """ "relu", "silu", "gelu", "gelu_tanh" or None of `x`; overwrites `x` where autograd does not need it."""
    if act is None:
        return x
    if act.startswith("gelu"):
        return gelu(x, "tanh" if act == "gelu_tanh" else "none")
    return _ACTIVATIONS[act][may_overwrite(x)](x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU; overwrites `x` where autograd does not need it, because fresh memory costs more than the arithmetic."""
    if may_overwrite(x):
        return torch.ops.aten.gelu_(x, approximate=approximate)
    return F.gelu(x, approximate=approximate)
