"""Vision backbones for dense tasks, as plugins: one interface, one feature pyramid, any image size.

Importing this package imports neither torch nor any plugin; each name below is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .locks import importing

if TYPE_CHECKING:
    from .backbone import Backbone, FeatureInfo
    from .errors import (
        AmbiguousBackbone,
        BackboneError,
        IncompatiblePlugin,
        InputError,
        InvalidSpec,
        MissingDependency,
        PluginError,
        UnknownBackbone,
        WeightsError,
    )
    from .hookspecs import hookimpl
    from .hub import from_pretrained
    from .inference import for_inference
    from .layers import Blocks
    from .pyramid import Pyramid
    from .registry import PluginInfo, backbone_info, build_backbone, list_backbones, plugins, refresh, register
    from .specs import BackboneInfo, BackboneSpec, Result, Weights
    from .weights import LoadReport
    from .wrapping import wrap

    __version__: str

__all__ = [
    "AmbiguousBackbone",
    "Backbone",
    "BackboneError",
    "BackboneInfo",
    "BackboneSpec",
    "Blocks",
    "FeatureInfo",
    "IncompatiblePlugin",
    "InputError",
    "InvalidSpec",
    "LoadReport",
    "MissingDependency",
    "PluginError",
    "PluginInfo",
    "Pyramid",
    "Result",
    "UnknownBackbone",
    "Weights",
    "WeightsError",
    "__version__",
    "backbone_info",
    "build_backbone",
    "for_inference",
    "from_pretrained",
    "hookimpl",
    "list_backbones",
    "plugins",
    "refresh",
    "register",
    "wrap",
]

_NAMES = {
    "backbone": "Backbone FeatureInfo",
    "errors": "AmbiguousBackbone BackboneError IncompatiblePlugin InputError InvalidSpec MissingDependency "
    "PluginError UnknownBackbone WeightsError",
    "hookspecs": "hookimpl",
    "hub": "from_pretrained",
    "inference": "for_inference",
    "layers": "Blocks",
    "pyramid": "Pyramid",
    "registry": "PluginInfo backbone_info build_backbone list_backbones plugins refresh register",
    "specs": "BackboneInfo BackboneSpec Result Weights",
    "weights": "LoadReport",
    "wrapping": "wrap",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


if not TYPE_CHECKING:  # to type checkers, there is what is imported above, and nothing else

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("dense-backbones")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with importing:
            value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
