"""Heads, data, training and prediction on top of `backbones`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .segmenter import build_segmenter

__all__ = ["build_segmenter"]


def __getattr__(name: str):
    if name == "build_segmenter":
        from .segmenter import build_segmenter

        return build_segmenter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
