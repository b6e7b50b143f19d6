"""Twins-SVT and Twins-PCPVT (Chu et al., https://arxiv.org/abs/2104.13840)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import (
    Attention,
    Blocks,
    Dropout,
    Layer,
    Mlp,
    PatchEmbed,
    SpatialReductionAttention,
    TableCache,
    attend,
    ceil_div,
    init_conv,
    init_linear,
    layer_norm_2d,
    residual,
)
from backbones.layers.padding import is_exporting
from backbones.weights import KeyLayout, split_in_proj

OFFICIAL = KeyLayout(
    "official",  # and timm's, which kept the names
    (
        (r"^patch_embeds\.(\d)\.", r"stages.\1.embed."),
        (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
        (r"^pos_block\.(\d)\.proj\.0\.", r"stages.\1.blocks.0.position.conv."),
        (r"^norm_list\.", "stage_norms."),
    ),
)

_OPENMMLAB = (
    (r"^patch_embeds\.(\d)\.projection\.", r"stages.\1.embed.proj."),
    (r"^patch_embeds\.(\d)\.norm\.", r"stages.\1.embed.norm."),
    (r"^position_encodings\.(\d)\.proj\.", r"stages.\1.blocks.0.position.conv."),
    (r"^(?:layers|stages)\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.attn\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
OPENMMLAB = KeyLayout(
    "OpenMMLab", (*_OPENMMLAB, (r"^(?:norm_list\.|norm_after_stage)(\d)\.", r"stage_norms.\1.")), split_in_proj
)
OPENMMLAB_CLASSIFIER = KeyLayout(
    "OpenMMLab's classifier",
    ((r"^backbone\.", ""), *_OPENMMLAB, (r"^norm_after_stage3\.", "norm."), (r"^head\.fc\.", "head.")),
    split_in_proj,
)


class Twins(Backbone):
    """Four stages of transformer blocks at strides 4, 8, 16 and 32, with convolutional position encodings.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        sr_ratios: how much each stage shrinks keys and values of its global attention along each side.
        mlp_ratios: hidden width of each stage's MLP over its width.
        window_size: side of the windows in which every other block attends, from the first one (SVT), or one per
            stage; None for global attention in all blocks (PCPVT).
        **options: those of `backbones.Backbone`. In SVT, `out_norm` follows the official dense-prediction code: the
            norm after a stage is what the next stage sees, too.
    """

    stem_pattern = r"^stages\.0\.embed"
    key_layouts = (OFFICIAL, OPENMMLAB, OPENMMLAB_CLASSIFIER)
    new_parts = ("head", "out_norms", "stage_norms")
    output_strides = (8, 16, 32)

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 10, 4),
        heads: Sequence[int] = (2, 4, 8, 16),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        window_size: int | Sequence[int] | None = 7,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        windows = [window_size] * 4 if window_size is None or isinstance(window_size, int) else list(window_size)
        if len(windows) != 4 or any(size is not None and size < 1 for size in windows):
            raise InputError(f"Twins: window_size={window_size!r} must be a positive side, or four, one per stage")
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Identity()
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(
                    embed=PatchEmbed(*((dims[i - 1], dims[i], 2) if i else (self.in_chans, dims[0], 4)), dilation),
                    blocks=[
                        Block(
                            dims[i],
                            attn=WindowAttention(dims[i], heads[i], dilation * windows[i])
                            if windows[i] and j % 2 == 0
                            else SpatialReductionAttention(dims[i], heads[i], sr_ratios[i]),
                            mlp_ratio=mlp_ratios[i],
                            drop_path=rate,
                            position=PositionEncoding(dims[i], dilation) if j == 0 else nn.Identity(),
                        )
                        for j, rate in enumerate(drop_path[i])
                    ],
                )
                for i, dilation in enumerate(self.dilations)
            )
        )
        self.in_trunk = self.out_norm and self.features_only and window_size is not None
        norms = (layer_norm_2d(dim) for dim in dims[: len(self.stages)])
        self.stage_norms = nn.ModuleList(norms if self.in_trunk else ())
        self.apply(_init_weights)

    @property
    def runs_stages(self) -> bool:
        return not self.in_trunk

    def forward_features(self, images: Tensor) -> list[Tensor] | Tensor:
        if not self.in_trunk:
            return super().forward_features(images)
        maps, x = [], self.pad(images)
        for stage, norm in zip(self.stages, self.stage_norms, strict=True):
            x = norm(self._run(stage, x))
            maps.append(x)
        return maps

    def make_norm(self) -> nn.Module:
        return layer_norm_2d(self.num_features)

    def make_out_norm(self, channels: int) -> nn.Module:
        return nn.Identity() if self.in_trunk else super().make_out_norm(channels)

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.stages[0].embed], *([stage] for stage in self.stages)]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if ".position." in name}


class Stage(nn.Module):
    """(B, C_in, H, W) -> (B, dim, H / stride, W / stride)."""

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.embed = embed
        self.pos_drop = Dropout("pos_drop_rate")
        self.blocks = Blocks(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.pos_drop(self.embed(x))).permute(0, 3, 1, 2)


class Block(Layer):
    """Attention and MLP with residuals, on maps (B, H, W, C); the first of a stage encodes positions at its end."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, position: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.attn(self.norm1(x))), spare=self.fast)
        return self.position(residual(x, self.drop_path(self.mlp(self.norm2(x))), spare=self.fast))


class PositionEncoding(Layer):
    """Depth-wise 3 x 3 convolution with a residual, on maps (B, H, W, C): zeros around the map tell where it ends."""

    def __init__(self, dim: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return residual(x, self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), spare=self.fast)


class WindowAttention(Attention):
    """Attention within windows of a map (B, H, W, C); padding at its right and bottom takes part, as cells of zeros.

    Cells are projected where they are and gathered into windows afterwards, so that padding costs one cell.
    """

    def __init__(self, dim: int, heads: int, window_size: int):
        super().__init__(dim, heads)
        self.window_size = window_size
        self._cuts = TableCache(entries=2)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width = x.shape[:3]
        gather, scatter = self.cut(batch, height, width, x.device)
        cells = x.flatten(0, 2)
        if is_exporting() or height % self.window_size or width % self.window_size:
            cells = F.pad(cells, (0, 0, 0, 1))  # the last cell is that of zeros
        windows = self.qkv(cells).index_select(0, gather).unflatten(0, (-1, self.window_size**2))
        windows = windows.chunk(3, dim=-1)
        attended = attend(*windows, self.heads, fast=self.fast, dropout=self.attn_drop.rate).flatten(0, 1)
        return self.proj_drop(self.proj(attended.index_select(0, scatter))).reshape(x.shape)

    def cut(self, *place: Any) -> tuple[Tensor, Tensor]:
        return self._cuts.get(place, lambda: _cut(*place, self.window_size))


def _cut(batch: int, height: int, width: int, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """For each place in the windows of padded maps, its cell, or one past the last; for each cell, its place."""
    rows, columns = ceil_div(height, size), ceil_div(width, size)
    # Flat, because a broadcast would fix symbolic sizes that happen to be 1.
    place = torch.arange(batch * rows * columns * size * size, device=device)
    window = place // (size * size)
    y = window // columns % rows * size + place // size % size
    x = window % columns * size + place % size
    cell = (window // (rows * columns) * height + y) * width + x
    gather = torch.where((y < height) & (x < width), cell, batch * height * width)

    cell = torch.arange(batch * height * width, device=device)
    y, x = cell // width % height, cell % width
    window = (cell // (height * width) * rows + y // size) * columns + x // size
    return gather, (window * size + y % size) * size + x % size


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    init_conv(module)
