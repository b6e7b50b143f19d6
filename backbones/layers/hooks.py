"""Hooks on layers of other libraries, which overwrite what other layers have returned."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# What `x += y` and its kin call; Python assigns the result to `x`, whether a tensor was overwritten or not.
_AUGMENTED = {Tensor.add_: torch.add, Tensor.sub_: torch.sub, Tensor.mul_: torch.mul, Tensor.div_: torch.div}


class OutOfPlace(TorchFunctionMode):
    """Activations with `inplace=True`, and `x += y` on maps and tokens, take fresh memory instead of that of `x`.

    Vectors stay what is overwritten: they are running statistics and counters, and nobody uses what that returns.
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
        if function in _AUGMENTED and args[0].ndim > 1 and args[0].is_floating_point():
            return _AUGMENTED[function](*args, **kwargs).to(args[0].dtype)
        return function(*args, **kwargs)


def hooks_kept(model: nn.Module) -> AbstractContextManager:
    """While it lasts, what a forward hook in `model` has seen is not overwritten; costs nothing where there is none."""
    if torch.compiler.is_compiling() or not any(module._forward_hooks for module in model.modules()):
        return nullcontext()
    return OutOfPlace()
