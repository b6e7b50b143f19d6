"""Visual Attention Network (Guo et al., https://arxiv.org/abs/2202.09741)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones import Backbone, Blocks
from backbones.layers import init_linear, residual
from backbones.weights import KeyLayout

OFFICIAL = KeyLayout(
    "official",
    (
        *((rf"^patch_embed{n}\.", f"stages.{n - 1}.embed.") for n in range(1, 5)),
        *((rf"^block{n}\.", f"stages.{n - 1}.blocks.") for n in range(1, 5)),
        *((rf"^norm{n}\.", f"stages.{n - 1}.norm.") for n in range(1, 5)),
        (r"\.attn\.spatial_gating_unit\.", ".attn.gate."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    ),
)


class VisualAttentionNetwork(Backbone):
    """Four stages of blocks whose attention is a large kernel, decomposed, at strides 4, 8, 16 and 32.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        mlp_ratios: hidden width of each stage's MLP over its width.
        **options: those of `backbones.Backbone`.
    """

    stem_pattern = r"^stages\.0\.embed"
    key_layouts = (OFFICIAL,)

    def __init__(
        self,
        dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (3, 3, 5, 2),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        rates = self.drop_path_rates(depths)
        self.stem = nn.Identity()
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(dims[i - 1] if i else self.in_chans, dims[i], mlp_ratios[i], rates[i], first=i == 0)
                for i in range(len(dims))
            )
        )
        self.apply(_init_weights)

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.stages[0].embed], *([stage] for stage in self.stages)]


class Stage(nn.Module):
    """(B, in_chans, H, W) -> (B, dim, H / stride, W / stride); the first one has stride 4, others 2."""

    def __init__(self, in_chans: int, dim: int, mlp_ratio: int, drop_path: Sequence[float], first: bool):
        super().__init__()
        self.embed = PatchEmbed(in_chans, dim, *((7, 4) if first else (3, 2)))
        self.blocks = Blocks(*(Block(dim, mlp_ratio, rate) for rate in drop_path))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Overlapping patches, normed."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Block(nn.Module):
    """Large kernel attention, then a convolutional MLP, (B, dim, H, W), each scaled and added to its input."""

    def __init__(self, dim: int, mlp_ratio: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.attn(self.norm1(x))), self.layer_scale_1[:, None, None])
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), self.layer_scale_2[:, None, None])


class Attention(nn.Module):
    """Features gated by what a large kernel makes of them, between two 1x1 convolutions."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.act = nn.GELU()
        self.gate = LargeKernelAttention(dim)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_2(self.gate(self.act(self.proj_1(x))))


class LargeKernelAttention(nn.Module):
    """5 x 5 depth-wise, 7 x 7 depth-wise with dilation 3 and 1 x 1, which see 23 x 23 cells; times the input."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class Mlp(nn.Module):
    """1 x 1 convolutions with a depth-wise 3 x 3 between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)
