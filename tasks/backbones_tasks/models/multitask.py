"""Several heads on one backbone: detectors, segmenters and classifiers that share its maps."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from backbones import FeatureInfo, backbone_info
from backbones.errors import InputError
from backbones.layers import ceil_div, crop_to

from ..options import nearest
from . import classifier, detector, segmenter
from .base import BackboneLike, HoldsBackbone, backbone_options, make_backbone, recorded
from .resizing import Resizing
from .smp import resize

#: What builds a head of each task, and tells which of the backbone's maps it takes unless told.
KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[..., list[int]]]] = {
    "detection": (detector.build_detector, detector.map_indices),
    "segmentation": (segmenter.build_segmenter, segmenter.map_indices),
    "classification": (classifier.build_classifier, classifier.map_indices),
}

Strides = Mapping[int, int]
Wanted = Sequence[int] | Callable[[Strides], Sequence[int]]

# The maps of the pass that is under way, and whose they are; of this thread alone.
_pass: ContextVar[tuple[nn.Module, list[Tensor]] | None] = ContextVar("pass", default=None)


def build_multitask(
    backbone: BackboneLike,
    heads: Mapping[str, Mapping[str, Any] | nn.Module],
    *,
    image_size: int | None = None,
) -> "MultiTaskModel":
    """Build several heads on one backbone.

    ```
    heads = {
        "det": {"task": "detection", "num_classes": 91},
        "seg": {"task": "segmentation", "num_classes": 150, "architecture": "smp/fpn"},
    }
    model = build_multitask("pvt_v2_b2", heads)
    sum(model.heads["det"](images, targets).values()).backward()  # each head trains as if it were alone
    model.eval()([image])["seg"][0]  # all heads in one pass of the backbone
    ```

    Args:
        backbone: a name, a dict of `build_backbone` options that includes "name", or a module that returns a list of
            maps and has timm's `feature_info`. By name, it is built with the maps that the heads take, and no others
        heads: by name. A dict has "task" ("detection", "segmentation" or "classification"), the options of
            `build_detector`, `build_segmenter` or `build_classifier`, and, for other maps than those take by
            themselves, "out_indices" of the backbone. Or what they returned for this very backbone, which is taken over
        image_size: longer side in pixels that images are brought to in eval mode, when one pass serves all heads; by
            default what the detectors bring them to, or their own size where there are none

    Raises:
        InputError: an option that cannot work, or heads that cannot have one pass in common
    """
    check_names(heads)
    built = {name: head for name, head in heads.items() if isinstance(head, nn.Module)}
    given = {name: dict(head) for name, head in heads.items() if name not in built}
    for name, head in built.items():
        if not isinstance(head, HoldsBackbone) or head.inner_backbone is not backbone:
            raise InputError(f"heads[{name!r}] was not built on the backbone that is to be shared; give its options")
    kinds = {name: find_kind(name, options.pop("task", None)) for name, options in given.items()}
    wanted: dict[str, Wanted] = {}
    for name, options in given.items():
        check_options(name, options)
        _, choose = kinds[name]
        wanted[name] = options.pop("out_indices", None) or (lambda s, o=options, choose=choose: choose(s, **o))
    backbone, maps = share_backbone(backbone, wanted)
    for name, options in given.items():
        build, _ = kinds[name]
        given[name] = build(backbone=maps[name], **options)
    for head in built.values():
        head.set_submodule(head.backbone_path, SharedMaps(backbone))
    return MultiTaskModel(backbone, {name: (given | built)[name] for name in heads}, image_size)


class MultiTaskModel(HoldsBackbone):
    """A backbone and heads that share it; see `build_multitask`.

    In training mode, each of `heads` is called by itself, as `build_detector`, `build_segmenter` or `build_classifier`
    say: a detector with images in [0, 1] and targets, others with a batch of normalised images. In eval mode, the
    model is called, with images in [0, 1], and runs the backbone once for all.

    Args:
        backbone: module from (B, C, H, W) to a list of maps
        heads: models on a `SharedMaps` each
        image_size: longer side that images are brought to in eval mode
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module], image_size: int | None = None):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        for head in heads.values():
            head.inner_backbone.owner = (self,)
        self.transform = _common_transform(backbone, heads, image_size)
        segmenters = [head for head in heads.values() if _is_segmenter(head)]
        self.min_size = max((head.min_size for head in segmenters), default=0)
        self.image_size = image_size
        if all(hasattr(head, "build_options") for head in heads.values()):
            recorded(self, "multitask", image_size=image_size)
            self.unsaved_options += [f"{option} of {n}" for n, head in heads.items() for option in head.unsaved_options]

    def saved_options(self) -> dict[str, Any]:
        heads = {
            name: {"task": head.task, **head.saved_options(), "out_indices": list(head.inner_backbone.out_indices)}
            for name, head in self.heads.items()
        }
        return {"heads": heads, "image_size": self.image_size}

    def forward(self, images: Sequence[Tensor] | Tensor, heads: Sequence[str] | None = None) -> dict[str, Any]:
        """What the heads say of images (C, H, W) in [0, 1], of any sizes, or of a batch of them (B, C, H, W).

        Args:
            images: brought to the common size, normalised and padded for one pass of the backbone
            heads: names of those to run; all unless given

        Returns:
            by name: of a detector, a dict of boxes, labels, scores and, of Mask R-CNN, masks for each image; of a
            segmenter, logits (num_classes, H, W) at the size of each image, or (B, num_classes, H, W) of a batch; of a
            classifier, logits (B, num_classes)
        """
        if self.training:
            raise InputError("in training mode each head has images of its own: call model.heads[name]")
        prepared, _ = self.transform(list(images))
        pixels = self._padded(prepared.tensors)
        maps = list(self.backbone(pixels))
        parts = [slice(None)] if isinstance(images, Tensor) else [slice(i, i + 1) for i in range(len(images))]
        results = {}
        for name in self.heads if heads is None else heads:
            head = self.heads[name]
            if _is_detector(head):
                with _passing(self, maps):
                    results[name] = head(list(images))
                continue
            said = []
            for part in parts:  # without what pads one image to the size of another
                (height, width), original = prepared.image_sizes[part][0], images[part][0].shape[-2:]
                with _passing(self, [m[part] for m in maps]):
                    logits = head(pixels[part, :, :height, :width])
                said.append(resize(logits, original) if logits.ndim == 4 else logits)
            if _is_segmenter(head) and not isinstance(images, Tensor):
                results[name] = [logits[0] for logits in said]
            else:
                results[name] = torch.cat(said)
        return results

    if TYPE_CHECKING:  # torch says that calling a module gives Any
        __call__ = forward

    def _padded(self, pixels: Tensor) -> Tensor:
        """At least as large as any head needs."""
        right, bottom = (max(0, self.min_size - side) for side in (pixels.shape[-1], pixels.shape[-2]))
        return F.pad(pixels, (0, right, 0, bottom)) if right or bottom else pixels


