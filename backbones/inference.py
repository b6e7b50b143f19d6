"""A copy of a model that predicts faster, because it does what an honest module may not."""

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .compiling import compile_blocks
from .errors import InputError
from .layers import FastConv, FastLinear, fold_sequence, is_plain, release_statistics

M = TypeVar("M", bound=nn.Module)


def for_inference(model: M, dtype: torch.dtype | None = None, compile: bool = False) -> M:
    """A copy of a backbone or task model that is faster and cannot be trained; the model is left as it was.

    The copy folds batch norms into convolutions, lays weights out channels-last, keeps tables that depend on
    parameters, overwrites activations, and runs linear layers by the kernel that is fastest here. It takes and
    returns what the model does, in eval mode and for images of any size; threads may share it. A layer takes part by a
    method `prepare_for_inference` (see `backbones.layers.Layer`); what has none is left as it is.

    Args:
        model: a `Backbone`, or any module that holds some.
        dtype: float32 as the model has it, unless given; `torch.bfloat16` or `torch.float16` for weights and
            activations. Of models that return boxes, what yields their maps runs in it, and the rest in float32.
        compile: compile block by block, with dynamic sizes; the first images take minutes.

    Returns:
        A model of a subclass of the model's class, in eval mode.

    Raises:
        InputError: a dtype of another kind; later, `train()` of the copy.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"for_inference: dtype={dtype} is not supported; choose torch.bfloat16 or torch.float16")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    release_statistics(fast)
    with torch.no_grad():
        fast = _replace(fast, {})
        _replace_convolutions(fast)
        fast.eval().requires_grad_(False)
        fast.to(memory_format=torch.channels_last)
    parts = list(_low_precision_parts(fast)) if dtype in (torch.bfloat16, torch.float16) else []
    for part in parts:
        part.to(dtype)
    for part in [*parts, *(() if fast in parts else (fast,))]:
        part.__class__ = _predicting(type(part))
    for part in parts:
        part.inference_dtype = dtype
    if compile:
        compile_blocks(fast)
    return fast


class Predicting:
    """What models of `for_inference` have before their own class: no training, and casts at the border."""

    inference_dtype: torch.dtype | None = None

    def train(self, mode: bool = True) -> nn.Module:
        """Only eval mode is left.

        Raises:
            InputError: training mode was asked for.
        """
        if mode:
            raise InputError(
                f"this {type(self).__name__} was made by backbones.for_inference and cannot be trained: its norms are "
                "folded, and activations overwritten; train the model that it was made from"
            )
        return super().train(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the model's own forward returns, in the dtype of the images."""
        if self.inference_dtype is not None:
            given = _dtype(inputs)
            inputs, options = _cast(inputs, self.inference_dtype), _cast(options, self.inference_dtype)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.no_grad():
                outputs = super().forward(*inputs, **options)
        else:
            outputs = super().forward(*inputs, **options)
        return outputs if self.inference_dtype is None or given is None else _cast(outputs, given)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)  # pickles find no class that was made at run time
        return _restore, (type(self).__mro__[2],), *rest


@functools.cache
def _predicting(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of models of `for_inference` that were of class `cls`."""
    if issubclass(cls, Predicting):
        return cls
    return types.new_class(cls.__name__, (Predicting, cls), {}, lambda body: body.update(__module__=cls.__module__))


def _restore(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(_predicting(cls))


def _replace(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """What takes the place of a module, whose own parts have been replaced first."""
    if module in done:
        return done[module]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _replace(child, done)
    replacement = module
    if callable(getattr(type(module), "prepare_for_inference", None)):
        replacement = module.prepare_for_inference()
    elif is_plain(module, nn.Linear):  # PyTorch's own layers have no method to say it by
        replacement = FastLinear.of(module)
    elif isinstance(module, nn.Sequential) and is_plain(module):  # subclasses, too: Conv2dNormActivation, Conv2dReLU
        replacement = fold_sequence(module)
    done[module] = replacement
    return replacement


def _replace_convolutions(model: nn.Module) -> None:
    """Does so once layers have said what belongs to a convolution."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and is_plain(child, nn.Conv2d):
                module._modules[name] = FastConv.of(child)


def _low_precision_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that say, by `low_precision`, that they take and return maps or logits, not boxes."""
    if getattr(module, "low_precision", False):
        yield module
        return
    for child in module.children():
        yield from _low_precision_parts(child)


def _dtype(values: Any) -> torch.dtype | None:
    """That of the first tensor of floats."""
    if isinstance(values, Tensor):
        return values.dtype if values.is_floating_point() else None
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return None
    return next((dtype for dtype in map(_dtype, values) if dtype is not None), None)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """The same, tensors of floats in another dtype."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, Mapping):
        return type(values)((key, _cast(value, dtype)) for key, value in values.items())
    if isinstance(values, (list, tuple)):
        return type(values)(_cast(value, dtype) for value in values)
    return values
