"""EfficientFormer (Li et al., https://arxiv.org/abs/2206.01191)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import (
    Blocks,
    ConvNorm,
    DistanceBias,
    Linear,
    Mlp,
    TableCache,
    conv2d,
    fold_norm,
    gelu,
    init_linear,
    layer_norm_2d,
    residual,
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
        attention_blocks: how many of the last stage's blocks attend instead of pooling; at least 1.
        mlp_ratio: hidden width of the MLPs over that of the stage.
        **options: those of `backbones.Backbone`.
    """

    key_layouts = (TIMM, OFFICIAL)
    new_parts = ("head", "head_dist", "out_norms")

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 224, 448),
        depths: Sequence[int] = (3, 2, 6, 4),
        attention_blocks: int = 1,
        mlp_ratio: float = 4.0,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        if not 1 <= attention_blocks <= depths[-1]:
            raise InputError(f"attention_blocks={attention_blocks} must be from 1 to depths[-1]={depths[-1]}")
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Sequential(
            ConvNorm(self.in_chans, dims[0] // 2, stride=2, act="relu", bias=True),
            ConvNorm(dims[0] // 2, dims[0], stride=2, act="relu", bias=True),
        )
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(dims[max(0, i - 1)], dims[i], drop_path[i], attention_blocks if i == 3 else 0, mlp_ratio)
                for i in range(4)
            )
        )
        self.apply(init_linear)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, num_classes) of a map (B, C, h, w): the mean of both heads; in training, the pair."""
        x = super().forward_head(features, pre_logits=True)
        if pre_logits:
            return x
        pair = self.head(x), self.head_dist(x)
        return pair if self.training else (pair[0] + pair[1]) / 2

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """Both layers that yield logits, as in timm."""
        return self.head, self.head_dist

    def make_norm(self) -> nn.Module:
        return layer_norm_2d(self.num_features, eps=1e-5)

    def make_out_norm(self, channels: int) -> nn.Module:
        return layer_norm_2d(channels, eps=1e-5)

    def _make_head(self) -> None:
        super()._make_head()
        self.head_dist = Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()
        self.head_dist.apply(init_linear)


class Stage(nn.Module):
    """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride); the first stage has nothing to down-sample."""

    def __init__(self, in_chans: int, dim: int, drop_path: Sequence[float], attention_blocks: int, mlp_ratio: float):
        super().__init__()
        self.downsample = ConvNorm(in_chans, dim, stride=2, bias=True) if in_chans != dim else nn.Identity()
        hidden = int(dim * mlp_ratio)
        pooling_blocks = len(drop_path) - attention_blocks
        blocks = [PoolBlock(dim, hidden, rate) for rate in drop_path[:pooling_blocks]]
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


class PoolBlock(nn.Module):
    """Pooling and MLP with residuals, on maps (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, drop_path: float):
        super().__init__()
        self.ls1 = LayerScale(dim, 1e-5)
        self.mlp = ConvMlp(dim, hidden)
        self.ls2 = LayerScale(dim, 1e-5)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        if self.mlp.folds:
            return residual(x, self.mlp.folded(x, self.ls2.gamma))
        return x + self.drop_path(self.mlp(x) * self.ls2.gamma[:, None, None])

    def pool(self, x: Tensor) -> Tensor:
        """`x` moved towards its mean over 3 x 3 cells, by the layer scale."""
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        gamma = self.ls1.gamma[:, None, None]
        if self.training and self.drop_path.drop_prob:
            return x + self.drop_path((pooled - x) * gamma)
        return torch.lerp(x, pooled, gamma.to(x.dtype))


class ConvMlp(nn.Module):
    """1x1 convolution, BatchNorm, GELU, 1x1 convolution, BatchNorm."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self._folded = TableCache(entries=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(conv2d(gelu(self.norm1(conv2d(x, self.fc1))), self.fc2))

    @property
    def folds(self) -> bool:
        """Whether the norms are constant and nothing learns, so that they can be folded into the convolutions."""
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def folded(self, x: Tensor, gamma: Tensor) -> Tensor:
        """The same times a layer scale (dim,), in two convolutions."""
        sources = [gamma, *self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]

        def fold() -> tuple[Tensor, ...]:
            weight, bias = fold_norm(self.fc2, self.norm2)
            return *fold_norm(self.fc1, self.norm1), weight * gamma[:, None, None, None], bias * gamma

        weight1, bias1, weight2, bias2 = self._folded.get((), sources, fold)
        return conv2d(gelu(conv2d(x, self.fc1, weight1, bias1)), self.fc2, weight2, bias2)


class AttentionBlock(nn.Module):
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
        x = residual(x, self.drop_path(self.ls1(self.token_mixer(self.norm1(x)))))
        return residual(x, self.drop_path(self.ls2(self.mlp(self.norm2(x)))))


class Attention(nn.Module):
    """Attention with values four times as wide as queries and keys, and a bias by distance."""

    def __init__(self, dim: int, heads: int = 8, key_dim: int = 32, value_dim: int = 128):
        super().__init__()
        self.heads = heads
        self.widths = (key_dim, key_dim, value_dim)
        self.qkv = Linear(dim, heads * sum(self.widths))
        self.proj = Linear(heads * value_dim, dim)
        self.bias = DistanceBias(7, heads)  # stride 32 at 224 x 224

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, widths)
        q, k, v = qkv.split(self.widths, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(height, width))
        return self.proj(y.transpose(1, 2).flatten(2)).reshape(x.shape)
