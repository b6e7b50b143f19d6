"""MaxViT (Tu et al., https://arxiv.org/abs/2204.01697): MBConv, attention in windows, attention over a grid."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import (
    Blocks,
    ConvNorm,
    Dropout,
    Layer,
    LogPositionBias,
    MBConv,
    Mlp,
    PreLogits,
    RelativePositionBias,
    TableCache,
    ceil_div,
    init_conv,
    init_linear,
    layer_norm_2d,
    residual,
    scaled_attention,
)
from backbones.layers.padding import is_exporting
from backbones.weights import KeyLayout

TIMM = KeyLayout(
    "timm",
    (
        (r"^stem\.(conv|norm)1\.", r"stem.0.\1."),
        (r"^stem\.conv2\.", "stem.1."),
        (r"^(stages\.\d+)\.blocks\.", r"\1."),
        (r"\.shortcut\.expand\.", ".shortcut."),
        (r"\.conv1_1x1\.", ".expand.conv."),
        (r"\.conv2_kxk\.", ".depthwise.conv."),
        (r"\.conv3_1x1\.", ".project."),
        (r"\.conv\.norm1\.", ".conv.expand.norm."),
        (r"\.conv\.norm2\.", ".conv.depthwise.norm."),
        (r"\.attn_block\.", ".window."),
        (r"\.attn_grid\.", ".grid."),
        (r"\.rel_pos\.relative_position_bias_table$", ".rel_pos.table"),
        (r"\.rel_pos\.mlp\.", ".rel_pos."),
        (r"\.ls(\d)\.gamma$", r".ls\1"),
        (r"^head\.norm\.", "pre_logits.norm."),
        (r"^head\.pre_logits\.", "pre_logits."),
        (r"^head\.fc\.", "head."),
    ),
)
TORCHVISION = KeyLayout(
    "torchvision",
    (
        (r"^stem\.0\.0\.", "stem.0.conv."),
        (r"^stem\.0\.1\.", "stem.0.norm."),
        (r"^stem\.1\.0\.", "stem.1."),
        (r"^blocks\.(\d+)\.layers\.(\d+)\.layers\.", r"stages.\1.\2."),
        (r"\.MBconv\.proj\.1\.", ".conv.shortcut."),
        (r"\.MBconv\.layers\.", ".conv."),
        (r"\.conv_a\.0\.", ".expand.conv."),
        (r"\.conv_a\.1\.", ".expand.norm."),
        (r"\.conv_b\.0\.", ".depthwise.conv."),
        (r"\.conv_b\.1\.", ".depthwise.norm."),
        (r"\.squeeze_excitation\.", ".se."),
        (r"\.conv_c\.", ".project."),
        (r"\.(window|grid)_attention\.", r".\1."),
        (r"\.attn_layer\.0\.", ".norm1."),
        (r"\.attn_layer\.1\.to_qkv\.", ".attn.qkv."),
        (r"\.attn_layer\.1\.merge\.", ".attn.proj."),
        (r"\.attn_layer\.1\.relative_position_bias_table$", ".attn.rel_pos.table"),
        (r"\.mlp_layer\.0\.", ".norm2."),
        (r"\.mlp_layer\.1\.", ".mlp.fc1."),
        (r"\.mlp_layer\.3\.", ".mlp.fc2."),
        (r"^classifier\.2\.", "pre_logits.norm."),
        (r"^classifier\.3\.", "pre_logits.fc."),
        (r"^classifier\.5\.", "head."),
    ),
)
HEAD_DIM = 32


class MaxViT(Backbone):
    """Four stages of MaxViT blocks at strides 4, 8, 16 and 32; time and memory are linear in the number of pixels.

    Maps whose sides `partition` does not divide are padded, and what is padded is masked. The defaults are those of
    the TensorFlow release.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        stem: widths of the stem's two convolutions.
        stem_bias: whether each of them has a bias.
        partition: side, in cells, of windows and grids. Weights trained at 224 have 7; at 256, 8; at 384, 12; at
            512, 16. Tables of relative positions made for another are resized when they are loaded.
        img_size: side of the images to build for, as timm does: `partition` is a 32nd of it.
        window_size, grid_size: the side of windows alone, and of grids; `partition` unless given.
        act: activation of stem and MBConv, as `activate` takes it.
        mlp_act: activation of the MLPs.
        expand_output: MBConv expands from its output's width; False from its input's.
        se_ratio, pool: as in `backbones.layers.MBConv`.
        project: first blocks of stages have a 1x1 in their shortcut where widths are equal too.
        conv_bias: MBConv's last 1x1 and its shortcut have a bias.
        conv_eps, eps: of BatchNorms and of LayerNorms.
        same: pad as TensorFlow does.
        heads_first: queries, keys and values lie side by side per head, not heads per queries, keys and values.
        scale_by_dim: divide attention logits by the root of the width, not of a head's.
        position_hidden: width of the MLP that computes position biases (`rmlp`); None for tables.
        init_values: initial layer scale of attention and MLP; None for none.
        hidden_head: the classifier is pooling, norm, linear, tanh, linear; False for norm, pooling, linear.
        head_hidden_size: width of that hidden layer, 0 for none, as in timm; that of what is pooled unless given.
        head_bias: whether the classifier's last layer has a bias.
        **options: those of `backbones.Backbone`.
    """

    block_pattern = r"^stages\.(\d+)\.(\d+)"
    key_layouts = (TIMM, TORCHVISION)
    output_strides = (8, 16, 32)

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        stem: Sequence[int] = (64, 64),
        stem_bias: Sequence[bool] = (True, True),
        partition: int = 7,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | None = None,
        grid_size: int | None = None,
        act: str = "gelu_tanh",
        mlp_act: str = "gelu_tanh",
        expand_output: bool = True,
        se_ratio: float = 0.25,
        pool: str = "avg",
        project: bool = False,
        conv_bias: bool = True,
        conv_eps: float = 1e-3,
        eps: float = 1e-5,
        same: bool = True,
        heads_first: bool = False,
        scale_by_dim: bool = False,
        position_hidden: int | None = None,
        init_values: float | None = None,
        hidden_head: bool = True,
        head_hidden_size: int | None = None,
        head_bias: bool = True,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), img_size=img_size, **options)
        if img_size is not None:
            sides = {max(1, side // 32) for side in to_2tuple(img_size)}
            if len(sides) > 1:
                raise InputError(f"MaxViT: img_size={img_size}: parts of the map are square; give a side, or partition")
            (partition,) = sides
        self.hidden_head = hidden_head if head_hidden_size is None else head_hidden_size > 0
        self.hidden_features = head_hidden_size or None
        self.head_bias = head_bias
        self.norm_eps = eps
        conv = partial(
            MBConv,
            expand_output=expand_output,
            se_ratio=se_ratio,
            act=act,
            pool=pool,
            bias=conv_bias,
            eps=conv_eps,
            same=same,
        )
        attention = partial(
            PartitionAttention,
            act=mlp_act,
            eps=eps,
            heads_first=heads_first,
            scale_by_dim=scale_by_dim,
            position_hidden=position_hidden,
            init_values=init_values,
        )
        window, grid = window_size or partition, grid_size or partition
        for name, size in (("window_size", window), ("grid_size", grid)):
            if size < 1:
                raise InputError(f"MaxViT: {name}={size} must be at least 1")
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Sequential(
            ConvNorm(self.in_chans, stem[0], 3, 2, act=act, bias=stem_bias[0], eps=conv_eps, same=same),
            nn.Conv2d(stem[0], stem[1], 3, padding=1, bias=stem_bias[1]),
        )
        self.stages = nn.ModuleList(
            self.wanted(
                Blocks(
                    *(
                        Block(
                            conv(
                                dims[i] if j else (stem[1], *dims)[i],
                                dims[i],
                                stride=1 if j or dilation > 1 else 2,
                                project=project and j == 0,
                                drop_path=rate,
                                dilation=dilation if j else max(1, dilation // 2),
                            ),
                            # Where cells lie closer, windows hold more of them; a grid spans the map as before.
                            window=attention(dims[i], window, dilation, grid=False, drop_path=rate),
                            grid=attention(dims[i], grid, 1, grid=True, drop_path=rate),
                        )
                        for j, rate in enumerate(drop_path[i])
                    )
                )
                for i, dilation in enumerate(self.dilations)
            )
        )
        self.apply(_init_weights)

    def make_pre_logits(self) -> nn.Module:
        return (
            PreLogits(self.pooled_features, self.norm_eps, self.hidden_features) if self.hidden_head else nn.Identity()
        )

    def make_norm(self) -> nn.Module:
        return nn.Identity() if self.hidden_head else layer_norm_2d(self.num_features, self.norm_eps)

    def make_head(self) -> None:
        super().make_head()
        if not self.head_bias and self.num_classes:
            self.head.register_parameter("bias", None)


class Block(nn.Module):
    """MBConv, which may stride, then attention in windows and over a grid: (B, C_in, H, W) -> (B, C, h, w)."""

    def __init__(self, conv: nn.Module, window: nn.Module, grid: nn.Module):
        super().__init__()
        self.conv = conv
        self.window = window
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return self.grid(self.window(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class PartitionAttention(Layer):
    """Attention within the parts of a map and MLP, with residuals, on maps (B, H, W, C).

    A part has `size` x `size` cells: neighbours in a window or, with `grid`, as far apart as the map allows.
    """

    def __init__(
        self,
        dim: int,
        table_size: int,
        dilation: int,
        grid: bool,
        act: str,
        eps: float,
        heads_first: bool,
        scale_by_dim: bool,
        position_hidden: int | None,
        init_values: float | None,
        drop_path: float,
    ):
        super().__init__()
        self.size = dilation * table_size
        self.grid = grid
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, table_size, heads_first, scale_by_dim, position_hidden, dilation)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim, act)
        self.drop_path = DropPath(drop_path)
        for name in ("ls1", "ls2"):
            scale = None if init_values is None else nn.Parameter(torch.full((dim,), init_values))
            self.register_parameter(name, scale)
        self._cuts = TableCache(entries=2)
        self._masked = TableCache(entries=2, largest=2**22)  # 16 MB in float32, for each block

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.attend(self.norm1(x))), self.ls1, spare=self.fast)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), self.ls2, spare=self.fast)

    def attend(self, x: Tensor) -> Tensor:
        """Attention alone: (B, H, W, C) -> (B, H, W, C)."""
        gather, padding, scatter = self.cut(*x.shape[:3], x.device)
        parts = move(x.flatten(0, 2), gather, scatter).unflatten(0, (-1, self.size**2))
        attended = self.attn(parts, self.bias(*x.shape[:3], padding))
        return move(attended.flatten(0, 1), scatter, gather, padding).reshape(x.shape)

    def cut(self, *place: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._cuts.get(place, lambda: cut_into_parts(*place, self.size, self.grid))

    def bias(self, batch: int, height: int, width: int, padding: Tensor) -> Tensor:
        """What is added to logits: (1, heads, N, N) or, with padding to mask, (B * parts, heads, N, N)."""
        bias = self.attn.rel_pos(self.size, self.size)
        if not is_exporting() and height % self.size == 0 and width % self.size == 0:
            return bias

        def masked() -> Tensor:
            mask = bias.new_zeros(padding.shape).masked_fill(padding, float("-inf"))  # no part is padding alone
            mask = mask.unflatten(0, (-1, self.size**2))[:, None, None]
            return bias.expand(mask.shape[0], -1, -1, -1) + mask

        return self._masked.get((batch, height, width, bias.device, bias.dtype), masked) if self.fast else masked()


class Attention(Layer):
    """Attention within parts (B * parts, N, C), with a bias for relative positions."""

    def __init__(
        self,
        dim: int,
        table_size: int,
        heads_first: bool,
        scale_by_dim: bool,
        position_hidden: int | None,
        dilation: int,
    ):
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.heads_first = heads_first
        self.scale = (dim if scale_by_dim else HEAD_DIM) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos = (
            LogPositionBias(self.heads, position_hidden, dilation)
            if position_hidden
            else RelativePositionBias(table_size, self.heads)
        )
        self.attn_drop = Dropout("attn_drop_rate")
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        split = (self.heads, 3, HEAD_DIM) if self.heads_first else (3, self.heads, HEAD_DIM)
        qkv = self.qkv(x).unflatten(-1, split)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3 if self.heads_first else 2))  # (..., heads, N, 32)
        x = scaled_attention(q, k, v, bias.to(q.dtype), self.scale, self.fast, self.attn_drop.rate)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


def cut_into_parts(
    batch: int, height: int, width: int, device: torch.device, size: int, grid: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each cell of maps (B, H, W) belongs, all flat, because a broadcast would fix symbolic sizes that are 1.

    Returns:
        for each place in the parts of padded maps, its cell; whether it is padding instead; for each cell, its place.
    """
    rows, columns = ceil_div(height, size), ceil_div(width, size)
    place = torch.arange(batch * rows * columns * size * size, device=device)
    part, y, x = place // (size * size), place // size % size, place % size
    if grid:
        y, x = y * rows + part // columns % rows, x * columns + part % columns
    else:
        y, x = part // columns % rows * size + y, part % columns * size + x
    padding = (y >= height) | (x >= width)
    gather = torch.where(padding, 0, (part // (rows * columns) * height + y) * width + x)

    cell = torch.arange(batch * height * width, device=device)
    y, x = cell // width % height, cell % width
    if grid:
        part_y, part_x, y, x = y % rows, x % columns, y // rows, x // columns
    else:
        part_y, part_x, y, x = y // size, x // size, y % size, x % size
    part = (cell // (height * width) * rows + part_y) * columns + part_x
    return gather, padding, (part * size + y) * size + x


def move(x: Tensor, there: Tensor, back: Tensor, padding: Tensor | None = None) -> Tensor:
    """`x.index_select(0, there)`, whose gradient returns by `back`, which takes no row twice; zero to padding."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not (torch.is_grad_enabled() and x.requires_grad):
        return x.index_select(0, there)
    return _Move.apply(x, there, back, padding)


class _Move(torch.autograd.Function):
    """PyTorch's own gradient of `index_select` adds row by row, which takes 30 times as long as to gather rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, padding)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, padding = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        return gradient if padding is None else gradient.masked_fill(padding[:, None], 0), None, None, None


def _init_weights(module: nn.Module) -> None:
    """As timm's: convolutions like EfficientNet's, attention and MLP like ViT's."""
    init_conv(module)
    if isinstance(module, PartitionAttention):
        for layer in (module.attn.qkv, module.attn.proj, module.mlp.fc1, module.mlp.fc2):
            init_linear(layer)
            nn.init.xavier_uniform_(layer.weight)
