"""CoAtNet (Dai et al., https://arxiv.org/abs/2106.04803), in the form of timm's `coatnet_N` and `_rw` models."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
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
    PreLogits,
    RelativePositionBias,
    activate,
    ceil_div,
    fuse,
    halve,
    init_conv,
    layer_norm_2d,
    residual,
    scaled_attention,
)
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
        (r"\.se_early\.", ".se."),
        (r"^(stages\.[01]\.\d+)\.norm1\.", r"\1.expand.norm."),
        (r"^(stages\.[01]\.\d+)\.norm2\.", r"\1.depthwise.norm."),
        (r"\.norm1\.norm\.", ".norm1."),
        (r"\.rel_pos\.relative_position_bias_table$", ".rel_pos.table"),
        (r"\.rel_pos\.mlp\.", ".rel_pos."),
        (r"\.ls(\d)\.gamma$", r".ls\1"),
        (r"^head\.norm\.", "pre_logits.norm."),
        (r"^head\.pre_logits\.", "pre_logits."),
        (r"^head\.fc\.", "head."),
    ),
)
HEAD_DIM = 32
# Numbers in the largest bias that a CPU makes whole, 16 MB in float32, and that is kept by `for_inference` or on GPUs.
WHOLE_BIAS, KEPT_BIAS = 2**22, 2**24
# Numbers in the bias of one band of rows of a larger map: what stays in a CPU's cache.
BAND_BIAS = 2**20


class CoAtNet(Backbone):
    """A convolutional stem, two stages of MBConv, two of transformer blocks that attend over the whole map.

    Attention has relative position biases, which are resized for maps of other sizes; time and memory of the two
    last stages grow with the square of the number of cells.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        stem: widths of the stem's two convolutions.
        img_size: side of the images whose maps the tables of relative positions are made for, or height and width.
        act: activation of stem and MBConv, as `activate` takes it.
        expand_output: MBConv expands from its output's width, and attention is as wide as its output; False takes
            the input's width for both, as the `_rw` variants do.
        pre_act: MBConv has an activation after its first norm.
        se_act, se_early: as in `backbones.layers.MBConv`.
        stride_mode: "dw" strides in the depth-wise convolution; "pool" averages before the expansion.
        pool: how shortcuts and what attends are halved: "avg" or "max".
        conv_bias: MBConv's last 1x1 and its shortcut have a bias.
        shortcut_bias: shortcuts of transformer blocks have a bias.
        norm: of transformer blocks and before the classifier: "layer" or "batch".
        position_hidden: width of the MLP that computes position biases (`rmlp`); None for tables.
        init_values: initial layer scale of transformer blocks; None for none.
        hidden_head: the classifier is pooling, norm, linear, tanh, linear; False for norm, pooling, linear.
        head_hidden_size: width of that hidden layer, 0 for none, as in timm; that of what is pooled unless given.
        **options: those of `backbones.Backbone`.
    """

    block_pattern = r"^stages\.(\d+)\.(\d+)"
    key_layouts = (TIMM,)
    output_strides = (8, 16, 32)

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 5, 2),
        stem: Sequence[int] = (64, 64),
        img_size: int | tuple[int, int] = 224,
        act: str = "gelu",
        expand_output: bool = True,
        pre_act: bool = False,
        se_act: str = "silu",
        se_early: bool = False,
        stride_mode: str = "dw",
        pool: str = "avg",
        conv_bias: bool = True,
        shortcut_bias: bool = True,
        norm: str = "layer",
        position_hidden: int | None = None,
        init_values: float | None = None,
        hidden_head: bool = True,
        head_hidden_size: int | None = None,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), img_size=img_size, **options)
        for name, value, known in (
            ("stride_mode", stride_mode, ("dw", "pool")),
            ("pool", pool, ("avg", "max")),
            ("norm", norm, tuple(NORMS)),
        ):
            if value not in known:
                raise InputError(f"CoAtNet: {name}={value!r} is unknown; choose from {known}")
        self.norm_kind = norm
        self.hidden_head = hidden_head if head_hidden_size is None else head_hidden_size > 0
        self.hidden_features = head_hidden_size or None
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)

        conv = partial(
            MBConv,
            expand_output=expand_output,
            act=act,
            pre_act=pre_act,
            se_act=se_act,
            se_early=se_early,
            stride_mode=stride_mode,
            pool=pool,
            bias=conv_bias,
        )
        transformer = partial(
            TransformerBlock,
            expand_output=expand_output,
            pool=pool,
            shortcut_bias=shortcut_bias,
            norm=NORMS[norm],
            position_hidden=position_hidden,
            init_values=init_values,
        )
        block = (
            conv,
            conv,
            partial(transformer, grid=tuple(ceil_div(side, 16) for side in sides), dilation=self.dilations[2]),
            partial(transformer, grid=tuple(ceil_div(side, 32) for side in sides), dilation=self.dilations[3]),
        )
        strides = [1 if dilation > 1 else 2 for dilation in self.dilations]
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Sequential(
            ConvNorm(self.in_chans, stem[0], 3, 2, act=act),
            nn.Conv2d(stem[0], stem[1], 3, padding=1, bias=False),
        )
        self.stages = nn.ModuleList(
            self.wanted(
                Blocks(
                    *(
                        block[i](
                            dims[i] if j else (stem[1], *dims)[i],
                            dims[i],
                            stride=1 if j else strides[i],
                            drop_path=rate,
                        )
                        for j, rate in enumerate(drop_path[i])
                    )
                )
                for i in range(4)
            )
        )
        self.apply(_init_weights)

    def make_pre_logits(self) -> nn.Module:
        return PreLogits(self.pooled_features, hidden=self.hidden_features) if self.hidden_head else nn.Identity()

    def make_norm(self) -> nn.Module:
        return nn.Identity() if self.hidden_head else NORMS[self.norm_kind](self.num_features)


class TransformerBlock(Layer):
    """Attention over the whole map and MLP, with residuals, on maps (B, C, H, W); stride 2 pools both branches."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int,
        grid: tuple[int, int],
        expand_output: bool,
        pool: str,
        shortcut_bias: bool,
        norm: Any,
        position_hidden: int | None,
        init_values: float | None,
        dilation: int,
        drop_path: float,
    ):
        super().__init__()
        self.pool = pool if stride == 2 else None
        self.shortcut = nn.Conv2d(in_chans, dim, 1, bias=shortcut_bias) if in_chans != dim else None
        self.norm1 = norm(in_chans)
        self.attn = Attention(in_chans, dim if expand_output else in_chans, dim, grid, position_hidden, dilation)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)
        for name in ("ls1", "ls2"):
            scale = None if init_values is None else nn.Parameter(torch.full((dim,), init_values))
            self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.pool:
            x, y = halve(x, self.pool), halve(y, self.pool)
        if self.shortcut is not None:
            x = self.shortcut(x)
        x = residual(x, self.drop_path(self.attn(y)), _per_channel(self.ls1), spare=self.fast)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), _per_channel(self.ls2), spare=self.fast)


