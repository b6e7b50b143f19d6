"""Pyramid Vision Transformer (Wang et al., https://arxiv.org/abs/2102.12122)."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import (
    POOLS,
    Blocks,
    Dropout,
    Layer,
    Mlp,
    PatchEmbed,
    Resampling,
    SpatialReductionAttention,
    TableCache,
    ceil_div,
    init_conv,
    init_linear,
    pool_tokens,
    residual,
)
from backbones.weights import KeyLayout, split_in_proj

OFFICIAL = KeyLayout(
    "official",
    (
        *((rf"^patch_embed{n}\.", f"stages.{n - 1}.embed.") for n in range(1, 5)),
        *((rf"^pos_embed{n}$", f"stages.{n - 1}.pos_embed") for n in range(1, 5)),
        *((rf"^block{n}\.", f"stages.{n - 1}.blocks.") for n in range(1, 5)),
        (r"^cls_token$", "stages.3.cls_token"),
    ),
)


RESAMPLING = Resampling("bilinear")  # of the official code


def _count_blocks_from_zero(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab's list of a stage's blocks begins with the positions."""
    return {
        re.sub(r"(layers\.\d\.1\.)(\d+)\.(?!pos_embed)", lambda m: f"{m[1]}{int(m[2]) - 1}.", key): value
        for key, value in split_in_proj(state).items()
    }


