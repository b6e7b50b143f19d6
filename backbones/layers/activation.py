"""Activations and how they run where memory may be overwritten."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What each activation is where its input is still needed, and where it is not.
_ACTIVATIONS = {
    "relu": (F.relu, F.relu_),
    "silu": (F.silu, torch.ops.aten.silu_),
}


def may_overwrite(*tensors: Tensor | None) -> bool:
    """Whether an operation on these may write its result into one that its caller gives up."""
    if torch.compiler.is_compiling():  # a compiler plans memory by itself
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None))


def activate(x: Tensor, act: str | nn.Module | None, spare: bool = False) -> Tensor:
    """ "relu", "silu", "gelu", "gelu_tanh", a module or None of `x`.

    Args:
        x: any shape.
        act: which.
        spare: nobody else reads `x`, so that it may be overwritten: fresh memory costs more than the arithmetic.
            A hook may have seen it, so that this is for models of `for_inference` alone.
    """
    if act is None:
        return x
    if isinstance(act, nn.Module):
        return act(x)
    spare = spare and may_overwrite(x)
    if act.startswith("gelu"):
        approximate = "tanh" if act == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_(x, approximate=approximate) if spare else F.gelu(x, approximate=approximate)
    return _ACTIVATIONS[act][spare](x)