class Attention(Layer):
    """Attention among all cells of a map, with a bias for their offset: (B, in_chans, H, W) -> (B, out_chans, H, W)."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        out_chans: int,
        grid: tuple[int, int],
        position_hidden: int | None,
        dilation: int,
    ):
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.qkv = nn.Conv2d(in_chans, 3 * dim, 1)
        self.rel_pos = (
            LogPositionBias(self.heads, position_hidden, dilation)
            if position_hidden
            else RelativePositionBias(grid, self.heads)
        )
        self.attn_drop = Dropout("attn_drop_rate")
        self.proj = nn.Conv2d(dim, out_chans, 1)
        self.proj_drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(x).permute(0, 2, 3, 1).reshape(batch, height * width, self.heads, 3, HEAD_DIM)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # (B, heads, N, 32) each
        banded = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if banded and self.heads * (height * width) ** 2 > (KEPT_BIAS if self.fast or x.is_cuda else WHOLE_BIAS):
            x = self._attend_by_bands(q, k, v, height, width)
        else:
            bias = self.rel_pos(height, width).to(q.dtype)
            x = scaled_attention(q, k, v, bias, fast=self.fast, dropout=self.attn_drop.rate)
        x = x.transpose(1, 2).reshape(batch, height, width, -1)
        return self.proj_drop(self.proj(x.permute(0, 3, 1, 2)))

    def _attend_by_bands(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """The same, for a few rows of queries at a time, so that the bias of all cells to all is never held.

        With the keys in reverse, the bias of a band is a window that slides over the table by offset.
        """
        table = self.rel_pos(height, width, whole=False).to(q.dtype)
        k, v = k.flip(2), v.flip(2)
        rows = max(1, BAND_BIAS // (self.heads * width * height * width))
        out = q.new_empty(q.shape[0], height * width, self.heads, HEAD_DIM).transpose(1, 2)
        for top in range(0, height, rows):
            bias = table[:, top : top + rows + height - 1].unfold(1, height, 1).unfold(2, width, 1)
            bias = bias.reshape(1, self.heads, -1, height * width)
            band = slice(top * width, (top + rows) * width)
            part = scaled_attention(q[:, :, band], k, v, bias, fast=self.fast, dropout=self.attn_drop.rate)
            out[:, :, band] = part
        return out


class Mlp(Layer):
    """1x1, exact GELU, 1x1."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.act = "gelu"
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(activate(self.fc1(x), self.act, spare=self.fast)))

    def prepare_for_inference(self) -> nn.Module:
        self.fc1, self.act = fuse(self.fc1, self.act)
        return super().prepare_for_inference()


NORMS = {"layer": layer_norm_2d, "batch": partial(nn.BatchNorm2d, eps=1e-6)}


def _per_channel(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale[:, None, None]


def _init_weights(module: nn.Module) -> None:
    """As timm's: convolutions like EfficientNet's, attention and MLP like ViT's."""
    init_conv(module)
    if isinstance(module, TransformerBlock):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
