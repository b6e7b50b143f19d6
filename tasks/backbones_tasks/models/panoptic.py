"""Panoptic segmentation: every pixel is of one segment, and things are told apart; any backbone under transformers'."""

from typing import Any, Literal

from backbones.errors import InputError

from ..options import nearest, require
from . import heads
from .base import BackboneLike, HoldsBackbone, make_backbone

ARCHITECTURES = tuple(name for name, head in heads.SEGMENTERS.items() if head.masks)


def build_panoptic(
    architecture: str = "hf/mask2former",
    *,
    backbone: BackboneLike,
    num_classes: int,
    things: int,
    batch_norm: Literal["train", "frozen"] = "train",
    **options: Any,
) -> HoldsBackbone:
    """Build a model that divides images into segments, each a thing or a kind of stuff.

    Called with a list of images (C, H, W) in [0, 1] of any sizes and, in training, a list of targets {"masks":
    (N, H, W), one per thing and one per kind of stuff, "labels": (N,) from 0}, it returns a dict of losses in training
    mode. In eval mode it returns one dict per image: "segments" (H, W), whose values are 0 where there is nothing, and
    i + 1 in the i-th segment; and of each of these "labels" (N,), "scores" (N,) and "things" (N,), whether it is one.

    Args:
        architecture: "hf/mask2former" or "hf/maskformer"
        backbone: as in `build_segmenter`
        num_classes: of things and stuff together; 133 for COCO
        things: how many of the classes, the first ones, are things, whose segments are told apart; 80 for COCO
        batch_norm: what becomes of the backbone's batch norms
        options: of transformers' configuration, by its names; `min_size`, `max_size`, `image_mean` and `image_std` as
            torchvision's detectors have them; `score_thresh` (0.5), the least score of a segment, and `overlap_thresh`
            (0.8), the least share of its own mask that others must have left it

    Raises:
        InputError: an unknown architecture or option, or a backbone whose maps do not fit
    """
    if architecture not in ARCHITECTURES:
        raise InputError(f"unknown architecture {architecture!r}; {nearest(architecture, ARCHITECTURES)}")
    if not 0 <= things <= num_classes or num_classes < 1:
        raise InputError(f"things={things} of num_classes={num_classes}: from none to all of at least one class")
    require("panoptic segmentation", "transformers", "transformers", "scipy")
    from . import hf_panoptic

    body = make_backbone(backbone, architecture)
    return hf_panoptic.build(architecture, body, num_classes, things, batch_norm, options)
