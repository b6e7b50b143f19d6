"""timm's models, as a plugin: found by name in a table of what was measured, so that listing them imports no torch."""

from importlib.metadata import version

from backbones import BackboneSpec, hookimpl
from backbones.specs import transformer_layer_decay

from . import table

BACKBONES_API = 1

# timm's modules of plain vision transformers
_PLAIN = ("beit", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_sam")


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """Nothing: the catalogue is too large to list beside other plugins' backbones."""
    return []


@hookimpl
def catalogue() -> list[str]:
    """Names of all models of the version of timm that the table was measured with."""
    return table.names()


@hookimpl
def find_backbone(name: str) -> BackboneSpec | None:
    """A model of the table, under a name that timm has given up, perhaps.

    Or one that is measured now: somebody's own, registered with timm, or a newer timm's.
    """
    current, _ = table.former().get(name, (name, ""))
    facts = None if table.is_users(current) else table.models().get(current)
    if facts is not None:
        return describe(facts, table.weights(current)).under(name)
    newer = "." not in name and _is_newer(version("timm"), table.measured_with())
    if not (newer or table.is_users(name)):
        return None
    import timm

    if not timm.is_model(name):
        return None
    from .measure import measure, published

    return describe(measure(name), tuple(published(name)))


def describe(facts: table.Facts, weights: tuple = ()) -> BackboneSpec:
    """The spec of a model."""
    channels = facts.channels or (1,)
    return BackboneSpec(
        name=facts.name,
        family=f"timm {facts.module}",
        entry="backbones_timm.model:TimmBackbone",
        channels=channels,
        strides=(4, 8, 16, 32)[-len(channels) :],
        defaults={"model_name": facts.name},
        weights=weights,
        params=facts.params or None,
        options=_options(facts),
        layer_decay=_layer_decay(facts),
        summary=facts.sizes,
        license="Apache-2.0",
    )


def _layer_decay(facts: table.Facts) -> float:
    if facts.module in _PLAIN and facts.blocks:
        return transformer_layer_decay(facts.blocks)
    return 0.95 if facts.module == "convnext" else 1.0


def _options(facts: table.Facts) -> tuple[str, ...]:
    has = {
        "img_size": bool(facts.side),
        "pyramid": [level.stride for level in facts.levels] != [4, 8, 16, 32],
        "output_stride": len(facts.output_strides) > 1,
    }
    return tuple(option for option, given in has.items() if given and not facts.refused)


def _is_newer(installed: str, measured: str) -> bool:
    from packaging.version import Version

    return Version(installed) > Version(measured)