OPENMMLAB = KeyLayout(
    "OpenMMLab",
    (
        (r"^layers\.(\d)\.0\.projection\.", r"stages.\1.embed.proj."),
        (r"^layers\.(\d)\.0\.norm\.", r"stages.\1.embed.norm."),
        (r"^layers\.(\d)\.1\.0\.pos_embed$", r"stages.\1.pos_embed"),
        (r"^layers\.(\d)\.1\.", r"stages.\1.blocks."),
        (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
        (r"\.attn\.attn\.", ".attn."),
        *((rf"\.ffn\.layers\.{i}\.", f".mlp.{name}.") for i, name in ((0, "fc1"), (3, "fc2"))),
    ),
    _count_blocks_from_zero,
)


def _stack_keys_and_values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers has a linear layer each for keys and values."""
    stacked = {}
    for key, value in state.items():
        if ".self.key." in key and (values := state.get(key.replace(".key.", ".value."))) is not None:
            stacked[key.replace(".key.", ".kv.")] = torch.cat((value, values))
        elif ".self.value." not in key:
            stacked[key] = value
    return stacked


TRANSFORMERS = KeyLayout(
    "transformers",
    (
        (r"^pvt\.encoder\.", ""),
        (r"^patch_embeddings\.(\d)\.cls_token$", r"stages.\1.cls_token"),
        (r"^patch_embeddings\.(\d)\.position_embeddings$", r"stages.\1.pos_embed"),
        (r"^patch_embeddings\.(\d)\.projection\.", r"stages.\1.embed.proj."),
        (r"^patch_embeddings\.(\d)\.layer_norm\.", r"stages.\1.embed.norm."),
        (r"^block\.(\d)\.", r"stages.\1.blocks."),
        (r"\.layer_norm_([12])\.", r".norm\1."),
        (r"\.attention\.self\.query\.", ".attn.q."),
        (r"\.attention\.self\.sequence_reduction\.", ".attn.sr."),
        (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
        (r"\.attention\.self\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
        (r"^layer_norm\.", "norm."),
        (r"^classifier\.", "head."),
    ),
    _stack_keys_and_values,
)


class PyramidVisionTransformer(Backbone):
    """Four stages of transformer blocks at strides 4, 8, 16 and 32, each with position embeddings of its own.

    Maps are those of the official dense-prediction code, which has no class token and no norm after a stage. The
    classifier has a class token in its last stage, and logits come from that.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        sr_ratios: how much each stage shrinks keys and values along each side; the classifier's last is 1.
        mlp_ratios: hidden width of each stage's MLP over its width.
        img_size: side, or (height, width), of the images that the position tables are made for; for maps of other
            sizes they are interpolated bilinearly, as the official code does.
        global_pool: of the classifier: "token", any of `backbones.layers.POOLS` over the cells, or "both".
        **options: those of `backbones.Backbone`.
    """

    stem_pattern = r"^stages\.0\.(?:embed|pos_embed)"
    key_layouts = (OFFICIAL, OPENMMLAB, TRANSFORMERS)
    global_pools = ("token", "both", *POOLS)
    output_strides = (8, 16, 32)

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), global_pool=global_pool, img_size=img_size, **options)
        if not self.features_only and sr_ratios[-1] != 1:
            raise InputError(
                f"{type(self).__name__}: sr_ratios={tuple(sr_ratios)} end with more than 1, where a classifier's class "
                "token, which has no place in a map, cannot be reduced; let them end with 1"
            )
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        drop_path = self.drop_path_rates(depths)
        self.stem = nn.Identity()
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(
                    embed=PatchEmbed(*((dims[i - 1], dims[i], 2) if i else (self.in_chans, dims[0], 4)), dilation),
                    grid=tuple(ceil_div(side, stride) for side in sides),
                    blocks=[
                        Block(
                            dims[i],
                            SpatialReductionAttention(dims[i], heads[i], sr_ratios[i]),
                            Mlp(dims[i], int(dims[i] * mlp_ratios[i])),
                            rate,
                        )
                        for rate in drop_path[i]
                    ],
                    dim=dims[i],
                    token=not self.features_only and i == 3,
                )
                for i, (stride, dilation) in enumerate(zip((4, 8, 16, 32), self.dilations, strict=True))
            )
        )
        self.apply(_init_weights)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of tokens (B, 1 + cells, C), that of the class first; or what the head sees."""
        x = F.dropout(pool_tokens(features, self.global_pool), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    @property
    def runs_stages(self) -> bool:
        return self.features_only  # the classifier's last stage has tokens, not a map

    def make_norm(self) -> nn.Module:
        return nn.LayerNorm(self.num_features, eps=1e-6)

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        first = self.stages[0]
        return [[first.embed, first.pos_embed], *([stage] for stage in self.stages)]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def adapt_table(self, name: str, value: Tensor, checkpoint: Mapping[str, Tensor]) -> Tensor:
        owner = self.get_submodule(name.rpartition(".")[0])
        return owner.fit(value) if isinstance(owner, Stage) else super().adapt_table(name, value, checkpoint)


class Stage(Layer):
    """(B, C_in, H, W) -> (B, dim, ceil(H / stride), ceil(W / stride)); or, with a class token, (B, 1 + cells, dim).

    Args:
        embed: what cuts the map into patches.
        grid: height and width of the map that the position table is made for.
        blocks: what follows it.
        dim: width.
        token: whether there is a class token, whose position is the table's first.
    """

    def __init__(
        self, embed: nn.Module, grid: tuple[int, int], blocks: Sequence[nn.Module], dim: int, token: bool = False
    ):
        super().__init__()
        self.embed = embed
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, token + math.prod(grid), dim))
        self.pos_drop = Dropout("pos_drop_rate")
        self.blocks = Blocks(*blocks)
        self._positions = TableCache(entries=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.positions(*x.shape[1:3])
        if self.cls_token is None:
            return self.blocks(self.pos_drop(x)).permute(0, 3, 1, 2)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        tokens = self.pos_drop(torch.cat((token, x.flatten(1, 2)), dim=1))
        return self.blocks(tokens[:, None])[:, 0]  # blocks take maps: these have one row

    def positions(self, height: int, width: int) -> Tensor:
        """What is added to a map: (1, height, width, dim)."""

        def resized() -> Tensor:
            cells = self.pos_embed if self.cls_token is None else self.pos_embed[:, 1:]
            return RESAMPLING(cells, self.grid, (height, width))

        if not self.fast:
            return resized()
        table = self.pos_embed
        return self._positions.get((height, width, table.device, table.dtype), resized)

    def fit(self, table: Tensor) -> Tensor:
        """A checkpoint's table (1, rows, dim) in this one's shape; the class token's row comes and goes."""
        rows = table.shape[1]
        for tokens in (0, 1):
            side = math.isqrt(rows - tokens)
            grid = self.grid if rows - tokens == math.prod(self.grid) else (side, side)
            if rows - tokens == math.prod(grid):
                break
        else:
            raise InputError(
                f"a table of {rows} positions is neither that of a square map nor of one of {self.grid} cells; build "
                "the model with the img_size=(height, width) that the checkpoint was trained at"
            )
        cells = RESAMPLING(table[:, tokens:], grid, self.grid).flatten(1, 2)
        token = table[:, :tokens] if tokens else cells.new_zeros(1, 1, cells.shape[-1])
        return cells if self.cls_token is None else torch.cat((token, cells), dim=1)


class Block(Layer):
    """Attention and MLP with residuals, on maps (B, H, W, C)."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.attn(self.norm1(x))), spare=self.fast)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), spare=self.fast)


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    init_conv(module)
    if isinstance(module, Stage):
        for table in (module.pos_embed, module.cls_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
