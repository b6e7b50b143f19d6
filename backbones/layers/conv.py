"""Convolutions with their norm and activation, in as few passes over memory as autograd allows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import activate
from .cache import TableCache
from .linear import linear


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, activation: (B, in_chans, H, W) -> (B, out_chans, ceil(H / stride), ceil(W / stride)).

    In eval mode without autograd, the norm is folded into the convolution's weight, once.

    Args:
        in_chans, out_chans: widths.
        kernel: side of the kernel, odd.
        stride: pixels per cell of the output.
        groups: as in `nn.Conv2d`.
        act: activation, as `activate` takes it.
        bias: whether the convolution has a bias beside the norm's.
        eps: of the norm.
        same: pad as TensorFlow does, which is asymmetric where the stride is 2.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: str | None = None,
        bias: bool = False,
        eps: float = 1e-5,
        same: bool = False,
    ):
        super().__init__()
        self.act = act
        self.same = same and stride > 1  # at stride 1, both ways to pad are one
        padding = 0 if self.same else kernel // 2
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_chans, eps=eps)
        self._folded = TableCache(entries=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad_same(x, self.conv.kernel_size[0], self.conv.stride[0])
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return activate(self.norm(conv2d(x, self.conv)), self.act)
        sources = [*self.parameters(), self.norm.running_mean, self.norm.running_var]
        weight, bias = self._folded.get((), sources, self.fold)
        return activate(conv2d(x, self.conv, weight, bias), self.act)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that does both."""
        return fold_norm(self.conv, self.norm)


def conv2d(x: Tensor, conv: nn.Conv2d, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """What `conv` makes of (B, C, H, W), or would with another weight and bias; 1x1 kernels run as `linear`."""
    if weight is None:
        weight, bias = conv.weight, conv.bias
    if conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1:
        return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals `conv` and then, in eval mode, `norm`."""
    scale, shift = norm_affine(norm)
    bias = shift if conv.bias is None else shift + conv.bias * scale
    return (conv.weight * scale[:, None, None, None]).to(conv.weight), bias.to(conv.weight)


def fold_norm_before(norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one 1x1 convolution that equals, in eval mode, `norm` and then that of `weight`."""
    scale, shift = norm_affine(norm)
    return (weight * scale[:, None, None]).to(weight), (bias + weight.double().flatten(1) @ shift).to(bias)


def norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by and adds in eval mode, in float64."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def init_conv(module: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out and zero biases, as EfficientNet starts; for `module.apply`."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[:, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zero-pads (B, C, H, W) as TensorFlow's SAME: a kernel above 1 then yields ceil(side / stride) cells.

    The odd zero comes last. Sides grow by `kernel - 1` whatever they are, so that symbolic ones divide provably; what
    is too much at the right and bottom, no kernel reaches.
    """
    top, left = ((kernel - 1 - (side - 1) % stride) // 2 for side in x.shape[-2:])
    return F.pad(x, (left, kernel - 1 - left, top, kernel - 1 - top))
