"""Detection models: any backbone under torchvision's detectors."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from timm.layers.norm_act import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from backbones import backbone_info
from backbones.errors import InputError

from ..options import nearest, require
from . import heads
from .base import BackboneLike, Detector, backbone_options, image_statistics, make_backbone, recorded
from .cascade import CascadeRCNN
from .resizing import resizing

ARCHITECTURES = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet", "fcos")
DENSE = ("retinanet", "fcos")
MASKED = ("mask_rcnn",)
BATCH_NORMS = ("train", "frozen", "sync")

# Names that all architectures take, and torchvision's names of them in R-CNNs.
_BOX_OPTIONS = {name: f"box_{name}" for name in ("score_thresh", "nms_thresh", "detections_per_img")}


def build_detector(
    architecture: str = "faster_rcnn",
    *,
    backbone: BackboneLike,
    num_classes: int,
    fpn_channels: int = 256,
    batch_norm: Literal["train", "frozen", "sync"] = "train",
    **options: Any,
) -> Detector:
    """Build one of torchvision's or transformers' detectors on any backbone.

    The model is torchvision's in every respect: called with a list of images (C, H, W) in [0, 1] of any sizes and,
    in training, a list of targets {"boxes": (N, 4) as x0 y0 x1 y1, "labels": (N,), "masks": (N, H, W)}, it returns a
    dict of losses in training mode, and in eval mode one dict per image of "boxes", "labels", "scores" and, of Mask
    R-CNN, "masks" (N, 1, H, W) of probabilities. It resizes and normalises the images itself.

    Levels, anchors, RoI features and padding follow from the strides in the backbone's `feature_info`.

    Those of transformers ("hf/NAME") are called in the same way, and the background is a class of theirs as well; their
    `hf` is transformers' model. They match predictions with objects in training, and need no suppression.

    Args:
        architecture: "faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet" or "fcos"; "hf/detr",
            "hf/conditional_detr", "hf/dab_detr", "hf/deformable_detr", "hf/rt_detr", "hf/rt_detr_v2", "hf/d_fine",
            "hf/deimv2" or "hf/rf_detr"
        backbone: a name, a dict of `build_backbone` options that includes "name" (`out_indices`, `frozen_stages`,
            `norm_eval`, ... go here), or a module that returns a list of maps and has timm's `feature_info`. By default
            R-CNNs take all maps and one more level, RetinaNet and FCOS those of stride 8 and up and two more
        num_classes: number of classes, the background included as torchvision counts; 91 for COCO
        fpn_channels: width of all levels; not of transformers' detectors, which have `d_model`
        batch_norm: what becomes of the backbone's batch norms: trained, frozen with their statistics, or synchronised
            between processes
        options: of the architecture, by torchvision's names (`min_size`, `max_size`, `rpn_nms_thresh`, ...), of which
            `score_thresh`, `nms_thresh` and `detections_per_img` work for all; `image_mean` and `image_std` are by
            default those of the backbone's weights. Moreover:
            anchor_sizes: sides in pixels of the anchors, one tuple per level, all of one length; not for FCOS
            aspect_ratios: their heights by their widths; not for FCOS
            box_channels, mask_channels: width of the box head (1024) and of the mask head (256); of R-CNNs

    Returns:
        an instance of torchvision's class, or a `SetDetector`, with timm's `group_matcher` and `no_weight_decay`

    Raises:
        InputError: an unknown architecture or option, or a backbone whose maps do not fit
    """
    own = {} if _is_hf(architecture) and fpn_channels == 256 else {"fpn_channels": fpn_channels}
    check_options(architecture, {**own, "batch_norm": batch_norm, **options})
    if num_classes < 2:
        raise InputError(f"num_classes={num_classes}: the background counts, so that a detector has at least 2 classes")
    body = _make_body(architecture, backbone)
    if _is_hf(architecture):
        mean, std = image_statistics(body, options)
        statistics = {"image_mean": mean, "image_std": std}
        return _transformers().build(architecture, body, num_classes, batch_norm, **{**statistics, **options})
    if batch_norm == "frozen":
        body = freeze_batch_norm_2d(body)
    elif batch_norm == "sync":
        body = convert_sync_batchnorm(body)
    extra = LastLevelP6P7(fpn_channels, fpn_channels) if architecture in DENSE else LastLevelMaxPool()
    neck = FeaturePyramid(body, fpn_channels, extra, extra_levels=2 if architecture in DENSE else 1)
    mean, std = image_statistics(body, options)
    defaults = {"image_mean": mean, "image_std": std, "size_divisible": math.lcm(*neck.strides[: neck.maps])}
    build = _build_dense if architecture in DENSE else _build_rcnn
    model = build(architecture, neck, num_classes, **{**defaults, **options})
    model.transform = resizing(model.transform)
    own = {"architecture": architecture, "num_classes": num_classes, "fpn_channels": fpn_channels}
    statistics = {name: defaults[name] for name in ("image_mean", "image_std")}  # what no weights hold
    return recorded(model, "detection", **own, batch_norm=batch_norm, **{**statistics, **options})


def check_options(architecture: str, options: Mapping[str, Any]) -> None:
    """Raise InputError where `build_detector` would, as far as that is known without a backbone."""
    known = (*ARCHITECTURES, *heads.DETECTORS)
    if architecture not in known:
        raise InputError(f"unknown architecture {architecture!r}; {nearest(architecture, known)}")
    if options.get("batch_norm", "train") not in BATCH_NORMS:
        raise InputError(f"batch_norm={options['batch_norm']!r} is unknown; choose from {', '.join(BATCH_NORMS)}")
    known = (
        {"batch_norm", *_transformers().known_options(architecture)}
        if _is_hf(architecture)
        else _known_options(architecture)
    )
    for option in options:
        if option not in known:
            raise InputError(f"{architecture} has no option {option!r}; {nearest(option, sorted(known))}")
    for ours, theirs in _BOX_OPTIONS.items():
        if ours in options and theirs in options:
            raise InputError(f"{ours} and {theirs} are the same option; give one of them")
    channels = options.get("fpn_channels", 256)
    if architecture == "fcos" and (channels % 32 or channels < 64):
        raise InputError(f"fpn_channels={channels}: the group norms of fcos need a multiple of 32, from 64 on")


def map_indices(strides: Mapping[int, int], architecture: str = "faster_rcnn", **options: Any) -> list[int]:
    """Which of a backbone's maps a detector takes, given the stride of each by its index."""
    if _is_hf(architecture):
        return heads.map_indices(strides, architecture)
    # the stride-4 map has most of the cells and, for dense heads, little use: no published RetinaNet or FCOS has it
    return [index for index, stride in strides.items() if stride >= 8 or architecture not in DENSE]


