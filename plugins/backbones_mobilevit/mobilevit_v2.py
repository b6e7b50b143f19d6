"""MobileViTv2 (Mehta and Rastegari, https://arxiv.org/abs/2206.02680)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, make_divisible
from torch import Tensor, nn

from backbones.layers import (
    ConvNorm,
    Dropout,
    FastConv,
    FastLinear,
    Layer,
    TableCache,
    activate,
    fuse,
    is_plain,
    may_overwrite,
    residual,
)

from .common import MobileTrunk, check_patch_size, covered, from_patches, resize, to_patches


class MobileViTv2(MobileTrunk):
    """Inverted residuals at strides 4 to 32, with attention that is linear in pixels from stride 8 on.

    The official code resizes odd maps to even sides and leaves them so; here they are resized back, so that maps are
    ceil(H / stride) x ceil(W / stride). Where 64 divides the sides of the image, the two are one.

    Args:
        width: all widths over those of `mobilevitv2_100`.
        depths: transformers in each of the last three stages.
        mlp_ratio: hidden width of a transformer's MLP over its width.
        expand_ratio: width inside an inverted residual over its input's.
        patch_size: side, in cells, of the patches that transformers attend across.
        **options: those of `backbones.Backbone`.
    """

    def __init__(
        self,
        width: float = 1.0,
        depths: tuple[int, int, int] = (2, 4, 3),
        mlp_ratio: float = 2.0,
        expand_ratio: float = 2.0,
        patch_size: int = 2,
        **options: Any,
    ):
        check_patch_size(patch_size)
        stem, first, *dims = (make_divisible(width * dim) for dim in (32, 64, 128, 256, 384, 512))

        def block(i: int, dim: int, depth: int, drop_path: float, dilation: int) -> nn.Module:
            return MobileViTv2Block(dim, depth, mlp_ratio, drop_path, dilation, patch_size)

        super().__init__(block, (stem, first), dims, 2, depths, expand_ratio, **options)


class MobileViTv2Block(nn.Module):
    """A depth-wise convolution and transformers of half the width: (B, dim, H, W)."""

    def __init__(self, dim: int, depth: int, mlp_ratio: float, drop_path: float, dilation: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        attn_dim = make_divisible(dim / 2)
        self.local = ConvNorm(dim, dim, groups=dim, act="silu", dilation=dilation)
        self.embed = nn.Conv2d(dim, attn_dim, kernel_size=1, bias=False)
        self.transformer = nn.Sequential(
            *(Transformer(attn_dim, mlp_ratio, drop_path, patch_size) for _ in range(depth))
        )
        self.norm = nn.GroupNorm(1, attn_dim)
        self.project = ConvNorm(attn_dim, dim, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = resize(x, *(covered(side, self.patch_size) for side in (height, width)), align_corners=True)
        x = self.norm(self.transformer(self.embed(self.local(x))))
        # Interpolation and 1x1 convolution commute; the map is narrower before.
        return self.project(resize(x, height, width, align_corners=True))


class Transformer(Layer):
    """Separable attention and MLP with residuals, on maps (B, C, H, W) of sides that patches cover."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, patch_size: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.attn = SeparableAttention(dim, patch_size)
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.attn(self.norm1(x))), spare=self.fast)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), spare=self.fast)


class SeparableAttention(nn.Module):
    """Attention with one learned query: each place in the patches has one context, which gates the values."""

    def __init__(self, dim: int, patch_size: int = 2):
        super().__init__()
        self.patch_size = patch_size
        self.qkv_proj = nn.Conv2d(dim, 1 + 2 * dim, kernel_size=1)
        self.attn_drop = Dropout("attn_drop_rate")
        self.out_proj = nn.Conv2d(dim, dim, kernel_size=1)
        self.proj_drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[1]
        qkv = to_patches(self.qkv_proj(x).permute(0, 2, 3, 1), self.patch_size)  # (B, rows, 2, columns, 2, 1 + 2 * C)
        query, key, value = qkv.split((1, dim, dim), dim=-1)
        scores = query.transpose(2, 3).flatten(1, 2).softmax(1)  # over the patches: (B, rows * columns, 2, 2, 1)
        scores = scores.unflatten(1, (qkv.shape[1], qkv.shape[3])).transpose(2, 3)
        context = (key * self.attn_drop(scores)).sum((1, 3), keepdim=True)
        gated = from_patches(F.relu(value) * context)
        return self.proj_drop(self.out_proj(gated.permute(0, 3, 1, 2)))

    def prepare_for_inference(self) -> nn.Module:
        return FastSeparableAttention(self) if is_plain(self.qkv_proj, nn.Conv2d) else self


class FastSeparableAttention(Layer):
    """The same with keys for one sum per place, not for every pixel.

    The scores of a place sum to 1 over the patches, so that its context, the weighted sum of keys, is the key of the
    weighted sum of pixels.
    """

    def __init__(self, layer: SeparableAttention):
        super().__init__()
        weight, bias = layer.qkv_proj.weight.flatten(1), layer.qkv_proj.bias
        dim = weight.shape[1]
        self.query = nn.Parameter(weight[0].clone())  # its bias shifts all scores alike
        self.key, self.value = FastLinear.of(nn.Linear(dim, dim)), FastConv.of(nn.Conv2d(dim, dim, 1), "relu")
        for part, start in ((self.key, 1), (self.value, 1 + dim)):
            part.weight = nn.Parameter(weight[start : start + dim].clone().reshape(part.weight.shape))
            part.bias = nn.Parameter(bias[start : start + dim].clone())
        self.out_proj = layer.out_proj
        self.patch_size = layer.patch_size
        self._places = TableCache(entries=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        size = self.patch_size
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        key = (height, width, x.device, x.dtype)
        # (B, H W) -> (B, size * size, H W): in each row, scores of one place over the patches, and zeros elsewhere
        scores = (tokens @ self.query)[:, None] + self._places.get(key, lambda: places(*key, size))
        context = self.key(scores.softmax(-1) @ tokens)  # (B, size * size, C)
        value = to_patches(self.value(x).permute(0, 2, 3, 1), size)
        context = context.reshape(batch, 1, size, 1, size, dim)
        gated = from_patches(value.mul_(context) if may_overwrite(value, context) else value * context)
        return self.out_proj(gated.permute(0, 3, 1, 2))


def places(height: int, width: int, device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """(size * size, H W): 0 where a pixel has the row's place in its patch, -inf elsewhere."""
    rows, columns = (torch.arange(side, device=device) % size for side in (height, width))
    place = (size * rows[:, None] + columns).flatten()
    elsewhere = place != torch.arange(size * size, device=device)[:, None]
    return torch.zeros(elsewhere.shape, device=device, dtype=dtype).masked_fill_(elsewhere, float("-inf"))


class Mlp(Layer):
    """1x1 convolution, SiLU, 1x1 convolution."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.act = "silu"
        self.fc1 = nn.Conv2d(dim, hidden, kernel_size=1)
        self.fc2 = nn.Conv2d(hidden, dim, kernel_size=1)
        self.drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(activate(self.fc1(x), self.act, spare=self.fast)))

    def prepare_for_inference(self) -> nn.Module:
        self.fc1, self.act = fuse(self.fc1, self.act)
        return super().prepare_for_inference()