class SharedMaps(nn.Module):
    """What a head has for a backbone: maps of the one that it shares, which it neither owns, moves nor saves.

    Called with images (B, C, H, W), it returns the maps of these images; within a pass that serves all heads, those of
    that pass, as large as the images are.

    Args:
        backbone: the one that is shared
        out_indices: which of its maps; all unless given
    """

    def __init__(self, backbone: nn.Module, out_indices: Sequence[int] | None = None):
        super().__init__()
        info = backbone.feature_info
        there, channels, strides = list(info.out_indices), info.channels(), info.reduction()
        self.out_indices = there if out_indices is None else list(out_indices)
        self.chosen = [there.index(i) for i in self.out_indices]
        self.strides = [strides[i] for i in self.chosen]
        levels = [{"num_chs": c, "reduction": s, "module": ""} for c, s in zip(channels, strides, strict=True)]
        self.feature_info = FeatureInfo(levels, tuple(self.chosen))
        for name in ("canonical_name", "in_chans", "pretrained_cfg", "weight_options", "implied_options"):
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))
        #: The model that has the backbone, in a tuple, because in an attribute it would be a part of its own parts.
        self.owner: tuple[MultiTaskModel] | None = None

    def forward(self, images: Tensor) -> list[Tensor]:
        (model,) = self.owner
        whose, maps = _pass.get() or (None, None)
        if whose is not model:
            maps = model.backbone(images)
        height, width = images.shape[-2:]
        cells, stride = maps[self.chosen[-1]].shape[-2:], self.strides[-1]
        if cells[0] < ceil_div(height, stride) or cells[1] < ceil_div(width, stride):
            raise InputError(
                f"a head pads images to {height} x {width}, which is more than the pass that serves all heads has "
                "seen: give larger images or image_size, or, where the head is of transformers, fewer num_queries"
            )
        return [
            crop_to(maps[i].to(images.dtype), ceil_div(height, stride), ceil_div(width, stride))
            for i, stride in zip(self.chosen, self.strides, strict=True)
        ]

    def extra_repr(self) -> str:
        return f"channels={self.feature_info.channels()}, strides={self.strides}"


