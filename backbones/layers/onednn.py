"""Linear layers and convolutions that run in one pass with their activation, on weights that oneDNN has laid out.

PyTorch's own compiler calls these operators for models that are frozen; they have no autograd and are CPU's alone.
Weights are laid out at their first use, and that is kept for as long as they live: they must not change any more.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .padding import is_exporting

#: What oneDNN calls the activations that `activate` knows: name and algorithm.
ACTIVATIONS = {
    None: ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}

# Sizes that weights are laid out for, always the same ones, so that results do not depend on which image came first.
_ROWS = 1024
_SIDE = 56

#: Whether PyTorch has oneDNN's operators here, and they are the quickest.
HAS_OPERATORS = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere PyTorch picks other libraries itself
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
)
_SUPPORTED = {torch.float32}
if HAS_OPERATORS and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _SUPPORTED.add(torch.bfloat16)


_laid_out = WeakTensorKeyDictionary()


def can_run(x: Tensor, weight: Tensor) -> bool:
    """Whether the functions below take these; tracers see through other operators only."""
    return (
        HAS_OPERATORS
        and not is_exporting()
        and x.dtype is weight.dtype
        and x.dtype in _SUPPORTED
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """The activation of a linear layer, or of the 1x1 convolution of a map (B, H, W, C)."""
    if torch.compiler.is_compiling():
        return _compiled_linear(x, weight, bias, act)
    laid_out = _lay_out(weight, lambda: torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1), _ROWS))
    return product(x, laid_out, bias, act)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None) -> Tensor:
    """`linear` with a weight that is laid out already, or used once."""
    name, algorithm = ACTIVATIONS[act]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def conv(x: Tensor, layer: torch.nn.Conv2d, act: str | None) -> Tensor:
    """The activation of a convolution, unless a compiler looks on, that of a linear layer."""
    if is_linear(layer):
        return linear(x.permute(0, 2, 3, 1), layer.weight, layer.bias, act).permute(0, 3, 1, 2)
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    name, algorithm = ACTIVATIONS[act]
    laid_out = _lay_out(layer.weight, lambda: _lay_out_kernel(layer.weight, layer.in_channels, *geometry))
    return torch.ops.mkldnn._convolution_pointwise(x, laid_out, layer.bias, *geometry, name, [], algorithm)


def is_linear(conv: torch.nn.Conv2d) -> bool:
    """Whether it is a linear layer over channels; for some maps, oneDNN takes ten times as long for a 1x1 kernel."""
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _lay_out(weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """What was made of a weight, unless it is another one by now: `to` changes parameters in place."""
    place = weight.device, weight.dtype
    known, laid_out = _laid_out.get(weight, (None, None))
    if known != place:
        with torch.inference_mode(False), torch.no_grad():
            laid_out = make()
        _laid_out[weight] = place, laid_out
    return laid_out


def _lay_out_kernel(weight: Tensor, in_chans: int, *geometry: Any) -> Tensor:
    dense = weight.detach().contiguous().to_mkldnn()
    padding, stride, dilation, groups = geometry
    size = (1, in_chans, _SIDE, _SIDE)
    return torch._C._nn.mkldnn_reorder_conv2d_weight(dense, padding, stride, dilation, groups, size)


@torch.library.custom_op("backbones::linear", mutates_args=(), device_types="cpu")
def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """`linear`, which compilers do not look into: laid out weights are none of their tensors."""
    return linear(x, weight, bias, act)


@_compiled_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("backbones::product", mutates_args=(), device_types="cpu")
def learning_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight changes, for compilers, which send `F.linear` to MKL: that takes twice as long."""
    return product(x, weight, bias)


@learning_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        learning_linear(grad, weight.t().contiguous(), None) if for_x else None,
        learning_linear(rows.t().contiguous(), x.reshape(-1, x.shape[-1]).t().contiguous(), None)
        if for_weight
        else None,
        rows.sum(0) if for_bias else None,
    )


learning_linear.register_autograd(_backward, setup_context=_keep)
