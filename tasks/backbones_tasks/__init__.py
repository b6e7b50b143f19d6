"""Heads, data, training and prediction on top of `backbones`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.classifier import build_classifier
    from .models.detector import build_detector
    from .models.multitask import build_multitask
    from .models.panoptic import build_panoptic
    from .models.pretrained import from_pretrained
    from .models.segmenter import build_segmenter

_MODULES = {
    "build_classifier": "models.classifier",
    "build_detector": "models.detector",
    "build_multitask": "models.multitask",
    "build_panoptic": "models.panoptic",
    "build_segmenter": "models.segmenter",
    "from_pretrained": "models.pretrained",
}

__all__ = [
    "build_classifier",
    "build_detector",
    "build_multitask",
    "build_panoptic",
    "build_segmenter",
    "from_pretrained",
]


if not TYPE_CHECKING:  # to type checkers, there is what is imported above, and nothing else

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
