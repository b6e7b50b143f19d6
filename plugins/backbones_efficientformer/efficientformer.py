"""EfficientFormer (Li et al., https://arxiv.org/abs/2206.01191)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, LayerScale2d
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import (
    POOLS,
    Blocks,
    ConvNorm,
    DistanceBias,
    Dropout,
    Layer,
    Mlp,
    activate,
    fold_norm,
    fuse,
    init_linear,
    is_plain,
    layer_norm_2d,
    over_channels,
    residual,
    scale_outputs,
    scaled_attention,
)
from backbones.weights import KeyLayout

_BIAS = (
    (r"\.attention_biases$", ".bias.table"),
    (r".*\.(attention_bias_idxs|ab)$", ""),  # indices, and biases looked up by them
)
TIMM = KeyLayout(
    "timm", (*((rf"^stem\.{part}{n}\.", f"stem.{n - 1}.{part}.") for part in ("conv", "norm") for n in (1, 2)), *_BIAS)
)
OFFICIAL = KeyLayout(
    "official",
    (
        *((rf"^patch_embed\.{3 * n}\.", f"stem.{n}.conv.") for n in (0, 1)),
        *((rf"^patch_embed\.{3 * n + 1}\.", f"stem.{n}.norm.") for n in (0, 1)),
        # Stages and the down-sampling between them are counted together; norms of the dense code, by stage.
        *((rf"^network\.{2 * n}\.", f"stages.{n}.blocks.") for n in range(4)),
        *((rf"^network\.{2 * n - 1}\.proj\.", f"stages.{n}.downsample.conv.") for n in (1, 2, 3)),
        *((rf"^network\.{2 * n - 1}\.norm\.", f"stages.{n}.downsample.norm.") for n in (1, 2, 3)),
        *((rf"^norm{2 * n}\.", f"out_norms.{n}.") for n in range(4)),
        (r"\.layer_scale_([12])$", r".ls\1.gamma"),
        (r"^dist_head\.", "head_dist."),
        *_BIAS,
    ),
)


class EfficientFormer(Backbone):
    """Four stages of pooling blocks at strides 4, 8, 16 and 32, the last of which ends in attention blocks.

    The classifier has two heads, one of them distilled: their mean in eval, the pair in training. `out_norm=True`
    gives each map the LayerNorm, of the classifier's kind, that the official dense code has.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        attention_blocks: how many of the last stage's blocks attend instead of pooling, at least 1; where it has no
            more than these, all do.
        mlp_ratio: hidden width of the MLPs over that of the stage.
        **options: those of `backbones.Backbone`.
    """

    key_layouts = (TIMM, OFFICIAL)
    output_strides = (8, 16, 32)
    new_parts = ("head", "head_dist", "out_norms")
    global_pools = POOLS

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 224, 448),
        depths: Sequence[int] = (3, 2, 6, 4),
        attention_blocks: int = 1,
        mlp_ratio: float = 4.0,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        if attention_blocks < 1:
            raise InputError(f"EfficientFormer: attention_blocks={attention_blocks} must be at least 1")
        attention_blocks = min(attention_blocks, depths[-1])
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Sequential(
            ConvNorm(self.in_chans, dims[0] // 2, stride=2, act="relu", bias=True),
            ConvNorm(dims[0] // 2, dims[0], stride=2, act="relu", bias=True),
        )
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(
                    dims[max(0, i - 1)], dims[i], drop_path[i], attention_blocks if i == 3 else 0, mlp_ratio, dilation
                )
                for i, dilation in enumerate(self.dilations)
            )
        )
        self.apply(init_linear)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, num_classes) of a map (B, C, h, w): the mean of both heads; in training, the pair."""
        x = super().forward_head(features, pre_logits=True)
        if pre_logits:
            return x
        pair = over_channels(self.head, x), over_channels(self.head_dist, x)
        return pair if self.training else (pair[0] + pair[1]) / 2

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Both layers that yield logits, as in timm."""
        return self.head, self.head_dist

    def make_norm(self) -> nn.Module:
        return layer_norm_2d(self.num_features, eps=1e-5)

    def make_out_norm(self, channels: int) -> nn.Module:
        return layer_norm_2d(channels, eps=1e-5)

    def make_head(self) -> None:
        super().make_head()
        self.head_dist = nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes else nn.Identity()
        self.head_dist.apply(init_linear)


class Stage(nn.Module):
    """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride); the first stage has nothing to down-sample."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        drop_path: Sequence[float],
        attention_blocks: int,
        mlp_ratio: float,
        dilation: int,
    ):
        super().__init__()
        stride, reach = (1, dilation // 2) if dilation > 1 else (2, 1)
        self.downsample = (
            ConvNorm(in_chans, dim, stride=stride, bias=True, dilation=reach) if in_chans != dim else nn.Identity()
        )
        hidden = int(dim * mlp_ratio)
        pooling_blocks = len(drop_path) - attention_blocks
        blocks = [PoolBlock(dim, hidden, rate, dilation) for rate in drop_path[:pooling_blocks]]
        if attention_blocks:
            blocks.append(ChannelsLast())  # counts as a block in published names
            blocks += [AttentionBlock(dim, hidden, rate) for rate in drop_path[pooling_blocks:]]
        self.blocks = Blocks(*blocks)
        self.channels_last = attention_blocks > 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.downsample(x))
        return x.permute(0, 3, 1, 2) if self.channels_last else x


class ChannelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class PoolBlock(Layer):
    """Pooling and MLP with residuals, on maps (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, drop_path: float, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.ls1 = LayerScale2d(dim, 1e-5)
        self.mlp = ConvMlp(dim, hidden)
        self.ls2 = LayerScale2d(dim, 1e-5)
        self.drop_path = DropPath(drop_path)
        self.lerps = False

    def forward(self, x: Tensor) -> Tensor:
        pooled = mean_around(x, self.dilation)
        if self.lerps:
            x = torch.lerp(x, pooled, self.ls1.gamma[:, None, None].to(x.dtype))
        else:
            x = residual(x, self.drop_path(self.ls1(pooled - x)), spare=self.fast)
        return residual(x, self.drop_path(self.ls2(self.mlp(x))), spare=self.fast)

    def prepare_for_inference(self) -> nn.Module:
        """The first scale moves `x` towards its mean in one operation, the second is part of a convolution."""
        self.lerps = is_plain(self.ls1) and type(self.ls1) is LayerScale2d
        if is_plain(self.ls2) and type(self.ls2) is LayerScale2d and type(self.mlp) is ConvMlp and is_plain(self.mlp):
            scaled = scale_outputs(self.mlp.fc2, self.ls2.gamma) if isinstance(self.mlp.norm2, nn.Identity) else None
            if scaled is not None:
                self.mlp.fc2, self.ls2 = scaled, nn.Identity()
        return super().prepare_for_inference()


def mean_around(x: Tensor, dilation: int) -> Tensor:
    """For each cell of (B, C, H, W), the mean of 3 x 3 that lie `dilation` apart, those outside the map left out."""
    if dilation == 1:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    ones, cells = x.new_ones(1, 1, 3, 3), x.new_ones(1, 1, *x.shape[-2:])
    total = F.conv2d(x, ones.expand(x.shape[1], -1, -1, -1), padding=dilation, dilation=dilation, groups=x.shape[1])
    return total / F.conv2d(cells, ones, padding=dilation, dilation=dilation)


class ConvMlp(Layer):
    """1x1 convolution, BatchNorm, GELU, 1x1 convolution, BatchNorm."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.act = "gelu"
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        x = activate(self.norm1(self.fc1(x)), self.act, spare=self.fast)
        return self.drop(self.norm2(self.fc2(self.drop(x))))

    def prepare_for_inference(self) -> nn.Module:
        for fc, norm in (("fc1", "norm1"), ("fc2", "norm2")):
            folded = fold_norm(getattr(self, fc), getattr(self, norm))
            if folded is not None:
                setattr(self, fc, folded)
                setattr(self, norm, nn.Identity())
        if isinstance(self.norm1, nn.Identity):
            self.fc1, self.act = fuse(self.fc1, self.act)
        return super().prepare_for_inference()


class AttentionBlock(Layer):
    """Attention and MLP with residuals, on maps (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.token_mixer = Attention(dim)
        self.ls1 = LayerScale(dim, 1e-5)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim, 1e-5)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.ls1(self.token_mixer(self.norm1(x)))), spare=self.fast)
        return residual(x, self.drop_path(self.ls2(self.mlp(self.norm2(x)))), spare=self.fast)


class Attention(Layer):
    """Attention with values four times as wide as queries and keys, and a bias by distance."""

    def __init__(self, dim: int, heads: int = 8, key_dim: int = 32, value_dim: int = 128):
        super().__init__()
        self.heads = heads
        self.widths = (key_dim, key_dim, value_dim)
        self.qkv = nn.Linear(dim, heads * sum(self.widths))
        self.attn_drop = Dropout("attn_drop_rate")
        self.proj = nn.Linear(heads * value_dim, dim)
        self.proj_drop = Dropout("proj_drop_rate")
        self.bias = DistanceBias(7, heads)  # stride 32 at 224 x 224

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, widths)
        q, k, v = qkv.split(self.widths, dim=-1)
        bias = self.bias(height, width).to(q.dtype)
        y = scaled_attention(q, k, v, bias, fast=self.fast, dropout=self.attn_drop.rate)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2))).reshape(x.shape)
