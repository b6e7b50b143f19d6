"""Hooks on layers of other libraries, which overwrite what other layers have returned."""

import dis
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What `x += y` and its kin call; Python assigns the result to `x`, whether a tensor was overwritten or not.
_AUGMENTED = {Tensor.add_: torch.add, Tensor.sub_: torch.sub, Tensor.mul_: torch.mul, Tensor.div_: torch.div}


class OutOfPlace(TorchFunctionMode):
    """Activations with `inplace=True`, and `x += y` on maps and tokens, take fresh memory instead of that of `x`.

    Vectors stay what is overwritten: they are running statistics and counters. So does what `x.add_(y)` is called on:
    whoever wrote that may go on with `x`.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        writes = function in _AUGMENTED and args[0].ndim > 1 and args[0].is_floating_point()
        if writes and _is_augmented(sys._getframe(1)):
            return _AUGMENTED[function](*args, **kwargs).to(args[0].dtype)
        return function(*args, **kwargs)


def _is_augmented(frame: FrameType) -> bool:
    """Whether a frame is at an `x += y`, which rebinds `x`; to PyTorch it is the same as `x.add_(y)`."""
    operation, argument = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
    name = dis.opname[operation]
    # Before Python 3.11 each has an instruction of its own; since then, they are the second half of BINARY_OP's.
    return name.startswith("INPLACE_") or (name == "BINARY_OP" and argument >= 13)


def hooks_kept(model: nn.Module) -> AbstractContextManager[object]:
    """While it lasts, what a forward hook in `model` has seen is not overwritten; costs nothing where there is none."""
    if torch.compiler.is_compiling() or not any(module._forward_hooks for module in model.modules()):
        return nullcontext()
    return OutOfPlace()