class FeaturePyramid(nn.Module):
    """A backbone and torchvision's FeaturePyramidNetwork: what torchvision's detectors call a backbone.

    Called with images (B, C, H, W), it returns levels (B, out_channels, h, w), named "0", "1", ... and those of `extra`
    last, finest first.

    Args:
        body: module from images to a list of maps, with timm's `feature_info`
        out_channels: width of all levels
        extra: makes coarser levels from the last, each of half the resolution of the one before
        extra_levels: how many
    """

    low_precision = True  # see `backbones.for_inference`

    def __init__(self, body: nn.Module, out_channels: int, extra: ExtraFPNBlock, extra_levels: int):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, extra)
        self.out_channels = out_channels
        strides = list(body.feature_info.reduction())
        self.maps = len(strides)
        #: pixels per cell of each level
        self.strides = [*strides, *(strides[-1] * 2 ** (i + 1) for i in range(extra_levels))]
        #: the same, but doubled at least from level to level, as if a dilated backbone were not: what size of object
        #: each level is for
        self.scales = self.strides[:1]
        for stride in self.strides[1:]:
            self.scales.append(max(stride, 2 * self.scales[-1]))

    @property
    def canonical_name(self) -> str:
        """That of the body."""
        name: Any = self.body.canonical_name
        return name

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(images))))


