"""Convolutions with their norm and activation."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .activation import activate
from .fast import fuse
from .inference import Layer, fold_norm


class ConvNorm(Layer):
    """Convolution, BatchNorm, activation: (B, in_chans, H, W) -> (B, out_chans, ceil(H / stride), ceil(W / stride)).

    Args:
        in_chans, out_chans: widths.
        kernel: side of the kernel, odd.
        stride: pixels per cell of the output.
        groups: as in `nn.Conv2d`.
        act: activation, as `activate` takes it.
        bias: whether the convolution has a bias beside the norm's.
        eps: of the norm.
        same: pad as TensorFlow does, which is asymmetric where the stride is 2.
        between: whether the forward is given a layer that comes between convolution and norm.
        dilation: cells between those that the kernel sees.
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
        between: bool = False,
        dilation: int = 1,
    ):
        super().__init__()
        self.act = act
        self.between = between
        self.kernel = kernel
        self.stride = stride
        self.same = same and stride > 1  # at stride 1, both ways to pad are one
        padding = 0 if self.same else kernel // 2 * dilation
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding, dilation, groups, bias)
        self.norm = nn.BatchNorm2d(out_chans, eps=eps)

    def forward(self, x: Tensor, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        if self.same:
            x = pad_same(x, self.kernel, self.stride)
        x = self.conv(x)
        if between is not None:
            x = between(x)
        return activate(self.norm(x), self.act, spare=self.fast)

    def prepare_for_inference(self) -> nn.Module:
        folded = None if self.between else fold_norm(self.conv, self.norm)
        if folded is not None:
            self.norm = nn.Identity()
            self.conv, self.act = fuse(folded, self.act)
        return super().prepare_for_inference()


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
