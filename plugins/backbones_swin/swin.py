"""Swin Transformer (Liu et al., https://arxiv.org/abs/2103.14030)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.arguments import check_size
from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import (
    Blocks,
    Dropout,
    Layer,
    Mlp,
    RelativePositionBias,
    Resampling,
    TableCache,
    attend,
    ceil_div,
    init_linear,
    layer_norm_2d,
    pad_for_patches,
    residual,
)
from backbones.weights import KeyLayout

RESAMPLING = Resampling("bicubic")  # of the official dense-prediction code

_BLOCKS = (
    (r"^absolute_pos_embed$", "stem.pos_embed"),
    (r".*\.(relative_position_index|attn_mask)$", ""),  # computed here
    (r"\.relative_position_bias_table$", ".bias.table"),
)
TIMM = KeyLayout("timm", (*_BLOCKS, (r"^patch_embed\.", "stem."), (r"^layers\.", "stages."), (r"^head\.fc\.", "head.")))
OFFICIAL = KeyLayout(
    "official",
    (
        *_BLOCKS,
        (r"^patch_embed\.", "stem."),
        *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
        (r"^layers\.", "stages."),
        (r"^norm(\d)\.", r"out_norms.\1."),
    ),
)
TORCHVISION = KeyLayout(
    "torchvision",
    (
        *_BLOCKS,
        (r"^features\.0\.0\.", "stem.proj."),
        (r"^features\.0\.2\.", "stem.norm."),
        *((rf"^features\.{2 * i}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
        *((rf"^features\.{2 * i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
    ),
)


def _merge_as_we_do(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab merges patches by `nn.Unfold`: the four cells of a channel stand side by side, rows first."""
    return {
        # (..., C, row, column) -> (..., column, row, C)
        key: value.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)
        if re.search(r"\.downsample\.(norm|reduction)\.", key) and value.ndim and value.shape[-1] % 4 == 0
        else value
        for key, value in state.items()
    }


