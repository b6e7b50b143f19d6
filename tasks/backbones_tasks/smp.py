"""`import backbones_tasks.smp` teaches segmentation-models-pytorch our names, see `backbones_tasks.models.smp`."""

from .models.smp import Encoder, Levels

__all__ = ["Encoder", "Levels"]
