"""What of a backbone is its classifier: `features_only=False` builds it, after timm's interface."""

from typing import ClassVar

from torch import Tensor, nn

from .errors import InputError
from .layers import POOLS, Layer, init_linear, over_channels, pool

__all__ = ["Classifier"]


class Classifier(Layer):
    """The classifying part of `Backbone`: a norm, pooling, what stands before the last layer, and that layer."""

    global_pools: ClassVar[tuple[str, ...]] = POOLS
    new_parts: ClassVar[tuple[str, ...]] = ("head", "out_norms")

    #: Width of what `make_pre_logits` returns, where that is not what is pooled.
    hidden_features: int | None = None
    features_only: bool
    num_features: int
    num_classes: int
    drop_rate: float
    global_pool: str
    norm: nn.Module
    pre_logits: nn.Module
    head: nn.Module

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if "forward_head" in vars(cls) and "global_pools" not in vars(cls):
            cls.global_pools = ("avg",)  # what a forward of its own pools by, it says itself

    @property
    def pooled_features(self) -> int:
        """Width of what the pooling yields: twice the map's where it concatenates."""
        return self.num_features * (2 if self.global_pool in ("both", "catavgmax") else 1)

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier's last layer sees, as in timm."""
        return self.hidden_features or self.pooled_features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of unpooled features (B, C, h, w), or maps of logits with `global_pool=""`.

        With `pre_logits`, what the last layer sees.
        """
        x = over_channels(self.pre_logits, pool(features, self.global_pool))
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else over_channels(self.head, x)

    def get_classifier(self) -> nn.Module:
        """The layer that yields the logits, as in timm."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier's last layer by a fresh one for `num_classes`, as in timm; 0 for none.

        Args:
            num_classes: of the new layer.
            global_pool: another pooling; "" for none, so that maps or tokens are returned.
        """
        if self.features_only:
            raise InputError(f"{type(self).__name__}: build it with features_only=False to have a classifier")
        width = self.pooled_features
        if global_pool is not None:
            self.check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        if self.pooled_features != width:
            self._add_pre_logits()
        self.make_head()
        for name, part in self.named_children():
            if name in ("pre_logits", *self.new_parts):
                part.to(device=like.device, dtype=like.dtype).train(self.training)

    # What architectures use

    def check_pool(self, global_pool: str) -> None:
        """Raise InputError unless the classifier can pool so."""
        if global_pool not in self.global_pools:
            *some, last = map(repr, self.global_pools)
            known = f"{', '.join(some)} and {last}" if some else last
            token = "; it has no class token" if global_pool in ("token", "both") else ""
            raise InputError(
                f"{type(self).__name__}: global_pool={global_pool!r} is unknown{token}; choose from {known}"
            )

    def make_norm(self) -> nn.Module:
        """Norm between a classifier's last stage and its pooling; none unless an architecture has one."""
        return nn.Identity()

    def make_pre_logits(self) -> nn.Module:
        """What a classifier has between its pooling and the layer that yields logits; nothing as a rule.

        It is given vectors or, without pooling, maps, of `pooled_features` channels in the last dimension, and returns
        `head_hidden_size`.
        """
        return nn.Identity()

    def _add_pre_logits(self) -> None:
        """Sets `pre_logits`, which is new by nature where published weights have a narrower one."""
        self.pre_logits = self.make_pre_logits().apply(init_linear)
        if self.pooled_features != self.num_features and next(self.pre_logits.parameters(), None) is not None:
            self.new_parts = (*self.new_parts, "pre_logits")  # type: ignore[misc]

    def make_head(self) -> None:
        """Sets `head`, the layer that yields logits; anew in `reset_classifier`."""
        self.head = nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes else nn.Identity()
        self.head.apply(init_linear)
