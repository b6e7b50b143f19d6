"""torchvision's classification models, as a plugin: `torchvision/resnet50` and the others, found by name."""

from backbones import BackboneSpec, Weights, hookimpl

from .table import FAMILIES, MODELS, REFUSED, Published

BACKBONES_API = 1


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """None: the namespace keeps torchvision's names apart from those of our own families."""
    return []


@hookimpl
def catalogue() -> list[str]:
    """torchvision's names of the models that keep the promise."""
    return list(MODELS)


@hookimpl
def find_backbone(name: str) -> BackboneSpec | None:
    """The spec of a torchvision model; of one that is not offered, a spec that says why when it is built."""
    if name in REFUSED:
        return _refused(name)
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
        weights=[_weights(row) for row in model.weights],
        params=model.params,
        gmacs=model.gmacs,
        options=("weights", "norm_layer", "output_stride")
        if len(model.output_strides) > 1
        else ("weights", "norm_layer"),
        layer_decay=0.95 if model.family == "ConvNeXt" else 1.0,
        summary=f"torchvision's {name}: {family.summary}",
        paper=family.paper,
        license="BSD-3-Clause",
    )


def _weights(row: Published) -> Weights:
    return Weights(
        tag=row.tag,
        source=f"https://download.pytorch.org/models/{row.file}.pth",
        layout="torchvision",
        input_size=(3, row.side, row.side),
        interpolation=row.interpolation,
        license="CC-BY-NC-4.0" if "SWAG" in row.tag else "BSD-3-Clause",
        metrics={} if row.top1 is None else {"imagenet_top1": row.top1},
        mean=row.mean,
        std=row.std,
    )


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
