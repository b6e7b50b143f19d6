"""Checkpoints: read, recognised, converted, resized, judged, loaded, reported."""

from .fitting import is_new, load_weights
from .layouts import KeyLayout, split_in_proj
from .published import load_pretrained
from .reading import read_checkpoint
from .report import LoadReport

__all__ = ["KeyLayout", "LoadReport", "is_new", "load_pretrained", "load_weights", "read_checkpoint", "split_in_proj"]
