"""Heads, data, training and prediction on top of `backbones`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .classifier import build_classifier
    from .detector import build_detector
    from .heads import build_multitask
    from .segmenter import build_segmenter
    from .sharing import from_pretrained

_MODULES = {
    "build_classifier": "classifier",
    "build_detector": "detector",
    "build_multitask": "heads",
    "build_segmenter": "segmenter",
    "from_pretrained": "sharing",
}

__all__ = ["build_classifier", "build_detector", "build_multitask", "build_segmenter", "from_pretrained"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
