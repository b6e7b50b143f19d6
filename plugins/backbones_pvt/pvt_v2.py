"""Pyramid Vision Transformer v2 (Wang et al., https://arxiv.org/abs/2106.13797)."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.layers import Blocks, Dropout, Layer, SpatialReductionAttention, activate, fuse, init_conv, init_linear
from backbones.weights import KeyLayout, split_in_proj

from .pvt import Block

TIMM = KeyLayout("timm", ((r"^patch_embed\.", "stages.0.embed."), (r"^(stages\.\d+)\.downsample\.", r"\1.embed.")))
OFFICIAL = KeyLayout(
    "official",
    (
        *((rf"^patch_embed{n}\.", f"stages.{n - 1}.embed.") for n in range(1, 5)),
        *((rf"^block{n}\.", f"stages.{n - 1}.blocks.") for n in range(1, 5)),
        *((rf"^norm{n}\.", f"stages.{n - 1}.norm.") for n in range(1, 5)),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
    ),
)
OPENMMLAB = KeyLayout(
    "OpenMMLab",
    (
        (r"^layers\.(\d)\.0\.projection\.", r"stages.\1.embed.proj."),
        (r"^layers\.(\d)\.0\.norm\.", r"stages.\1.embed.norm."),
        (r"^layers\.(\d)\.1\.", r"stages.\1.blocks."),
        (r"^layers\.(\d)\.2\.", r"stages.\1.norm."),
        (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
        (r"\.attn\.attn\.", ".attn."),
        *((rf"\.ffn\.layers\.{i}\.", f".mlp.{name}.") for i, name in ((0, "fc1"), (1, "dwconv"), (4, "fc2"))),
    ),
    split_in_proj,
)


class PyramidVisionTransformerV2(Backbone):
    """Four stages of transformer blocks at strides 4, 8, 16 and 32, without position embeddings.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        sr_ratios: how much each stage shrinks keys and values along each side.
        mlp_ratios: hidden width of each stage's MLP over its width.
        linear: pool keys and values to 7 x 7 instead, in all stages (the paper's `Li`).
        **options: those of `backbones.Backbone`.
    """

    stem_pattern = r"^stages\.0\.embed"
    key_layouts = (TIMM, OFFICIAL, OPENMMLAB)
    output_strides = (8, 16, 32)

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        linear: bool = False,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Identity()
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(
                    embed=PatchEmbed(dims[i - 1], dims[i], 3, 1 if dilation > 1 else 2, max(1, dilation // 2))
                    if i
                    else PatchEmbed(self.in_chans, dims[0], 7, 4),
                    blocks=[
                        Block(
                            dims[i],
                            PooledAttention(dims[i], heads[i])
                            if linear
                            else SpatialReductionAttention(dims[i], heads[i], sr_ratios[i]),
                            Mlp(dims[i], int(dims[i] * mlp_ratios[i]), dilation, relu=linear),
                            rate,
                        )
                        for rate in drop_path[i]
                    ],
                    dim=dims[i],
                )
                for i, dilation in enumerate(self.dilations)
            )
        )
        self.apply(_init_weights)

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.stages[0].embed], *([stage] for stage in self.stages)]


class Stage(nn.Module):
    """(B, C_in, H, W) -> (B, dim, H / stride, W / stride)."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], dim: int):
        super().__init__()
        self.embed = embed
        self.blocks = Blocks(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x))).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Overlapping patches: (B, C_in, H, W) -> (B, H / stride, W / stride, dim)."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, dilation: int = 1):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2 * dilation, dilation)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PooledAttention(SpatialReductionAttention):
    """Attention to the map pooled to 7 x 7."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads, sr_ratio=1)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def reduce(self, x: Tensor) -> Tensor:
        x = self.sr(F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 7))
        return F.gelu(self.norm(x.permute(0, 2, 3, 1)))


class Mlp(Layer):
    """MLP with a depth-wise 3 x 3 convolution before the GELU; the linear variant adds a ReLU before that."""

    def __init__(self, dim: int, hidden: int, dilation: int, relu: bool):
        super().__init__()
        self.relu = relu
        self.act = "gelu"
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.relu:
            x = F.relu(x)
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(activate(x, self.act, spare=self.fast))))

    def prepare_for_inference(self) -> nn.Module:
        self.dwconv, self.act = fuse(self.dwconv, self.act)
        return super().prepare_for_inference()


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    init_conv(module)
