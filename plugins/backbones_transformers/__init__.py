"""Backbones of transformers, as a plugin: `transformers/ORGANISATION/MODEL`, a local folder, or a model type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import transformer_layer_decay

from . import configs

BACKBONES_API = 1


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """None: what there is to build is on the hub, or in folders."""
    return []


@hookimpl
def catalogue() -> list[str]:
    """Model types that can be built from their default configuration, or from `config=`."""
    return list(configs.KINDS)


@hookimpl
def find_backbone(name: str, qualified: bool) -> BackboneSpec | None:
    """The spec of a hub id, of a folder with a `config.json`, or of a model type; `swin` alone is not one of ours.

    Raises:
        UnknownBackbone: the configuration cannot be had.
    """
    if not qualified:
        return None
    settings = configs.read(name)
    if settings is None:
        return None
    model_type = settings["model_type"]
    if model_type in configs.REFUSED:
        return _spec(
            name, model_type, (1,), (32,), entry="refuse", summary=f"not offered: {configs.REFUSED[model_type]}"
        )
    kind = configs.KINDS[model_type]
    channels, strides, _ = configs.levels(configs.complete(settings))
    return _spec(
        name,
        kind.family,
        channels,
        strides,
        entry="TransformersBackbone",
        weights=_weights(name),
        options=("config", "pyramid", "taps") if kind.plain else ("config",),
        layer_decay=_layer_decay(settings),
        summary=f"transformers' {kind.family}" + (", with a pyramid on its last map" if kind.plain else ""),
        paper=kind.paper,
    )


def _layer_decay(settings: Mapping[str, Any]) -> float:
    if configs.KINDS[settings["model_type"]].plain:
        return transformer_layer_decay(configs.complete(settings)["num_hidden_layers"])
    return 0.95 if "convnext" in settings["model_type"] else 1.0


def _spec(
    name: str, family: str, channels: tuple[int, ...], strides: tuple[int, ...], entry: str, **more: Any
) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        family=family,
        entry=f"backbones_transformers.models:{entry}",
        channels=channels,
        strides=strides,
        defaults={"source": name},
        license="Apache-2.0",
        requires=("transformers>=5",),
        **more,
    )


def _weights(name: str) -> list[Weights]:
    """What `pretrained=True` loads."""
    if name in configs.KINDS:
        return []
    path = configs.folder(name)
    if path is None:
        return [Weights(tag="hub", source=f"hf-hub:{name}", layout="transformers")]
    file: Path | None = next((path / f for f in configs.WEIGHT_FILES if (path / f).is_file()), None)
    return [Weights(tag="local", source=file.resolve().as_uri(), layout="transformers")] if file else []
