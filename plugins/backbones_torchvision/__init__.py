"""torchvision's classification models, as a plugin: `torchvision/resnet50` and the others, found by name."""

from dataclasses import replace

from backbones import BackboneSpec, hookimpl
from backbones.registry import resolve

from .table import ELSEWHERE, FAMILIES, MODELS, REFUSED, weights

BACKBONES_API = 1


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """None: the namespace keeps torchvision's names apart from those of our own families."""
    return []


@hookimpl
def catalogue() -> list[str]:
    """torchvision's names of the models that keep the promise."""
    return [*MODELS, *ELSEWHERE]


@hookimpl
def find_backbone(name: str) -> BackboneSpec | None:
    """The spec of a torchvision model; of one that is not offered, a spec that says why when it is built."""
    if name in REFUSED:
        return _refused(name)
    if name in ELSEWHERE:
        return _elsewhere(name)
    if name not in MODELS:
        return None
    model, family = MODELS[name], FAMILIES[MODELS[name].family]
    return BackboneSpec(
        name=name,
        family=model.family,
        entry="backbones_torchvision.models:TorchvisionBackbone",
        channels=model.channels,
        strides=(4, 8, 16, 32),
        defaults={"model": name, "channels": model.channels},
        weights=weights(name),
        params=model.params,
        gmacs=model.gmacs,
        options=("norm_layer",),
        layer_decay=0.95 if model.family == "ConvNeXt" else 1.0,
        summary=f"torchvision's {name}: {family.summary}",
        paper=family.paper,
        license="BSD-3-Clause",
    )


def _elsewhere(name: str) -> BackboneSpec:
    """The spec of another plugin, with torchvision's weights alone."""
    spec = resolve(f"{ELSEWHERE[name]}/{name}")
    rows = tuple(replace(row, aliases=()) for row in spec.weights if row.enum)
    return replace(spec, name=name, aliases=(), weights=rows, timm_name="")


def _refused(name: str) -> BackboneSpec:
    refused = REFUSED[name]
    return BackboneSpec(
        name=name,
        family=refused.family,
        entry="backbones_torchvision.models:refuse",
        channels=(refused.channels,),
        strides=(refused.stride,),
        defaults={"model": name},
        summary=f"not offered: {refused.reason}",
        license="BSD-3-Clause",
    )
