"""Classification models: any backbone, with its published classifier or one on its last map."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backbones import Backbone, build_backbone, layers
from backbones.errors import InputError

from ..options import nearest
from .base import BackboneLike, HoldsBackbone, backbone_options, make_backbone, recorded

#: Pooling as users call it, and as timm's classifiers do.
POOLS = {
    **{kind: kind for kind in ("avg", "max", "avgmax", "catavgmax", "token", "both")},
    "cls": "token",
}
#: What a head of ours can do on the last map, where a published classifier cannot.
_ON_MAPS = ("avg", "max", "avgmax", "catavgmax")
# Options of `build_backbone` that are ours to give.
_OURS = ("features_only", "num_classes", "drop_rate", "global_pool")


def build_classifier(
    *, backbone: BackboneLike, num_classes: int, pool: str | None = None, drop_rate: float = 0.0
) -> "Classifier":
    """Build a model that tells the class of images of any size.

    A backbone by name gets the classifier that its architecture was published with, so that pretrained weights bring
    their last layer where the number of classes is theirs. Where there is none, or none that pools so, where the
    options are for feature maps, and on modules, it is a norm and a linear layer on the pooled last map.

    Args:
        backbone: a name, a dict of `build_backbone` options that includes "name", or a module with timm's
            `feature_info` that returns a list of maps; or a classifier of so many classes that `build_backbone` made
        num_classes: number of classes
        pool: "avg", "max", "avgmax" (their mean) or "catavgmax" (both, so that the last layer is twice as wide) over
            the last map; "token" or "cls", the class token, or "both", token and average, of vision transformers; None
            for what the architecture was published with
        drop_rate: dropout before the last layer

    Returns:
        a module from (B, C, H, W) to logits (B, num_classes); distilled models in training mode, to a pair of them,
        of both their heads

    Raises:
        InputError: an option that cannot work, or a backbone that has no such pooling
    """
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}: a classifier needs at least one class")
    if not 0 <= drop_rate < 1:
        raise InputError(f"drop_rate={drop_rate} must be at least 0 and under 1")
    if pool is not None and pool not in POOLS:
        raise InputError(f"unknown pool {pool!r}; {nearest(pool, POOLS)}")
    own = {"num_classes": num_classes, "pool": pool, "drop_rate": drop_rate}
    if isinstance(backbone, nn.Module):
        return recorded(_on_module(backbone, **own), "classification", **own)
    options = backbone_options(backbone, "a classifier")
    if given := [name for name in _OURS if name in options]:
        raise InputError(
            f"the backbone options have {', '.join(given)}, which build_classifier decides; give it num_classes, "
            "drop_rate and pool instead"
        )
    name = options.pop("name")
    on_maps = pool in _ON_MAPS
    try:
        published = build_backbone(name, features_only=False, num_classes=num_classes, drop_rate=drop_rate, **options)
    except InputError:  # no published classifier; if that is not why, the maps below are refused as well
        if pool is not None and not on_maps:
            raise
    else:
        try:
            return recorded(Classifier(_with_pool(published, pool)), "classification", **own)
        except InputError:
            if not on_maps or pool == "avg":
                raise
    options.setdefault("out_indices", (-1,))
    return recorded(_on_module(build_backbone(name, **options), **own), "classification", **own)


def map_indices(strides: Mapping[int, int], **options: Any) -> list[int]:
    """Which of a backbone's maps a classifier takes, given the stride of each by its index."""
    return [max(strides)]


class Classifier(HoldsBackbone):
    """A backbone and what makes logits of it; see `build_classifier`.

    Args:
        backbone: module from (B, C, H, W) to logits; or to a list of maps, if there is a head
        head: module from the last map to logits
    """

    low_precision = True  # see `backbones.for_inference`

    def __init__(self, backbone: nn.Module, head: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, num_classes) of images (B, C, H, W); of distilled models in training, the pair of both heads."""
        features = self.backbone(images)
        return features if self.head is None else self.head(features[-1])

    if TYPE_CHECKING:  # torch says that calling a module gives Any
        __call__ = forward

    def saved_options(self) -> dict[str, Any]:
        """What `build_classifier` takes; the published classifier in the backbone tells how itself it pools now."""
        if self.head is not None:
            return self.build_options
        return {**self.build_options, "num_classes": self.backbone.num_classes, "pool": None}


class PooledHead(nn.Module):
    """Logits of a map (B, C, h, w): pooled, normed, because the maps of many backbones are not, and classified.

    Args:
        channels: width of the map
        num_classes: number of classes
        pool: one of `backbones.layers.POOLS`
        drop_rate: dropout before the last layer
    """

    def __init__(self, channels: int, num_classes: int, pool: str = "avg", drop_rate: float = 0.0):
        super().__init__()
        self.pool = pool
        channels *= 2 if pool == "catavgmax" else 1
        self.norm = nn.LayerNorm(channels)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(layers.pool(features, self.pool))))

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}"


def _on_module(backbone: nn.Module, *, num_classes: int, pool: str | None, drop_rate: float) -> Classifier:
    make_backbone(backbone, "a classifier")  # refuses what tells no channels
    name = _name(backbone)
    published = isinstance(backbone, Backbone) and not backbone.features_only
    if published and (backbone.num_classes, backbone.drop_rate) == (num_classes, drop_rate):
        return Classifier(_with_pool(backbone, pool))
    if not hasattr(backbone.feature_info, "channels") or not getattr(backbone, "features_only", True):
        raise InputError(f"{name} is a classifier already; give its name, or build it with features_only=True")
    if pool is not None and pool not in _ON_MAPS:
        raise InputError(f"pool={pool!r}: {name} returns maps, which hold no class token; choose from {_ON_MAPS}")
    channels = backbone.feature_info.channels()[-1]
    return Classifier(backbone, PooledHead(channels, num_classes, pool or "avg", drop_rate))


def _with_pool(model: Backbone, pool: str | None) -> Backbone:
    """A published classifier whose pooling is the one asked for; its last layer is fresh where that is another."""
    now: Any = getattr(model.global_pool, "pool_type", model.global_pool)  # timm's may be a module
    if pool is None or now == POOLS[pool]:
        return model
    try:
        model.reset_classifier(model.num_classes, POOLS[pool])
    except Exception as error:  # whatever a plugin's model says to a pooling that it does not know
        raise InputError(f"pool={pool!r} does not work with {_name(model)}: {error}") from error
    return model


def _name(module: nn.Module) -> str:
    return getattr(module, "canonical_name", type(module).__name__)
