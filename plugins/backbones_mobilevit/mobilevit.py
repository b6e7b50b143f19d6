"""MobileViT (Mehta and Rastegari, https://arxiv.org/abs/2110.02178)."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.layers import Attention, ConvNorm, Layer, Mlp, residual

from .common import MobileTrunk, check_patch_size, covered, from_patches, resize, to_patches


class MobileViT(MobileTrunk):
    """Inverted residuals at strides 4 to 32, with transformers across 2 x 2 patches from stride 8 on.

    The 1x1 convolution that widens the last map for the published classifier belongs to the classifier here.

    Args:
        stem_dims: widths of the first convolution and of the inverted residual after it, both at stride 2.
        dims: width of each stage.
        local_depth: inverted residuals of the first stage; the others have one.
        attn_dims: width of the transformers of the last three stages.
        depths: transformers in each of those.
        heads: attention heads of a transformer.
        mlp_ratio: hidden width of a transformer's MLP over its width.
        expand_ratio: width inside an inverted residual over its input's.
        head_dim: width of the classifier's last map.
        patch_size: side, in cells, of the patches that transformers attend across.
        **options: those of `backbones.Backbone`.
    """

    def __init__(
        self,
        stem_dims: tuple[int, int] = (16, 32),
        dims: Sequence[int] = (64, 96, 128, 160),
        local_depth: int = 3,
        attn_dims: Sequence[int] = (144, 192, 240),
        depths: Sequence[int] = (2, 4, 3),
        heads: int = 4,
        mlp_ratio: float = 2.0,
        expand_ratio: float = 4.0,
        head_dim: int = 640,
        patch_size: int = 2,
        **options: Any,
    ):
        check_patch_size(patch_size)

        def block(i: int, dim: int, depth: int, drop_path: float, dilation: int) -> nn.Module:
            return MobileViTBlock(dim, attn_dims[i], depth, heads, mlp_ratio, drop_path, dilation, patch_size)

        super().__init__(block, stem_dims, dims, local_depth, depths, expand_ratio, **options)
        if not self.features_only:
            self.num_features = head_dim

    def make_norm(self) -> nn.Module:
        return ConvNorm(self.out_channels[-1], self.num_features, kernel=1, act="silu")


class MobileViTBlock(nn.Module):
    """A convolution, transformers that see the whole map, and a convolution over that and the input: (B, dim, H, W)."""

    def __init__(
        self,
        dim: int,
        attn_dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float,
        dilation: int,
        patch_size: int,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.local = ConvNorm(dim, dim, act="silu", dilation=dilation)
        self.embed = nn.Conv2d(dim, attn_dim, kernel_size=1, bias=False)
        self.transformer = nn.Sequential(*(Transformer(attn_dim, heads, mlp_ratio, drop_path) for _ in range(depth)))
        self.norm = nn.LayerNorm(attn_dim, eps=1e-5)
        self.project = ConvNorm(attn_dim, dim, kernel=1, act="silu")
        self.fuse = ConvNorm(2 * dim, dim, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        sides = (covered(side, self.patch_size) for side in (height, width))
        y = resize(self.embed(self.local(x)), *sides, align_corners=False)
        # A pixel attends to those of the same place in the other patches; each of the places is a sequence.
        patches = to_patches(y.permute(0, 2, 3, 1), self.patch_size)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, size, size, rows, columns, C)
        tokens = self.norm(self.transformer(patches.flatten(3, 4).flatten(0, 2)))
        patches = tokens.view(patches.shape).permute(0, 3, 1, 4, 2, 5)
        y = from_patches(patches).permute(0, 3, 1, 2)
        y = self.project(resize(y, height, width, align_corners=False))
        return self.fuse(torch.cat((x, y), dim=1))


class Transformer(Layer):
    """Attention and MLP with residuals, on tokens (B, N, C)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act="silu")
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.attn(self.norm1(x))), spare=self.fast)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), spare=self.fast)
