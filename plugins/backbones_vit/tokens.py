"""What plain and hybrid transformers make of their tokens: logits, and the features of each block."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.intermediates import Indices, take_indices
from backbones.layers import POOLS, init_linear, pool_tokens, run_blocks
from backbones.weights import KeyLayout


class TokenBackbone(Backbone):
    """A backbone whose classifier reads normed tokens (B, prefix tokens + patches, dim).

    Averages and maxima are normed after pooling.
    """

    new_parts = ("head", "head_dist", "fc_norm", "pre_logits", "pyramid", "dist_token")
    global_pools = ("token", "both", *POOLS)

    blocks: nn.ModuleList
    class_token: bool
    distilled: bool
    prefix_tokens: int
    representation_size: int | None
    fc_norm: nn.Module
    norm_layer: Callable[[int], nn.Module]

    @property
    def head_hidden_size(self) -> int:
        return self.representation_size or self.pooled_features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, num_classes) of tokens; of a distilled model in training, the pair of both heads."""
        if self.distilled:
            pair = [self._drop(features[:, i] if self.global_pool else features) for i in (0, 1)]
            if not pre_logits:
                pair = [self.head(pair[0]), self.head_dist(pair[1])]
                if self.training:
                    return tuple(pair)
            return (pair[0] + pair[1]) / 2
        pooled = pool_tokens(features, self.global_pool, self.prefix_tokens)
        x = self._drop(self.pre_logits(self.fc_norm(pooled)))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The layer that yields the logits; of a distilled model, both, as in timm."""
        return (self.head, self.head_dist) if self.distilled else self.head

    def check_pool(self, global_pool: str) -> None:
        super().check_pool(global_pool)
        if self.features_only:
            return
        if self.distilled and (global_pool not in ("token", "") or not self.class_token):
            raise InputError(
                f"global_pool={global_pool!r}, class_token={self.class_token}: a distilled classifier reads the class "
                "and distillation tokens; use global_pool='token' and class_token=True"
            )
        if not self.class_token and global_pool in ("token", "both"):
            raise InputError(f"global_pool={global_pool!r} needs class_token=True; use global_pool='avg'")

    def make_norm(self) -> nn.Module:
        return self.norm_layer(self.num_features)

    def make_head(self) -> None:
        norm = self.fc_norm if isinstance(self.norm, nn.Identity) else self.norm
        after = self.global_pool in ("avg", "max", "avgmax")
        self.norm, self.fc_norm = (nn.Identity(), norm) if after else (norm, nn.Identity())
        width, size = self.pooled_features, self.representation_size
        if not size:
            self.pre_logits = nn.Identity()
        elif not isinstance(self.pre_logits, nn.Sequential) or self.pre_logits.fc.in_features != width:
            fc = nn.Linear(width, size)
            init_linear(fc)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        for name in ("head", "head_dist")[: 2 if self.distilled else 1]:
            head = nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes else nn.Identity()
            setattr(self, name, head.apply(init_linear))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]] | dict[str, Any]:
        """Patches of each block, and the final tokens, as timm's ViT returns them.

        Args:
            x: images (B, in_chans, H, W).
            indices: of the blocks: None (all), an int for the last n, or indices from 0 or from the end.
            return_prefix_tokens: return pairs of patches and prefix tokens.
            norm: apply the final norm to each.
            stop_early: leave out blocks beyond the last that is asked for.
            output_fmt: of patches: "NCHW", (B, dim, h, w), or "NLC", (B, h * w, dim).
            intermediates_only: leave out the final tokens.
            output_dict: return "image_intermediates", "image_intermediates_prefix" and "image_features" by name.

        Raises:
            InputError: there are no such blocks, or no final norm, because it was built for maps without `out_norm`.
        """
        name = getattr(self, "canonical_name", type(self).__name__)
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"{name}: output_fmt={output_fmt!r} is unknown; patches are 'NCHW' or 'NLC'")
        if not hasattr(self, "norm") and (norm or not intermediates_only):
            raise InputError(
                f"{name} was built for maps, without the final norm: give intermediates_only=True and norm=False, or "
                "build it with features_only=False or out_norm=True"
            )
        self._check_images(x)
        taken, last = take_indices(name, indices, len(self.blocks))
        patches = self.embed_patches(self.pad(x))
        grid = patches.shape[1:3]
        tokens = self.pos_drop(self._embed(patches))
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = run_blocks([block], tokens, checkpointing=self.checkpointing and self.training)
            if i in taken:
                found.append((self.norm(tokens) if norm else tokens).flatten(1, -2))
        count = self.prefix_tokens
        prefixes = [each[:, :count] for each in found]
        maps = [each[:, count:] for each in found]
        if output_fmt == "NCHW":
            maps = [each.mT.unflatten(2, grid).contiguous() for each in maps]
        final = None if intermediates_only else self.norm(tokens).flatten(1, -2)
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if count and return_prefix_tokens:
                named["image_intermediates_prefix"] = prefixes
            return named if final is None else named | {"image_features": final}
        pairs = list(zip(maps, prefixes, strict=True)) if count and return_prefix_tokens else maps
        return pairs if final is None else (final, pairs)

    def norm_where_it_is(self, layout: KeyLayout) -> KeyLayout:
        """A layout whose norm goes where this classifier has its own: before pooling or after."""
        if not isinstance(getattr(self, "fc_norm", nn.Identity()), nn.Identity):
            return KeyLayout(layout.name, (*layout.renames, (r"^norm\.", "fc_norm.")), layout.prepare)
        return layout

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drop_rate, self.training)