class Anchors(AnchorGenerator):
    """torchvision's anchors, placed by the strides that the levels have.

    torchvision divides the sides of the image by those of the map, which is off where the latter are rounded up, and
    gives anchors the precision of the map: bfloat16 knows no odd number over 256.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], aspect_ratios: Sequence[float], strides: Sequence[int]):
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors (N, 4) of all levels, for each image."""
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        grids = [m.shape[-2:] for m in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class MapOfScale(LevelMapper):
    """Which map a region is read from, where strides more than double from one map to the next.

    torchvision's own mapper counts on a map for every doubling; here a region whose map is missing gets the next finer.
    """

    def __init__(self, scales: Sequence[int]):
        octaves = [round(math.log2(scale)) for scale in scales]
        super().__init__(octaves[0], octaves[-1])
        self.offsets = [octave - octaves[0] for octave in octaves]

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        octaves = super().__call__(boxlists)  # from that of the first map on
        return torch.stack([octaves >= offset for offset in self.offsets]).sum(0) - 1


class FasterRCNN(Detector, detection.FasterRCNN):
    """torchvision's Faster R-CNN; see `build_detector`."""


class MaskRCNN(Detector, detection.MaskRCNN):
    """torchvision's Mask R-CNN; see `build_detector`."""


class RetinaNet(Detector, detection.RetinaNet):
    """torchvision's RetinaNet; see `build_detector`."""


class FCOS(Detector, detection.FCOS):
    """torchvision's FCOS; see `build_detector`."""


def _build_rcnn(
    architecture: str,
    neck: FeaturePyramid,
    num_classes: int,
    *,
    anchor_sizes: Sequence[Sequence[int]] | None = None,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    box_channels: int = 1024,
    mask_channels: int = 256,
    **options: Any,
) -> Detector:
    options = {_BOX_OPTIONS.get(name, name): value for name, value in options.items()}
    if options.get("rpn_anchor_generator") is None:
        sizes = anchor_sizes or _anchor_sizes(neck.scales, base=8, per_octave=1)
        options["rpn_anchor_generator"] = _anchors(neck, sizes, aspect_ratios)
    if options.get("box_roi_pool") is None:
        options["box_roi_pool"] = _roi_align(neck, 7)
    if architecture == "cascade_rcnn":
        model = CascadeRCNN(neck, num_classes, box_channels, **options)
        predictors = [stage.box_predictor for stage in model.roi_heads.stages]
    else:
        side = options["box_roi_pool"].output_size[0]
        if options.get("box_head") is None:
            options["box_head"] = TwoMLPHead(neck.out_channels * side**2, box_channels)
        if options.get("box_predictor") is None:
            options["box_predictor"] = FastRCNNPredictor(box_channels, num_classes)
        if architecture in MASKED:
            if options.get("mask_roi_pool") is None:
                options["mask_roi_pool"] = _roi_align(neck, 14)
            if options.get("mask_head") is None:
                options["mask_head"] = MaskRCNNHeads(neck.out_channels, [mask_channels] * 4, dilation=1)
            if options.get("mask_predictor") is None:
                options["mask_predictor"] = MaskRCNNPredictor(mask_channels, mask_channels, num_classes)
        model = _CLASSES[architecture](neck, **options)  # torchvision wants no num_classes beside predictors
        predictors = [
            model.roi_heads.box_predictor,
            *([model.roi_heads.mask_predictor] if architecture in MASKED else []),
        ]
    for module in (model.rpn.head, *predictors):
        module.register_forward_hook(_at_least_float32)
    return model


def _build_dense(
    architecture: str,
    neck: FeaturePyramid,
    num_classes: int,
    *,
    anchor_sizes: Sequence[Sequence[int]] | None = None,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    **options: Any,
) -> Detector:
    if options.get("anchor_generator") is None:
        if architecture == "fcos":
            # each level is for objects of 4 to 8 times its anchor: a doubling left out would leave some to no level
            if any(round(b / a) != 2 for a, b in pairwise(neck.scales)):
                raise InputError(
                    f"fcos needs a map for every doubling of the stride, and the backbone returns strides "
                    f"{neck.strides[: neck.maps]}; choose its out_indices without a gap"
                )
            anchor_sizes, aspect_ratios = [(scale,) for scale in neck.scales], (1.0,)
        sizes = anchor_sizes or _anchor_sizes(neck.scales, base=4, per_octave=3)
        options["anchor_generator"] = _anchors(neck, sizes, aspect_ratios)
    model = _CLASSES[architecture](neck, num_classes, **options)
    model.head.register_forward_hook(_at_least_float32)
    return model


_CLASSES: dict[str, type[Detector]] = {
    "faster_rcnn": FasterRCNN,
    "mask_rcnn": MaskRCNN,
    "cascade_rcnn": CascadeRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}


def _known_options(architecture: str) -> set[str]:
    """Names of what `build_detector` takes beside its own parameters."""
    theirs = next(c for c in _CLASSES[architecture].__mro__ if c.__module__.startswith("torchvision."))
    known = {name for name in inspect.signature(theirs).parameters if name not in ("backbone", "num_classes", "kwargs")}
    known |= {"fpn_channels", "batch_norm", "size_divisible", "fixed_size", "_skip_resize", *_BOX_OPTIONS}
    if architecture != "fcos":
        known |= {"anchor_sizes", "aspect_ratios"}
    if architecture not in DENSE:
        known |= {"box_channels"}
    if architecture in MASKED:
        known |= {"mask_channels"}
    if architecture == "cascade_rcnn":  # these differ from head to head
        known -= {"box_head", "box_predictor", "box_fg_iou_thresh", "box_bg_iou_thresh", "bbox_reg_weights"}
    return known


def _is_hf(architecture: str) -> bool:
    return architecture in heads.DETECTORS


def _transformers() -> Any:
    """What builds detectors of transformers, which few have."""
    require("a detector of transformers", "transformers", "transformers", "scipy")
    from . import hf_detector

    return hf_detector


def _make_body(architecture: str, backbone: BackboneLike) -> nn.Module:
    if not (architecture in DENSE or _is_hf(architecture)) or isinstance(backbone, nn.Module):
        return make_backbone(backbone, architecture)
    strides = backbone_info(backbone_options(backbone, architecture)["name"]).strides
    return make_backbone(backbone, architecture, out_indices=map_indices(dict(enumerate(strides)), architecture))


def _anchor_sizes(scales: Sequence[int], base: int, per_octave: int) -> list[tuple[int, ...]]:
    """Sides of the anchors of each level: as many on each, and some in every octave from the first level on."""
    steps = [*(b / a for a, b in pairwise(scales)), 2.0]
    count = per_octave * max(round(math.log2(step)) for step in steps)
    # cut to integers as torchvision has them; the epsilon keeps what is one but for rounding
    return [
        tuple(int(base * scale * step ** (i / count) + 1e-6) for i in range(count))
        for scale, step in zip(scales, steps, strict=True)
    ]


def _anchors(neck: FeaturePyramid, sizes: Sequence[Sequence[int]], aspect_ratios: Sequence[float]) -> Anchors:
    if len(sizes) != len(neck.strides) or len({len(level) for level in sizes}) != 1:
        raise InputError(
            f"anchor_sizes={sizes}: give a tuple for each of the levels of strides {neck.strides}, all of one length"
        )
    return Anchors(sizes, aspect_ratios, neck.strides)


def _roi_align(neck: FeaturePyramid, output_size: int) -> MultiScaleRoIAlign:
    maps = neck.maps
    pool = MultiScaleRoIAlign([str(i) for i in range(maps)], output_size, sampling_ratio=2)
    # torchvision would infer these from the sizes of the first batch, wrongly where images are small
    pool.scales = [1 / stride for stride in neck.strides[:maps]]
    pool.map_levels = MapOfScale(neck.scales[:maps])
    return pool


def _at_least_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Boxes are decoded in the precision of these outputs, and half precision is too coarse for pixels."""
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if isinstance(outputs, dict):
        return {name: _at_least_float32(module, inputs, value) for name, value in outputs.items()}
    return type(outputs)(_at_least_float32(module, inputs, value) for value in outputs)