_OPENMMLAB = (
    *_BLOCKS,
    (r"^patch_embed\.projection\.", "stem.proj."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    *((rf"^stages\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in (2, 1, 0)),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
OPENMMLAB = KeyLayout("OpenMMLab", (*_OPENMMLAB, (r"^norm(\d)\.", r"out_norms.\1.")), _merge_as_we_do)
OPENMMLAB_CLASSIFIER = KeyLayout(
    "OpenMMLab's classifier",
    ((r"^backbone\.", ""), *_OPENMMLAB, (r"^norm3\.", "norm."), (r"^head\.fc\.", "head.")),
    _merge_as_we_do,
)


class SwinTransformer(Backbone):
    """Four stages of blocks that attend within windows, which every other block shifts by half a window.

    Maps are those of the official dense-prediction code: each side is zero-padded to a multiple of the window,
    and windows are shifted however small the map. The classifier follows the classification code instead: along
    a side that is no longer than the window, the window shrinks to it and is not shifted.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        window_size: side of the windows, in cells; 12 for weights trained at 384 x 384.
        ape: whether patches have absolute positions, too, which are resized bicubically for maps of other sizes.
        img_size: side, or (height, width), of the images that the table of those is made for.
        patch_norm: whether patches are normed.
        **options: those of `backbones.Backbone`; `out_norm=True` is the official dense-prediction code's norm.
    """

    key_layouts = (TIMM, OFFICIAL, TORCHVISION, OPENMMLAB, OPENMMLAB_CLASSIFIER)
    output_strides = (8, 16, 32)
    remedies = (
        (r"pos_embed$", "absolute positions", "build with ape=True"),
        (r"^stem\.norm\.", "a norm of patches", "build with patch_norm=True"),
    )
    size_divisor = 4  # the stem's patches; all else pads for itself

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        ape: bool = False,
        img_size: int | tuple[int, int] = 224,
        patch_norm: bool = True,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), img_size=img_size, **options)
        if window_size < 1:
            raise InputError(f"SwinTransformer: window_size={window_size} must be at least 1")
        drop_path = self.drop_path_rates(depths)
        check_size("SwinTransformer", img_size)
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = tuple(ceil_div(side, 4) for side in sides)
        self.stem = PatchEmbed(self.in_chans, dims[0], patch_norm, grid if ape else None)
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(
                    downsample=PatchMerging(dims[i - 1], dims[i], dilation) if i else nn.Identity(),
                    dim=dims[i],
                    heads=heads[i],
                    window_size=window_size,
                    dilation=dilation,
                    shrink=not self.features_only,
                    drop_path=drop_path[i],
                )
                for i, dilation in enumerate(self.dilations)
            )
        )
        self.apply(init_linear)

    def adapt_table(self, name: str, value: Tensor, checkpoint: Mapping[str, Tensor]) -> Tensor:
        if name != "stem.pos_embed":
            return super().adapt_table(name, value, checkpoint)
        if value.ndim == 3:  # (1, cells, C) of a square map; the dense code has (1, C, rows, columns)
            side = math.isqrt(value.shape[1])
            value = value.transpose(1, 2).unflatten(2, (side, side))
        return RESAMPLING(value.flatten(2).transpose(1, 2), value.shape[2:], self.stem.grid).flatten(1, 2)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | ({"stem.pos_embed"} if self.stem.grid else set())

    def make_norm(self) -> nn.Module:
        return layer_norm_2d(self.num_features, eps=1e-5)

    def make_out_norm(self, channels: int) -> nn.Module:
        return layer_norm_2d(channels, eps=1e-5)


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels: (B, C_in, H, W) -> (B, dim, H / 4, W / 4).

    Args:
        in_chans, dim: C_in, width.
        norm: whether they are normed.
        grid: height and width of the map that they have a table of positions for; None for no positions.
    """

    def __init__(self, in_chans: int, dim: int, norm: bool, grid: tuple[int, int] | None):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, 4)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.grid = grid
        self.pos_embed = None if grid is None else nn.Parameter(torch.zeros(1, math.prod(grid), dim))
        if grid is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.pos_drop = Dropout("pos_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        if self.pos_embed is not None:
            x = x + RESAMPLING(self.pos_embed, self.grid, x.shape[1:3])
        return self.pos_drop(x).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """(B, C_in, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)); the first stage keeps H and W."""

    def __init__(
        self,
        downsample: nn.Module,
        dim: int,
        heads: int,
        window_size: int,
        dilation: int,
        shrink: bool,
        drop_path: Sequence[float],
    ):
        super().__init__()
        self.downsample = downsample
        # Two ways to cut a map, each shared by every other block. Where cells lie closer, windows hold more of them.
        windows = [Windows(dilation * window_size, dilation * shift, shrink) for shift in (0, window_size // 2)]
        self.blocks = Blocks(
            *(Block(dim, heads, windows[i % 2], window_size, rate) for i, rate in enumerate(drop_path))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """Each square of 2 x 2 cells becomes one: (B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2)).

    With `dilation` above 1, for `output_stride`, each cell becomes that of the square that it begins.
    """

    def __init__(self, in_dim: int, dim: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.norm = nn.LayerNorm(4 * in_dim)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = pad_for_patches(x, 2, self.dilation).permute(0, 2, 3, 1)
        if self.dilation == 1:
            squares = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        else:  # one at each cell
            reach = self.dilation // 2
            starts = [(row, column) for column in (0, reach) for row in (0, reach)]
            squares = [x[:, row : row + height, column : column + width] for row, column in starts]
        x = torch.cat(squares, dim=-1)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class Block(Layer):
    """Attention within windows and MLP with residuals, on maps (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, windows: "Windows", table_size: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, windows, table_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.attn(self.norm1(x))), spare=self.fast)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), spare=self.fast)


