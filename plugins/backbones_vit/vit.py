"""Vision Transformer, DeiT and their pyramids.

ViT: Dosovitskiy et al., https://arxiv.org/abs/2010.11929. DeiT: Touvron et al., https://arxiv.org/abs/2012.12877.
DeiT III: Touvron et al., https://arxiv.org/abs/2204.07118. Windows and simple pyramid: ViTDet, Li et al.,
https://arxiv.org/abs/2203.16527. Convolutional stem: Xiao et al., https://arxiv.org/abs/2106.14881.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from backbones.errors import InputError, WeightsError
from backbones.layers import Dropout, Resampling, TableCache, init_linear, run_blocks
from backbones.pyramid import Pyramid
from backbones.weights import KeyLayout

from .blocks import ActLayer, Block, NormLayer, make_norm_layer
from .patches import ConvStem, PatchEmbed, foreign_embed
from .tokens import TokenBackbone

STRIDES = (4, 8, 16, 32)

TORCHVISION = KeyLayout(
    "torchvision",
    (
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.conv_bn_relu_(\d+)\.", r"patch_embed.convs.\1."),
        (r"^conv_proj\.(conv_last\.)?", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
        (r"^heads\.pre_logits\.", "pre_logits.fc."),
    ),
)
#: How those who publish weights resize positions, by what `interpolation` calls them.
RESAMPLINGS = {
    "timm": Resampling("bicubic", antialias=True),
    "torchvision": Resampling("bicubic", corners=True),
    "official": Resampling("bicubic"),
}
DEIT3 = KeyLayout("DeiT III", ((r"\.gamma_([12])$", r".ls\1.gamma"),))


def _registers_without_positions(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """DINOv2 gives its registers no position, and the class token one: here it is a part of that token."""
    if not {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        return state
    positions = state["pos_embed"]
    if positions.ndim != 3 or state["cls_token"].shape != positions[:, :1].shape:
        return state
    return {**state, "cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


DINOV2 = KeyLayout(
    "DINOv2",
    (
        (r"^register_tokens$", "reg_token"),
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # in chunks, while it trains
    ),
    _registers_without_positions,
)


class VisionTransformer(TokenBackbone):
    """A plain transformer over image patches, with a pyramid of feature maps for dense tasks.

    Args:
        dim: width.
        depth: number of blocks.
        heads: attention heads per block.
        patch_size: side of a patch, in pixels.
        img_size: side, or (height, width), of the images that the position table was made for; other sizes
            are served by interpolating it at run time.
        mlp_ratio: hidden width of the MLPs over `dim`.
        class_token: whether there is a class token.
        distilled: adds DeiT's distillation token and second head; in training, logits come as a pair.
        reg_tokens: number of register tokens.
        no_embed_class: keep positions off the class and register tokens (DeiT III).
        init_values: start of the layer scale; None for no layer scale.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: what attention logits are multiplied by; one over the root of a head's width unless given.
        qk_norm: norms queries and keys of each head.
        norm_layer: what norms are: a class, or what makes one of a width, or its name in timm.
        act_layer: activation of the MLPs: a class, or its name in timm.
        embed_layer: what turns images into patches, called as timm calls it where sizes vary; see `ForeignEmbed`.
        conv_stem: convolutions that replace the patch projection together with a last 1x1, each as torchvision's
            `ConvStemConfig` or a dict of the same; a width alone is a 3x3 of stride 2, and a pair is (width, stride).
            Strides multiply to `patch_size`.
        representation_size: width of a tanh layer before the classifier.
        pyramid: "simple" (ViTDet: all levels from the last block), "taps" (BEiT: each level from a block of its
            own) or "plain" (the one map of the patches' stride).
        interpolation: how positions are found for other sizes: "timm" (bicubic, antialiased), "torchvision" (bicubic,
            corners aligned), "official" (bicubic: DeiT, DeiT III, DINOv2), or a mode of `F.interpolate`. Published
            weights of torchvision imply its own; a file of weights does not say.
        antialias: whether smaller tables are antialiased, instead of what `interpolation` says.
        taps: for "taps", the four blocks, counted from 1, whose outputs the levels take; a third, half, two
            thirds and all of the depth unless given.
        window_size: side, in patches, of the windows that all but the global blocks attend in; 0 for none.
            Class, distillation and register tokens have no window and are left out then, as in ViTDet.
        global_blocks: with `window_size`, the blocks, counted from 0, that attend globally; the last of each
            quarter of the depth unless given.
        global_pool: of the classifier: "token", any of `backbones.layers.POOLS` over the patches, or "both" (the
            concatenation of token and average).
        output_stride: as in `backbones.Backbone`; below `patch_size`, patches overlap, and positions lie closer.
        **options: those of `backbones.Backbone`; `out_norm=True` applies the final norm before the pyramid.
    """

    own_layout = "timm"
    remedies = (
        (r"\.ls[12]\.gamma$", "layer scales", "build with init_values=1e-5"),
        (r"^reg_token$", "register tokens", "build with reg_tokens and no_embed_class=True"),
        (r"\.attn\.[qk]_norm\.", "norms of queries and keys", "build with qk_norm=True"),
        (r"^(dist_token|head_dist\.)", "parts of a distilled model", "build with distilled=True"),
        (r"^cls_token$", "class token", "build with class_token=True"),
        (r"^pre_logits\.", "a layer before the classifier", "build with representation_size"),
        (r"^(norm|fc_norm)\.", "a norm before or after pooling", "build with the global_pool it was trained with"),
        (r"rope|storage_tokens", "of DINOv3, whose positions are rotary", "use timm/vit_..._dinov3 instead"),
        (r"^norm_pre\.|ln_pre\.", "a norm before the blocks, as CLIP has", "use timm/vit_..._clip_... instead"),
        (r"q_bias$|v_bias$|relative_position", "of BEiT", "use timm/beit... instead"),
        (r"\.mlp\.(w\d+|fc1_g|gate)", "of SwiGLU layers", "use timm's variant instead"),
    )
    output_strides = (8, 16, 32)
    #: What `pyramid` may be.
    pyramids: ClassVar[tuple[str, ...]] = ("simple", "taps", "plain")

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        distilled: bool = False,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        init_values: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        qk_norm: bool = False,
        norm_layer: NormLayer | None = None,
        act_layer: ActLayer | None = None,
        embed_layer: Callable[..., nn.Module] | None = None,
        conv_stem: ConvStem | None = None,
        representation_size: int | None = None,
        pyramid: str = "simple",
        interpolation: str = "timm",
        antialias: bool | None = None,
        taps: Sequence[int] | None = None,
        window_size: int = 0,
        global_blocks: Sequence[int] | None = None,
        global_pool: str = "token",
        output_stride: int = 32,
        **options: Any,
    ):
        if pyramid not in self.pyramids:
            *some, last = map(repr, self.pyramids)
            raise InputError(f"pyramid={pyramid!r} is unknown; choose from {', '.join(some)} and {last}")
        taps = tuple(taps) if taps else tuple(max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1))
        if len(taps) != 4 or list(taps) != sorted(taps) or not 1 <= taps[0] <= taps[-1] <= depth:
            raise InputError(f"taps={taps} must be four ascending blocks from 1 to {depth}")
        #: Pixels from patch to patch; below `patch_size`, patches overlap.
        self.patch_stride = patch_size
        while self.patch_stride > output_stride in (8, 16):
            self.patch_stride //= 2
        self.norm_layer = make_norm_layer(norm_layer)
        self.resampling = _resampling(interpolation, antialias)
        channels, strides, taps = self.levels(pyramid, dim, self.patch_stride, output_stride, depth, taps)
        self.class_token = class_token
        self.distilled = distilled
        super().__init__(
            channels=channels,
            strides=strides,
            global_pool=global_pool,
            output_stride=output_stride,
            img_size=img_size,
            **options,
        )
        self.num_features = dim
        self.patch_size = patch_size
        self.size_divisor = self.patch_stride
        self.pyramid_kind = pyramid
        self.no_embed_class = no_embed_class
        self.representation_size = representation_size

        self.taps = taps
        built = taps[self.out_indices[-1]] if self.features_only else depth
        quarters = tuple(math.ceil(depth * n / 4) for n in (1, 2, 3, 4))
        self.quarters = quarters
        global_blocks = tuple(q - 1 for q in quarters) if global_blocks is None else tuple(global_blocks)
        if any(not 0 <= i < depth for i in global_blocks):
            raise InputError(f"global_blocks={global_blocks} are out of range; blocks count from 0 to {depth - 1}")
        if window_size and not self.features_only:
            raise InputError(
                f"window_size={window_size} leaves out the class token and serves feature maps only; "
                "build the classifier with window_size=0"
            )

        if embed_layer is None:
            self.patch_embed = self.make_patch_embed(dim, patch_size, conv_stem)
        else:
            self.patch_embed = foreign_embed(
                embed_layer, to_2tuple(img_size), patch_size, self.patch_stride, self.in_chans, dim, conv_stem
            )
        self.grid = self._grid(img_size, patch_size)
        self.windowed = window_size > 0
        prefixed = built and not window_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token and prefixed else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if distilled and prefixed else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, dim)) if reg_tokens and prefixed else None
        self.prefix = [t for t in ("cls_token", "dist_token", "reg_token") if getattr(self, t) is not None]
        self.prefix_tokens = sum(getattr(self, t).shape[1] for t in self.prefix)
        self.embedded_prefix = 0 if no_embed_class else self.prefix_tokens
        positions = self.embedded_prefix + math.prod(self.grid)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim)) if built else None
        self._positions = TableCache()
        self.pos_drop = Dropout("pos_drop_rate")

        drop_path = self.drop_path_rates([depth])[0]
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                mlp_ratio,
                init_values,
                drop_path[i],
                window=0 if i in global_blocks else window_size,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                qk_norm=qk_norm,
                norm_layer=self.norm_layer,
                act_layer=act_layer,
            )
            for i in range(built)
        )
        if self.features_only and built:
            if self.out_norm:
                self.norm = self.norm_layer(dim)
            if pyramid != "plain":
                own = [stride for i, stride in zip(self.out_indices, self.strides, strict=True) if taps[i]]
                self.pyramid = Pyramid(dim, self.patch_stride, own, halve=pyramid == "simple")
        self.apply(init_linear)
        if built:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in self.prefix:
            nn.init.normal_(getattr(self, token), std=1e-6 if token == "cls_token" else 0.02)

    def forward_features(self, images: Tensor) -> list[Tensor] | Tensor:
        """Maps by index; of a classifier, the normed tokens (B, prefix tokens + patches, dim)."""
        return self.forward_patches(self.embed_patches(self.pad(images)))

    def embed_patches(self, images: Tensor) -> Tensor:
        """Patches (B, h, w, dim) of padded images."""
        return self.patch_embed(images)

    def forward_patches(self, x: Tensor) -> dict[int, Tensor] | Tensor:
        """What `forward_features` returns, from embedded patches (B, h, w, dim)."""
        height, width = x.shape[1:3]
        x = self.pos_drop(self._embed(x))
        if not self.features_only:
            return self.norm(
                run_blocks(self.blocks, x, checkpointing=self.checkpointing and self.training).flatten(1, -2)
            )

        indices = [i for i in self.out_indices if self.taps[i]]
        wanted = {self.taps[i]: None for i in indices}
        start = 0
        for end in wanted:
            x = run_blocks(self.blocks[start:end], x, checkpointing=self.checkpointing and self.training)
            patches = self.norm(x) if self.out_norm else x
            if self.prefix_tokens:
                patches = patches[:, self.prefix_tokens :]
            if patches.ndim == 3:
                patches = patches.unflatten(1, (height, width))
            wanted[end] = patches.permute(0, 3, 1, 2)
            start = end
        maps = [wanted[self.taps[i]] for i in indices]
        return dict(zip(indices, maps if self.pyramid_kind == "plain" else self.pyramid(maps), strict=True))

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        return {
            "stem": r"^cls_token|dist_token|reg_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @property
    def key_layouts(self) -> tuple[KeyLayout, ...]:
        return tuple(map(self.norm_where_it_is, (KeyLayout(self.own_layout), TORCHVISION, DEIT3, DINOV2)))

    @property
    def left_out(self) -> tuple[str, ...]:
        return ("cls_token", "dist_token", "reg_token") if self.windowed else ()

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", *self.prefix}

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem with tokens and positions, then the blocks in quarters."""
        stem = [self.patch_embed, self.pos_embed, *(getattr(self, t) for t in self.prefix)]
        bounds = [0, *self.quarters]
        return [stem, *(list(self.blocks[a:b]) for a, b in pairwise(bounds))]

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None, **options: Any
    ) -> None:
        """Resizes the position table to images of another size, as in timm; that of patches stays."""
        same = patch_size is not None and to_2tuple(patch_size) == to_2tuple(self.patch_size)
        super().set_input_size(img_size, patch_size=None if same else patch_size, **options)
        if img_size is None or self.pos_embed is None:
            return
        grid = self._grid(img_size, self.patch_size)
        resized = self.positions(*grid).detach()
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self.grid, self._positions = grid, TableCache()
        self.build_options["img_size"] = list(to_2tuple(img_size))

    def levels(
        self, pyramid: str, dim: int, patch_stride: int, output_stride: int, depth: int, taps: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Of each map: width, stride, and the block, counted from 1, that it comes from; 0 for none.

        Called before anything is built.
        """
        strides = (patch_stride,) if pyramid == "plain" else tuple(min(s, output_stride) for s in STRIDES)
        channels = Pyramid.channels(dim, patch_stride, strides, halve=pyramid == "simple")
        return channels, strides, taps if pyramid == "taps" else (depth,) * len(strides)

    def make_patch_embed(self, dim: int, patch_size: int, conv_stem: ConvStem | None) -> nn.Module:
        """What turns images into patches (B, h, w, dim)."""
        return PatchEmbed(self.in_chans, dim, patch_size, self.patch_stride, conv_stem)

    def make_out_norm(self, channels: int) -> nn.Module:
        return nn.Identity()  # the final norm stands before the pyramid

    def adapt_table(self, name: str, value: Tensor, checkpoint: Mapping[str, Tensor]) -> Tensor:
        """The position table of a checkpoint, resized to this model's grid, with this model's prefix rows."""
        if name != "pos_embed" or value.ndim != 3 or value.shape[-1] != self.num_features:
            return value
        rows = value.shape[1]
        tokens = sum(checkpoint[t].shape[1] for t in ("cls_token", "dist_token", "reg_token") if t in checkpoint)
        for prefix in (0, tokens) if self.no_embed_class else (tokens,):
            side = math.isqrt(max(0, rows - prefix))
            grid = self.grid if rows - prefix == math.prod(self.grid) else (side, side)
            if rows - prefix == math.prod(grid):
                break
        else:
            raise WeightsError(
                f"pos_embed has {rows} rows for {tokens} tokens and patches, which are neither a square grid nor the "
                f"model's {self.grid}; build the model with the img_size=(height, width) that the checkpoint was "
                "trained at, and with no_embed_class=True if its tokens have no positions"
            )
        patches = self.resampling(value[:, prefix:], grid, self.grid).flatten(1, 2)
        kept = value[:, : min(prefix, self.embedded_prefix)]
        fresh = value.new_zeros(1, self.embedded_prefix - kept.shape[1], value.shape[-1])
        return torch.cat((kept, fresh, patches), dim=1)

    def positions(self, height: int, width: int) -> Tensor:
        """(1, rows, dim): those of the prefix tokens that have one, then of height x width patches."""
        prefix, patches = self.pos_embed.tensor_split((self.embedded_prefix,), dim=1)
        return torch.cat((prefix, self.resampling(patches, self.grid, (height, width)).flatten(1, 2)), dim=1)

    def _grid(self, img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
        """How many patches images of a size have along each side."""
        height, width = (side // patch_size for side in to_2tuple(img_size))
        if min(height, width) < 1:
            raise InputError(f"img_size={img_size} is smaller than a patch of {patch_size}")
        return height, width

    def _embed(self, x: Tensor) -> Tensor:
        """Patches (B, h, w, dim) with positions and prefix tokens: (B, tokens, dim); windowed models stay 4-D."""
        batch, height, width, _ = x.shape
        key = (height, width, x.device, x.dtype)
        resized = partial(self.positions, height, width)
        positions = self._positions.get(key, resized) if self.fast else resized()
        if not self.prefix:
            return x + positions.reshape(1, height, width, -1)
        x = x.flatten(1, 2)
        tokens = [getattr(self, t) for t in self.prefix]
        if self.no_embed_class:
            x = x + positions
        else:
            tokens = [torch.cat(tokens, dim=1) + positions[:, : self.prefix_tokens]]
            x = x + positions[:, self.prefix_tokens :]
        return torch.cat([*(t.expand(batch, -1, -1) for t in tokens), x], dim=1)


def _resampling(interpolation: str, antialias: bool | None) -> Resampling:
    """What the options of those names say."""
    found = RESAMPLINGS.get(interpolation)
    if found is None:
        if interpolation not in ("bicubic", "bilinear", "nearest"):
            known = ", ".join(map(repr, (*RESAMPLINGS, "bicubic", "bilinear", "nearest")))
            raise InputError(f"interpolation={interpolation!r} is unknown; choose from {known}")
        found = Resampling(interpolation, antialias=interpolation != "nearest")
    return found if antialias is None else replace(found, antialias=antialias)
