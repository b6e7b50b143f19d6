"""Inverted residual blocks with squeeze-excitation, normed before they expand: MBConv of CoAtNet and MaxViT."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .activation import activate
from .blocks import residual
from .cache import TableCache
from .conv import ConvNorm, conv2d, fold_norm_before, norm_affine
from .padding import is_exporting


class SqueezeExcite(nn.Module):
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
        gate = self.gate(x)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or gate.dtype != x.dtype:
            return x * gate
        return x.mul_(gate)  # the caller gives x up

    def gate(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1), between 0 and 1."""
        return self.fc2(activate(self.fc1(x.mean((2, 3), keepdim=True)), self.act)).sigmoid()


class MBConv(nn.Module):
    """BatchNorm, expanding 1x1, depth-wise 3x3, squeeze-excitation, 1x1, and a residual.

    (B, in_chans, H, W) -> (B, out_chans, ceil(H / stride), ceil(W / stride)). In eval mode without autograd, norms
    are folded into convolutions, the first one too unless an activation follows it.

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
        project: give the shortcut a 1x1 where widths are equal too, if it is halved.
        bias: whether the last 1x1 and the shortcut's have a bias.
        eps: of the norms.
        same: pad as TensorFlow does.
        drop_path: stochastic depth.
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
    ):
        super().__init__()
        hidden = ratio * (out_chans if expand_output else in_chans)
        squeezed = int(se_ratio * (out_chans if expand_output else hidden))
        self.stride = stride
        self.pool = pool
        self.pool_first = stride_mode == "pool" and stride == 2
        self.pre_act = act if pre_act else None
        self.se_early = se_early

        has_projection = in_chans != out_chans or (project and stride == 2)
        self.shortcut = nn.Conv2d(in_chans, out_chans, 1, bias=bias) if has_projection else None
        self.pre_norm = nn.BatchNorm2d(in_chans, eps=eps)
        self.expand = ConvNorm(in_chans, hidden, 1, act=act, eps=eps)
        dw_stride = 1 if self.pool_first else stride
        self.depthwise = ConvNorm(hidden, hidden, 3, dw_stride, groups=hidden, act=act, eps=eps, same=same)
        self.se = SqueezeExcite(hidden, squeezed, se_act)
        self.project = nn.Conv2d(hidden, out_chans, 1, bias=bias)
        self.drop_path = DropPath(drop_path)
        self._expansion = TableCache(entries=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = halve(x, self.pool) if self.stride == 2 else x
        if self.shortcut is not None:
            shortcut = conv2d(shortcut, self.shortcut)
        x = self._expand(x)
        x = self._excite_and_norm(self.depthwise.conv(x)) if self.se_early else self.se(self.depthwise(x))
        return residual(shortcut, self.drop_path(conv2d(x, self.project)))

    def _expand(self, x: Tensor) -> Tensor:
        """Norm and expansion: (B, in_chans, H, W) -> (B, hidden, h, w)."""
        if self.pre_act or not self._may_fold():
            x = activate(self.pre_norm(x), self.pre_act)
            return self.expand(halve(x, "avg") if self.pool_first else x)
        sources = [*self.pre_norm.parameters(), *self.expand.parameters(), *self.pre_norm.buffers()]
        sources += self.expand.buffers()
        weight, bias = self._expansion.get((), sources, self._fold_expansion)
        x = halve(x, "avg") if self.pool_first else x  # averaging and scaling channels may change places
        return activate(conv2d(x, self.expand.conv, weight, bias), self.expand.act)

    def _fold_expansion(self) -> tuple[Tensor, Tensor]:
        return fold_norm_before(self.pre_norm, *self.expand.fold())

    def _excite_and_norm(self, x: Tensor) -> Tensor:
        norm = self.depthwise.norm
        gate = self.se.gate(x)
        if not self._may_fold() or gate.dtype != norm.weight.dtype:
            return activate(norm(x * gate), self.depthwise.act)
        scale, shift = (t.to(x.dtype)[:, None, None] for t in norm_affine(norm))
        return activate(torch.addcmul(shift, x, gate * scale, out=x), self.depthwise.act)

    def _may_fold(self) -> bool:
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())


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