class WindowAttention(Layer):
    """Multi-head attention within the windows of a map (B, H, W, C), with a bias by relative position.

    Cells are projected where they are and gathered into windows afterwards, so that padding costs no projection.
    """

    def __init__(self, dim: int, heads: int, windows: "Windows", table_size: int):
        super().__init__()
        if dim % heads:
            raise InputError(f"SwinTransformer: {heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.windows = windows
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = RelativePositionBias(table_size, heads)
        self.attn_drop = Dropout("attn_drop_rate")
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout("proj_drop_rate")
        self._biases = TableCache(entries=2)

    def forward(self, x: Tensor) -> Tensor:
        cut = self.windows(*x.shape[:3], x.device)
        cells = x.flatten(0, 2)
        qkv = self.qkv(F.pad(cells, (0, 0, 0, 1)) if cut.padded else cells)  # the last cell is that of zeros
        windows = qkv.index_select(0, cut.gather).unflatten(0, (-1, cut.height * cut.width))  # (windows, N, 3 * C)
        biases = self.biases(cut).to(qkv.dtype)
        if cut.masks is None:
            attended = self.attend(windows, biases)
        elif isinstance(cut.kinds, Tensor):
            attended = self.attend(windows, biases.index_select(0, cut.kinds))
        else:
            attended = torch.cat([*map(self.attend, windows.split(cut.kinds), biases.split(1))])
        cells = attended.flatten(0, 1).index_select(0, cut.scatter)
        return self.proj_drop(self.proj(cells.reshape(x.shape)))

    def attend(self, windows: Tensor, bias: Tensor) -> Tensor:
        """Attention within windows of one kind, all at once: (windows, N, 3 * C) -> (windows, N, C)."""
        return attend(*windows.chunk(3, dim=-1), self.heads, bias, self.fast, self.attn_drop.rate)

    def biases(self, cut: "Cut") -> Tensor:
        """(kinds of windows, heads, N, N)."""
        bias = self.bias(cut.height, cut.width)
        if cut.masks is None:
            return bias

        def masked() -> Tensor:
            return bias + cut.masks.to(bias.dtype)

        return self._biases.get((cut.key, bias.device, bias.dtype), masked) if self.fast else masked()


@dataclass(frozen=True)
class Cut:
    """How maps of one size fall into windows of height * width = N cells.

    Windows that hold cells from opposite ends of the map, because the shift is cyclic, keep these apart by a mask.
    Only the last row and the last column of windows do, so that there are four kinds of windows, whatever the size
    of the map: windows are sorted by kind, and the biases of a kind are broadcast.
    """

    height: int
    width: int
    #: What `biases` depend on.
    key: tuple[int, ...]
    #: Whether windows reach beyond the map.
    padded: bool
    #: (windows * N,): for each place in a window, the row of its cell; one past the last where it is padding.
    gather: Tensor
    #: (B * H * W,): for each cell, the row of its place in a window.
    scatter: Tensor
    #: How many windows of each kind there are; while compiling, when none may be empty, the kind of each window.
    kinds: list[int] | Tensor
    #: (kinds, 1, N, N), added to the logits; None where windows are not shifted and all of a kind.
    masks: Tensor | None


class Windows:
    """Cuts maps into windows, zero-padded at the bottom and right and then shifted up and left, cyclically.

    Args:
        size: side of a window.
        shift: cells by which the map is shifted.
        shrink: along a side that is no longer than `size`, shrink the window to it and do not shift.
    """

    def __init__(self, size: int, shift: int, shrink: bool):
        self.size = size
        self.shift = shift
        self.shrink = shrink
        self._cuts = TableCache(entries=2)

    def __call__(self, batch: int, height: int, width: int, device: torch.device) -> Cut:
        return self._cuts.get((batch, height, width, device), lambda: self.cut(batch, height, width, device))

    def cut(self, batch: int, height: int, width: int, device: torch.device) -> Cut:
        (wh, sh), (ww, sw) = self._along(height), self._along(width)
        rows, columns = ceil_div(height, wh), ceil_div(width, ww)
        window = torch.arange(batch * rows * columns, device=device)
        # Neither broadcast nor sliced by size, which would fix symbolic sizes that happen to be 1.
        kind = 2 * (window // columns % rows == rows - 1) + (window % columns == columns - 1)
        compiling = torch.compiler.is_compiling()
        if (sh or sw) and not compiling:
            window = kind.argsort(stable=True)
        place = (window[:, None] * (wh * ww) + torch.arange(wh * ww, device=device)).flatten()
        window, place = place // (wh * ww), place % (wh * ww)
        y = (window // columns % rows * wh + place // ww + sh) % (rows * wh)
        x = (window % columns * ww + place % ww + sw) % (columns * ww)
        cell = (window // (rows * columns) * height + y) * width + x
        gather = torch.where((y < height) & (x < width), cell, batch * height * width)
        scatter = gather.new_empty(batch * height * width + 1)
        return Cut(
            height=wh,
            width=ww,
            key=(wh, ww, sh, sw),
            padded=compiling or height % wh > 0 or width % ww > 0,
            gather=gather,
            scatter=scatter.scatter(0, gather, torch.arange(gather.shape[0], device=device))[:-1],
            kinds=kind if compiling else [batch * r * c for r in (rows - 1, 1) for c in (columns - 1, 1)],
            masks=_masks(wh, ww, sh, sw, device) if sh or sw else None,
        )

    def _along(self, side: int) -> tuple[int, int]:
        """Length of the windows along a side of the map, and their shift."""
        if self.shrink and side <= self.size:
            return side, 0
        return self.size, self.shift


def _masks(height: int, width: int, bottom: int, right: int, device: torch.device) -> Tensor:
    """(4, 1, N, N): -100 between cells from opposite ends of the map.

    In the lower row of windows, these are the last `bottom` rows; in the last column of windows, the last `right`
    columns. The kinds: neither, the right, the lower, both.
    """
    kind = torch.arange(4, device=device)[:, None]
    cell = torch.arange(height * width, device=device)
    low = (cell // width >= height - bottom) & (kind // 2 == 1)
    far = (cell % width >= width - right) & (kind % 2 == 1)
    region = 2 * low + far  # (4, N)
    return -100.0 * (region[:, None, :, None] != region[:, None, None, :])
