"""Heads of transformers: what is to be known of each to put it on any backbone; transformers is not imported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from backbones.errors import InputError

from ..options import nearest

PREFIX = "hf/"

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is to be known of a class of transformers.

    Args:
        model: its name.
        finest: stride of the finest map that it takes; 32 for the last map alone.
        whole: whether it needs all of the strides 4, 8, 16 and 32.
        doubling: whether the stride has to double from map to map.
        divisor: what the sides of images are padded to.
        maps: of what it is told about the maps: from their channels, their strides and its other options.
        defaults: options that are not transformers' defaults: what the papers train with.
        sizes: what the shorter side of images is brought to, and the most that the longer one may be.
        sees_padding: whether it is told by a mask where an image ends, so that boxes are relative to that.
        masks: whether it gives classes to masks, so that its losses are its own.
        softmax: whether the classes of a query exclude each other, and "nothing" is the last of them.
        queries: option that says how many cells of the maps it picks, so that an image must have as many.
        narrow: options of a head that trains fast on a CPU.
        joined: whether its class of backbone is fixed, so that ours takes its place, all maps joined to one.
        weighted: whether the losses of its parts are multiplied by their coefficients already.
    """

    model: str
    finest: int = 8
    whole: bool = False
    doubling: bool = False
    divisor: int = 1
    maps: Callable[[list[int], list[int], Options], Options] = lambda channels, strides, options: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] = (800, 1333)
    sees_padding: bool = True
    masks: bool = False
    softmax: bool = False
    queries: str = ""
    narrow: Mapping[str, Any] = field(default_factory=dict)
    joined: bool = False
    weighted: bool = False


def _hybrid_encoder(channels: list[int], strides: list[int], options: Options) -> Options:
    levels = len(channels)
    return {
        "encoder_in_channels": channels,
        "feat_strides": strides,
        "decoder_in_channels": [options.get("encoder_hidden_dim", 256)] * levels,
        "num_feature_levels": max(levels, 3),
        "encode_proj_layers": [levels - 1],  # the coarsest map is the one that attends to itself
    }


def _levels(channels: list[int], strides: list[int], options: Options) -> Options:
    return {"num_feature_levels": max(4, len(channels))}


def _feature_strides(channels: list[int], strides: list[int], options: Options) -> Options:
    return {"feature_strides": strides}


def _small_dinov2(channels: list[int], strides: list[int], options: Options) -> Options:
    """What RF-DETR's fixed class of backbone is built of, until it is replaced."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 14, "num_windows": 1}
    return {"backbone_config": {"model_type": "rf_detr_dinov2", "out_features": ["stage1"], **sizes}}


_LAYER_LOSSES = {"auxiliary_loss": True}
_NARROW_FEEDS = {"decoder_layers": 3, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
_NARROW_DETR = {"d_model": 128, "num_queries": 50, "encoder_layers": 3, **_NARROW_FEEDS}
_NARROW_DAB = {"hidden_size": 128, **{name: value for name, value in _NARROW_DETR.items() if name != "d_model"}}
_NARROW_RT = {"d_model": 128, "num_queries": 100, "encoder_hidden_dim": 128, **_NARROW_FEEDS}
_NARROW_MASKS = {
    "feature_size": 128,
    "mask_feature_size": 128,
    "hidden_dim": 128,
    "num_queries": 50,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "encoder_feedforward_dim": 256,
    "dim_feedforward": 256,
    "train_num_points": 2048,
}
_NARROW_RF = {"d_model": 128, "num_queries": 50, "group_detr": 4, "decoder_ffn_dim": 256}


def _detr(model: str, **facts: Any) -> Head:
    return Head(model=model, **{"finest": 32, "defaults": _LAYER_LOSSES, "narrow": _NARROW_DETR, **facts})


def _rt_detr(model: str) -> Head:
    return Head(
        model=model,
        doubling=True,
        divisor=32,  # it doubles maps exactly
        maps=_hybrid_encoder,
        sizes=(640, 640),
        sees_padding=False,
        weighted=True,
        queries="num_queries",
        narrow=_NARROW_RT,
    )


DETECTORS: Mapping[str, Head] = {
    "hf/detr": Head(
        model="DetrForObjectDetection", finest=32, softmax=True, defaults=_LAYER_LOSSES, narrow=_NARROW_DETR
    ),
    "hf/conditional_detr": Head(
        model="ConditionalDetrForObjectDetection", finest=32, defaults=_LAYER_LOSSES, narrow=_NARROW_DETR
    ),
    "hf/dab_detr": Head(model="DabDetrForObjectDetection", finest=32, defaults=_LAYER_LOSSES, narrow=_NARROW_DAB),
    "hf/deformable_detr": Head(
        model="DeformableDetrForObjectDetection",
        maps=_levels,
        defaults={**_LAYER_LOSSES, "with_box_refine": True},
        narrow=_NARROW_DETR,
    ),
    "hf/rt_detr": _rt_detr("RTDetrForObjectDetection"),
    "hf/rt_detr_v2": _rt_detr("RTDetrV2ForObjectDetection"),
    "hf/d_fine": _rt_detr("DFineForObjectDetection"),
    "hf/deimv2": _rt_detr("Deimv2ForObjectDetection"),
    "hf/rf_detr": Head(
        model="RfDetrForObjectDetection",
        maps=_small_dinov2,
        sizes=(640, 640),
        queries="num_queries",
        joined=True,
        narrow=_NARROW_RF,
    ),
}

SEGMENTERS: Mapping[str, Head] = {
    "hf/upernet": Head(
        model="UperNetForSemanticSegmentation",
        whole=True,
        finest=4,
        narrow={"hidden_size": 64, "auxiliary_channels": 64},
    ),
    "hf/mask2former": Head(
        model="Mask2FormerForUniversalSegmentation",
        whole=True,
        finest=4,
        divisor=32,
        masks=True,
        maps=_feature_strides,
        narrow=_NARROW_MASKS,
    ),
    "hf/maskformer": Head(
        model="MaskFormerForInstanceSegmentation",
        whole=True,
        finest=4,
        divisor=32,
        masks=True,
        defaults={"use_auxiliary_loss": True},
        narrow={"decoder_config": {"model_type": "detr", **_NARROW_DETR}, "mask_feature_size": 128},
    ),
}

HEADS: Mapping[str, Head] = {**DETECTORS, **SEGMENTERS}


def find_head(architecture: str, among: Mapping[str, Head]) -> Head:
    """What is known of a head; `InputError` with the nearest name if there is none."""
    if architecture not in among:
        raise InputError(f"unknown architecture {architecture!r}; {nearest(architecture, among)}")
    return among[architecture]


def map_indices(strides: Mapping[int, int], architecture: str) -> list[int]:
    """Which of a backbone's maps a head takes, given the stride of each by its index."""
    finest = HEADS[architecture].finest
    return [index for index, stride in strides.items() if stride >= finest] or [max(strides)]


def check_strides(architecture: str, strides: Sequence[int]) -> None:
    """Raise InputError where a head cannot take maps of these strides."""
    head = HEADS[architecture]
    if head.whole and strides != [4, 8, 16, 32]:
        raise InputError(f"{architecture} needs maps of strides [4, 8, 16, 32], and the backbone returns {strides}")
    if head.doubling and any(2 * a != b for a, b in pairwise(strides)):
        raise InputError(
            f"{architecture} needs maps whose strides double from one to the next, and the backbone returns strides "
            f"{strides}; choose its out_indices and output_stride so"
        )
