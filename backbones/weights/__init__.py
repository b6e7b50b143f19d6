"""Checkpoints: read, recognised, converted, resized, judged, loaded, reported."""

from .exact import require_whole
from .fitting import is_new, load_weights, require_sound
from .layouts import KeyLayout, split_in_proj
from .published import (
    PREPROCESSING,
    describe,
    find_weights,
    leads_nowhere,
    load_pretrained,
    torchvision_transforms,
)
from .reading import read_checkpoint
from .report import LoadReport

__all__ = [
    "PREPROCESSING",
    "KeyLayout",
    "LoadReport",
    "describe",
    "find_weights",
    "is_new",
    "leads_nowhere",
    "load_pretrained",
    "load_weights",
    "read_checkpoint",
    "require_sound",
    "require_whole",
    "split_in_proj",
    "torchvision_transforms",
]
