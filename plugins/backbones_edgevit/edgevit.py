"""EdgeViT (Pan et al., https://arxiv.org/abs/2205.03436)."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import (
    Blocks,
    Dropout,
    Layer,
    Mlp,
    PatchEmbed,
    activate,
    attend,
    crop_to,
    fold_norm_before,
    fuse,
    init_linear,
    is_plain,
    residual,
)
from backbones.weights import KeyLayout

OFFICIAL = KeyLayout(
    "official",
    (
        *((rf"^patch_embed{n}\.", f"stages.{n - 1}.embed.") for n in range(1, 5)),
        *((rf"^blocks{n}\.", f"stages.{n - 1}.blocks.") for n in range(1, 5)),
        (r"\.LocalAgg\.norm1\.", ".local_agg.conv1.norm."),
        (r"\.LocalAgg\.conv1\.", ".local_agg.conv1.conv."),
        (r"\.LocalAgg\.norm2\.", ".local_agg.fc1.norm."),
        (r"\.LocalAgg\.mlp\.fc1\.", ".local_agg.fc1.conv."),
        (r"\.LocalAgg\.(mlp\.)?", ".local_agg."),
        (r"\.SelfAttn\.", ".self_attn."),
        (r"\.LocalProp\.", ".local_prop."),
    ),
)


class EdgeViT(Backbone):
    """Four stages of local, then sparse global, residual blocks at strides 4, 8, 16 and 32.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        rates: per stage, the side of the squares of cells of which one attends for all; at 1 all attend, and
            there is no local aggregation.
        mlp_ratio: hidden width of the MLPs over that of the stage.
        **options: those of `backbones.Backbone`.
    """

    stem_pattern = r"^stages\.0\.embed"
    key_layouts = (OFFICIAL,)
    output_strides = (8, 16, 32)

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 240, 384),
        depths: Sequence[int] = (1, 2, 5, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        rates: Sequence[int] = (4, 2, 2, 1),
        mlp_ratio: float = 4.0,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Identity()
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(
                    PatchEmbed(*((dims[i - 1], dims[i], 2) if i else (self.in_chans, dims[0], 4)), dilation),
                    Dropout("pos_drop_rate") if i == 0 else nn.Identity(),
                    [Block(dims[i], heads[i], rates[i], mlp_ratio, drop, dilation) for drop in drop_path[i]],
                )
                for i, dilation in enumerate(self.dilations)
            )
        )
        self.apply(init_linear)

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.stages[0].embed], *([stage] for stage in self.stages)]

    def make_norm(self) -> nn.Module:
        return nn.BatchNorm2d(self.num_features)


class Stage(nn.Module):
    """(B, C_in, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, embed: nn.Module, pos_drop: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.embed = embed
        self.pos_drop = pos_drop
        self.blocks = Blocks(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.pos_drop(self.embed(x)).permute(0, 3, 1, 2))


class Block(nn.Module):
    """Local aggregation where attention is sparse, then attention; on maps (B, C, H, W)."""

    def __init__(self, dim: int, heads: int, rate: int, mlp_ratio: float, drop_path: float, dilation: int):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.local_agg = LocalAggregation(dim, hidden, drop_path, dilation) if rate > 1 else nn.Identity()
        self.self_attn = AttentionBlock(dim, heads, rate, hidden, drop_path, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn(self.local_agg(x))


class LocalAggregation(Layer):
    """A block whose token mixer is a depth-wise 5x5 convolution between two 1x1; on maps (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, drop_path: float, dilation: int):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim)
        self.conv1 = NormConv(dim, dim)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2 * dilation, dilation=dilation, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.act = "gelu"
        self.fc1 = NormConv(dim, hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = Dropout("proj_drop_rate")
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.pos_embed(x), spare=self.fast)
        x = residual(x, self.drop_path(self.conv2(self.attn(self.conv1(x)))), spare=self.fast)
        hidden = self.drop(activate(self.fc1(x), self.act, spare=self.fast))
        return residual(x, self.drop_path(self.drop(self.fc2(hidden))), spare=self.fast)

    def prepare_for_inference(self) -> nn.Module:
        self.fc1, self.act = fuse(self.fc1, self.act)
        return super().prepare_for_inference()


class NormConv(Layer):
    """BatchNorm, then a 1x1 convolution."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_chans)
        self.conv = nn.Conv2d(in_chans, out_chans, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))

    def prepare_for_inference(self) -> nn.Module:
        return fold_norm_before(self.norm, self.conv) or self


class AttentionBlock(Layer):
    """Position encoding by a depth-wise convolution, attention and MLP with residuals; on maps (B, C, H, W)."""

    def __init__(self, dim: int, heads: int, rate: int, hidden: int, drop_path: float, dilation: int):
        super().__init__()
        self.rate = rate
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SparseAttention(dim, heads, rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.pos_embed(x), spare=self.fast).permute(0, 2, 3, 1)  # (B, H, W, C)
        picked = self.norm1(x[:, :: self.rate, :: self.rate])  # those between take no part
        x = residual(x, self.drop_path(self.attn(picked, *x.shape[1:3])), spare=self.fast)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), spare=self.fast).permute(0, 3, 1, 2)


class SparseAttention(Layer):
    """Attention among picked cells (B, ceil(H / rate), ceil(W / rate), C), handed on to all: (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, rate: int):
        super().__init__()
        if dim % heads:
            raise InputError(f"attention: {heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.rate = rate
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = Dropout("attn_drop_rate")
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout("proj_drop_rate")
        if rate > 1:
            self.local_prop = nn.ConvTranspose2d(dim, dim, rate, rate, groups=dim)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).chunk(3, dim=-1)
        y = attend(*qkv, self.heads, fast=self.fast, dropout=self.attn_drop.rate).reshape(x.shape)
        return self.proj_drop(self.proj(self.norm(self.propagate(y, height, width)) if self.rate > 1 else y))

    def propagate(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, h, w, C) -> (B, height, width, C)."""
        x = self.local_prop(x.permute(0, 3, 1, 2))
        return crop_to(x, height, width).permute(0, 2, 3, 1)

    def prepare_for_inference(self) -> nn.Module:
        if self.rate > 1 and is_plain(self.local_prop, nn.ConvTranspose2d):
            self.local_prop = Spread(self.local_prop)
        return super().prepare_for_inference()


class Spread(nn.Module):
    """A depth-wise transposed convolution whose kernels do not overlap: a product per cell and place in the kernel."""

    def __init__(self, conv: nn.ConvTranspose2d):
        super().__init__()
        self.weight = nn.Parameter(conv.weight.permute(2, 1, 3, 0).contiguous())  # (rate, 1, rate, C)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = torch.addcmul(self.bias, x[:, :, None, :, None], self.weight)  # (B, h, rate, w, rate, C)
        return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
