"""The classifier of plain and hybrid transformers: on the class token, on pooled patches, or on both."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import POOLS, init_linear, pool_tokens
from backbones.weights import KeyLayout


class TokenClassifier(Backbone):
    """Logits of normed tokens (B, prefix tokens + patches, dim); averages and maxima are normed after pooling."""

    new_parts = ("head", "head_dist", "fc_norm", "pre_logits", "pyramid", "dist_token")
    global_pools = ("token", "both", *POOLS)

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

    def norm_where_it_is(self, layout: KeyLayout) -> KeyLayout:
        """A layout whose norm goes where this classifier has its own: before pooling or after."""
        if not isinstance(getattr(self, "fc_norm", nn.Identity()), nn.Identity):
            return KeyLayout(layout.name, (*layout.renames, (r"^norm\.", "fc_norm.")), layout.prepare)
        return layout

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drop_rate, self.training)