def share_backbone(backbone: BackboneLike, wanted: Mapping[str, Wanted]) -> tuple[nn.Module, dict[str, SharedMaps]]:
    """A backbone with the maps that heads want, and the share of each head in it.

    Args:
        backbone: as `build_multitask` takes it
        wanted: by head, the indices of maps, or what chooses them from a dict of stride by index

    Raises:
        InputError: the backbone has no such maps
    """
    options = {} if isinstance(backbone, nn.Module) else backbone_options(backbone, "multi-task")
    if isinstance(backbone, nn.Module) or "out_indices" in options:
        backbone = make_backbone(backbone, "multi-task")
        info = backbone.feature_info
        strides = dict(zip(info.out_indices, info.reduction(), strict=True))
        chosen = {name: _choose(name, want, strides) for name, want in wanted.items()}
    else:
        strides = dict(enumerate(backbone_info(options["name"]).strides))
        chosen = {name: _choose(name, want, strides) for name, want in wanted.items()}
        backbone = make_backbone(options, "multi-task", out_indices=sorted({i for c in chosen.values() for i in c}))
    return backbone, {name: SharedMaps(backbone, indices) for name, indices in chosen.items()}


def find_kind(name: str, kind: str | None) -> tuple[Callable[..., nn.Module], Callable[..., list[int]]]:
    """What `KINDS` has for a head's task; `InputError` with the nearest one where there is none."""
    if kind is None:
        raise InputError(f'the head {name!r} lacks "task": {", ".join(KINDS)}')
    if kind not in KINDS:
        raise InputError(f"the head {name!r} has the unknown task {kind!r}; {nearest(kind, KINDS)}")
    return KINDS[kind]


def check_names(heads: Mapping[str, Any]) -> None:
    """Raise InputError unless there are heads, of names that can be parts of a module, a path and a score's name."""
    if not heads:
        raise InputError("multi-task needs at least one head")
    for name in heads:
        if not (isinstance(name, str) and name.isidentifier()) or hasattr(nn.ModuleDict, name):
            raise InputError(f"a head cannot be called {name!r}; choose a word such as det or seg")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise InputError for options of a head that are the shared backbone's to have."""
    if options.get("batch_norm", "train") != "train":
        raise InputError(
            f"the head {name!r}: batch_norm={options['batch_norm']!r} is about the backbone, which all heads share; "
            "build that with norm_eval=True to keep its statistics fixed"
        )


def _choose(name: str, want: Wanted, strides: Strides) -> list[int]:
    indices = list(want(strides)) if callable(want) else sorted(sorted(strides)[i] if i < 0 else i for i in want)
    if not indices or not set(indices) <= strides.keys():
        raise InputError(f"the head {name!r} wants the maps {indices}, and the backbone has {sorted(strides)}")
    return indices


def _common_transform(
    backbone: nn.Module, heads: Mapping[str, nn.Module], image_size: int | None
) -> GeneralizedRCNNTransform:
    """What brings images to one size, normalises and pads them, for all heads."""
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size={image_size} must be at least 1")
    transforms = {name: head.transform for name, head in heads.items() if _is_detector(head)}
    for transform in transforms.values():
        if image_size is not None:
            transform.min_size, transform.max_size, transform.fixed_size = (image_size,), image_size, None
    sizes = {(tuple(t.min_size), t.max_size, t.fixed_size) for t in transforms.values()}
    if len(sizes) > 1:
        raise InputError(
            f"the heads {', '.join(transforms)} bring images to different sizes, and one pass has one: give image_size"
        )
    statistics = {(tuple(t.image_mean), tuple(t.image_std)) for t in transforms.values()}
    if len(transforms) < len(heads):  # the others are as the backbone has them
        config = backbone.pretrained_cfg
        statistics.add((tuple(config["mean"]), tuple(config["std"])))
    if len(statistics) > 1:
        raise InputError(
            "the heads normalise images differently, and one pass has one way: leave out image_mean and image_std of "
            f"{', '.join(transforms)}"
        )
    own_size = ((), None, None) if image_size is None else ((image_size,), image_size, None)
    (min_size, max_size, fixed_size), (mean, std) = next(iter(sizes), own_size), statistics.pop()
    divisors = [t.size_divisible for t in transforms.values()]
    divisors += [head.divisor for head in heads.values() if _is_segmenter(head)]
    divisor = math.lcm(*divisors)
    return Resizing(min_size, max_size, list(mean), list(std), size_divisible=divisor, fixed_size=fixed_size)


def _is_segmenter(head: nn.Module) -> bool:
    return hasattr(head, "divisor")


def _is_detector(head: nn.Module) -> bool:
    return isinstance(getattr(head, "transform", None), GeneralizedRCNNTransform)


@contextmanager
def _passing(model: nn.Module, maps: list[Tensor]) -> Iterator[None]:
    """Within, all heads of a model are given these maps."""
    token = _pass.set((model, maps))
    try:
        yield
    finally:
        _pass.reset(token)
