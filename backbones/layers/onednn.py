"""Linear layers and convolutions that run in one pass with their activation, on weights that oneDNN has laid out.

PyTorch's own compiler calls these operators for models that are frozen; they have no autograd and are CPU's alone.
"""

import torch
from torch import Tensor

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

_HAS_OPERATORS = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere PyTorch picks other libraries itself
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
)
_SUPPORTED = {torch.float32}
if _HAS_OPERATORS and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _SUPPORTED.add(torch.bfloat16)


def can_run(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` and `conv` below take these; tracers and compilers see through other operators only."""
    return (
        _HAS_OPERATORS
        and not torch.compiler.is_compiling()
        and x.dtype is weight.dtype
        and x.dtype in _SUPPORTED
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def pack_linear(weight: Tensor) -> Tensor:
    """A weight as `linear` takes it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """The activation of a linear layer."""
    name, algorithm = ACTIVATIONS[act]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def pack_conv(conv: torch.nn.Conv2d) -> Tensor:
    """A convolution's weight as `conv` takes it."""
    if _is_linear(conv):
        return pack_linear(conv.weight.flatten(1))
    size = (1, conv.in_channels, _SIDE, _SIDE)
    return torch._C._nn.mkldnn_reorder_conv2d_weight(
        conv.weight.detach().contiguous().to_mkldnn(), conv.padding, conv.stride, conv.dilation, conv.groups, size
    )


def _is_linear(conv: torch.nn.Conv2d) -> bool:
    """Whether it is a linear layer over channels; for some maps, oneDNN takes ten times as long for a 1x1 kernel."""
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def conv(x: Tensor, layer: torch.nn.Conv2d, packed: Tensor, act: str | None) -> Tensor:
    """The activation of a convolution."""
    if _is_linear(layer):
        return linear(x.permute(0, 2, 3, 1), packed, layer.bias, act).permute(0, 3, 1, 2)
    name, algorithm = ACTIVATIONS[act]
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups, name, [], algorithm
    )
