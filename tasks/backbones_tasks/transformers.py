"""`import backbones_tasks.transformers` teaches transformers our names, see `backbones_tasks.models.transformers`."""

from .models.transformers import DenseBackbone, DenseBackboneConfig

__all__ = ["DenseBackbone", "DenseBackboneConfig"]
