"""Inverted residual blocks with squeeze-excitation, normed before they expand: MBConv of CoAtNet and MaxViT."""

import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .activation import activate, may_overwrite
from .blocks import residual
from .conv import ConvNorm
from .inference import Layer, fold_norm_before
from .padding import is_exporting


class SqueezeExcite(Layer):
    """Scales each channel of (B, C, H, W) by what the means of all of them say.

    Args:
        chans: C.
        squeezed: channels between the two layers.
        act: activation between them, as `activate` takes it.
    """

    def __init__(self, chans: int, squeezed: int, act: str = "silu"):
        super().__init__()
        self.act = act
        self.fc1 = nn.Conv2d(chans, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, chans, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(activate(self.fc1(x.mean((2, 3), keepdim=True)), self.act)).sigmoid()
        return x.mul_(gate) if self.fast and may_overwrite(x, gate) and gate.dtype == x.dtype else x * gate


class MBConv(Layer):
    """BatchNorm, expanding 1x1, depth-wise 3x3, squeeze-excitation, 1x1, and a residual.

    (B, in_chans, H, W) -> (B, out_chans, ceil(H / stride), ceil(W / stride)).

    Args:
        in_chans, out_chans: widths.
        stride: 1 or 2.
        ratio: expansion.
        expand_output: expand from the output's width; False from the input's.
        se_ratio: channels that squeeze-excitation squeezes to, over the width expanded from the output's or, with
            `expand_output=False`, over the expanded width.
        act: activation after both norms, as `activate` takes it.
        pre_act: whether it follows the first norm too.
        se_act: activation within squeeze-excitation.
        se_early: squeeze and excite before the second norm, not after it.
        stride_mode: "dw" strides in the depth-wise convolution; "pool" averages before the expansion.
        pool: how the shortcut is halved, as `halve` takes it.
        project: give the shortcut a 1x1 where widths are equal too.
        bias: whether the last 1x1 and the shortcut's have a bias.
        eps: of the norms.
        same: pad as TensorFlow does.
        drop_path: stochastic depth.
        dilation: of the depth-wise convolution.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int = 1,
        ratio: int = 4,
        expand_output: bool = True,
        se_ratio: float = 0.25,
        act: str = "gelu",
        pre_act: bool = False,
        se_act: str = "silu",
        se_early: bool = False,
        stride_mode: str = "dw",
        pool: str = "avg",
        project: bool = False,
        bias: bool = True,
        eps: float = 1e-5,
        same: bool = False,
        drop_path: float = 0.0,
        dilation: int = 1,
    ):
        super().__init__()
        hidden = ratio * (out_chans if expand_output else in_chans)
        squeezed = int(se_ratio * (out_chans if expand_output else hidden))
        self.stride = stride
        self.pool = pool
        self.pool_first = stride_mode == "pool" and stride == 2
        self.pre_act = act if pre_act else None
        self.se_early = se_early

        has_projection = in_chans != out_chans or project
        self.shortcut = nn.Conv2d(in_chans, out_chans, 1, bias=bias) if has_projection else None
        self.pre_norm = nn.BatchNorm2d(in_chans, eps=eps)
        self.expand = ConvNorm(in_chans, hidden, 1, act=act, eps=eps)
        dw_stride = 1 if self.pool_first else stride
        self.depthwise = ConvNorm(
            hidden, hidden, 3, dw_stride, hidden, act, eps=eps, same=same, between=se_early, dilation=dilation
        )
        self.se = SqueezeExcite(hidden, squeezed, se_act)
        self.project = nn.Conv2d(hidden, out_chans, 1, bias=bias)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = halve(x, self.pool) if self.stride == 2 else x
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)
        x = activate(self.pre_norm(x), self.pre_act)
        x = self.expand(halve(x, "avg") if self.pool_first else x)
        x = self.depthwise(x, self.se) if self.se_early else self.se(self.depthwise(x))
        return residual(shortcut, self.drop_path(self.project(x)), spare=self.fast)

    def prepare_for_inference(self) -> nn.Module:
        """Without an activation after it, the first norm is folded into the expansion, and both change places with
        averaging."""
        folded = None if self.pre_act else fold_norm_before(self.pre_norm, self.expand.conv)
        if folded is not None:
            self.expand.conv, self.pre_norm = folded, nn.Identity()
        return super().prepare_for_inference()


def halve(x: Tensor, how: str) -> Tensor:
    """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)).

    Args:
        x: a map.
        how: "avg" or "max" over 2 x 2 or 3 x 3 cells, what lies outside the map left out; or "avg3", over 3 x 3
            cells, those outside counted as zeros.
    """
    if how == "max":
        return F.max_pool2d(x, 3, 2, 1)
    if how == "avg3":
        return F.avg_pool2d(x, 3, 2, 1)
    if is_exporting():  # the same mean, without asking whether the last cell is whole: a whole one drops the padding
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2)
    return F.avg_pool2d(x, 2, ceil_mode=True)
