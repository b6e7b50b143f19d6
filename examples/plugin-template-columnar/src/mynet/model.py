"""MyNet: a plain transformer over patches of 16 pixels, with rotary positions, and a pyramid made of its last map."""

from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones import Backbone, Blocks, InputError, Pyramid
from backbones.layers import Attention, Mlp, residual, scaled_attention

PATCH, STRIDES = 16, (4, 8, 16, 32)


class MyNet(Backbone):
    """One width and one stride from the first block to the last; `Pyramid` makes strides 4, 8, 16 and 32 of it.

    Args:
        dim: width.
        depth: number of blocks.
        heads: attention heads per block; `dim` is a multiple of 4 times this.
        **options: those of `backbones.Backbone`.
    """

    size_divisor = PATCH
    stem_pattern = r"^patch_embed"
    block_pattern = r"^blocks\.(\d+)"
    new_parts = (*Backbone.new_parts, "pyramid")  # a published classifier has none

    def __init__(self, dim: int = 192, depth: int = 4, heads: int = 3, **options: Any):
        super().__init__(channels=Pyramid.channels(dim, PATCH, STRIDES), strides=STRIDES, **options)
        if dim % (4 * heads):
            raise InputError(f"MyNet: dim={dim} must be a multiple of 4 * heads={4 * heads}")
        self.patch_embed = nn.Conv2d(self.in_chans, dim, PATCH, PATCH)
        self.blocks = Blocks(*(Block(dim, heads, rate) for rate in self.drop_path_rates([depth])[0]))
        self.last_norm = nn.LayerNorm(dim)
        if self.features_only:
            self.pyramid = Pyramid(dim, PATCH, self.strides)  # the levels that `out_indices` asks for

    def forward_features(self, images: Tensor) -> dict[int, Tensor] | Tensor:
        """Maps by index; of a classifier, the last map."""
        x = self.patch_embed(self.pad(images))  # (B, dim, h, w)
        height, width = x.shape[-2:]
        rotations = self.blocks[0].attn.rotations(height, width, like=x)
        x = self.blocks(x.flatten(2).mT, rotations)  # (B, h * w, dim); every block is called as block(x, rotations)
        x = self.last_norm(x).mT.unflatten(2, (height, width))
        return dict(zip(self.out_indices, self.pyramid(x), strict=True)) if self.features_only else x

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        """The patches, then the blocks in quarters, for want of stages."""
        ends = [round(len(self.blocks) * n / 4) for n in range(5)]
        return [[self.patch_embed], *([*self.blocks[a:b]] for a, b in pairwise(ends))]


class Block(nn.Module):
    """Attention among all patches, then an MLP on each, (B, N, dim)."""

    def __init__(self, dim: int, heads: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = RotaryAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
        x = residual(x, self.drop_path(self.attn(self.norm1(x), rotations)))
        return residual(x, self.drop_path(self.mlp(self.norm2(x))))


class RotaryAttention(Attention):
    """Queries and keys are turned by the row and column they stand in (RoFormer, https://arxiv.org/abs/2104.09864)."""

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        q, k = _rotate(q, *rotations), _rotate(k, *rotations)
        x = scaled_attention(q, k, v, fast=self.fast, dropout=self.attn_drop.rate)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def rotations(self, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (N, d / 2) each, of what a patch's pairs of channels are turned by."""
        d = self.qkv.in_features // self.heads
        rates = 100.0 ** -torch.arange(0, 1, 4 / d, device=like.device)
        rows, columns = (torch.arange(n, device=like.device)[:, None] * rates for n in (height, width))
        grid = (height, width, -1)
        angles = torch.cat((rows[:, None].expand(grid), columns[None].expand(grid)), -1).flatten(0, 1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
