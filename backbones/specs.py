"""What a plugin says about its backbones before any model is imported: plain data, checked when made."""

import csv
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from .errors import InvalidSpec

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_PATH = re.compile(r"[A-Za-z0-9_./~-]*[A-Za-z0-9_.~-]")
_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_SOURCES = ("hf-hub:", "https://", "file://")
_TIMM = re.compile(r"hf-hub:timm/([^/@]+)(?:[/@].*)?")
_DENSE_METRICS = ("box_ap", "mask_ap", "miou", "miou_ms")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def is_name(value: object) -> bool:
    """Whether `value` can be a namespace or a backbone's name: letters, digits, `_`, `.` and `-`."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def transformer_layer_decay(depth: int) -> float:
    """`BackboneSpec.layer_decay` of a plain transformer of `depth` blocks, about as BEiT, MAE and ViTDet have it."""
    return 0.75 if depth <= 12 else 0.8 if depth <= 24 else 0.9


def is_path(value: object) -> bool:
    """Whether `value` can be a backbone's name: as `is_name` has it, or such names joined by '/'."""
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Frozen data whose mappings are read-only, and which still copies, pickles and turns into JSON."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Models carry their spec and are deep-copied (EMA) and pickled (DDP); a MappingProxyType can be neither.
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return partial(type(self), **{k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}), ()

    def as_dict(self) -> dict[str, Any]:
        """Everything in the record as plain dicts, lists, strings and numbers."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def _require(self, valid: bool, name: str, remedy: str) -> None:
        if not valid:
            owner, value = getattr(self, fields(self)[0].name), getattr(self, name)
            value = dict(value) if isinstance(value, Mapping) else value
            raise InvalidSpec(f"{type(self).__name__} {owner!r}: {name}={value!r} is wrong; {remedy}")

    def _freeze(self, *names: str) -> None:
        """Turn lists into tuples and dicts into read-only views."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif isinstance(value, Mapping):
                object.__setattr__(self, name, MappingProxyType(dict(value)))


@dataclass(frozen=True, kw_only=True)
class Weights(_Record):
    """One published set of weights.

    Args:
        tag: what `build_backbone(name, pretrained=tag)` asks for.
        source: `hf-hub:ORGANISATION/REPOSITORY`, `/FILE` after it where the weights have an unusual name, or an
            `https://` or `file://` address of a .pth or .safetensors file.
        layout: who named the keys: `timm`, `torchvision` or the family's official release.
        input_size: channels, height and width of the images it was trained on.
        mean, std: per channel, of images scaled to 0..1.
        interpolation: how the training images were resized.
        license: SPDX identifier or the licence's name.
        metrics: published results, such as `{"imagenet_top1": 78.7}`.
        classes: how many classes its classifier tells apart; 0 for features alone, None where that is not stated.
        recipe: address of how it was trained.
        enum: of torchvision's weights, the member of its enum, such as `ViT_B_16_Weights.IMAGENET1K_V1`.
        options: what the model is built with for these weights, unless the user says otherwise, such as the size of
            the images that tables are made for.
        aliases: names of the backbone under which these come before its other weights; of the first under a name,
            `options` are what the name itself means.

    Raises:
        InvalidSpec: a field contradicts the above.
    """

    tag: str
    source: str
    layout: str = "timm"
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    license: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    classes: int | None = None
    recipe: str = ""
    enum: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._freeze("input_size", "mean", "std", "metrics", "options", "aliases")
        self._require(is_name(self.tag), "tag", "use letters, digits, '_', '.' and '-'")
        self._require(
            isinstance(self.source, str) and self.source.startswith(_SOURCES),
            "source",
            "start it with " + " or ".join(repr(s) for s in _SOURCES),
        )
        self._require(isinstance(self.layout, str) and self.layout != "", "layout", "name the key layout")
        self._require(
            _positive_integers(self.input_size) and len(self.input_size) == 3,
            "input_size",
            "give (channels, height, width)",
        )
        for name in ("mean", "std"):
            numbers = isinstance(getattr(self, name), tuple) and len(getattr(self, name)) == self.input_size[0]
            self._require(numbers, name, f"give {self.input_size[0]} numbers, one per input channel")
        self._require(
            self.interpolation in _INTERPOLATIONS, "interpolation", f"use one of {', '.join(_INTERPOLATIONS)}"
        )
        self._require(isinstance(self.metrics, Mapping), "metrics", "give a mapping of metric to value")
        for name in ("license", "recipe", "enum"):
            self._require(isinstance(getattr(self, name), str), name, "give a string")
        classes = self.classes is None or (type(self.classes) is int and self.classes >= 0)
        self._require(classes, "classes", "give their number, 0 for features alone, or leave it out")
        self._require(_is_options(self.options), "options", "give a mapping of option name to value")
        self._require(_are_names(self.aliases), "aliases", "give a tuple of names")

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; imports the library that has them.

        Raises:
            LookupError: neither torchvision nor timm tells them.
        """
        names = None
        if self.enum:
            from torchvision.models import get_weight

            names = get_weight(self.enum).meta["categories"]
        elif self.timm_name:
            from timm.data import ImageNetInfo, infer_imagenet_subset

            subset = infer_imagenet_subset({"num_classes": self.classes})
            names = ImageNetInfo(subset).label_descriptions() if subset else None
        if not names:
            raise LookupError(f"the names of the classes of weights {self.tag!r} are not known")
        return tuple(names)

    @property
    def timm_name(self) -> str:
        """What timm calls the model with these weights, where it publishes them; else empty."""
        found = _TIMM.fullmatch(self.source)
        return found[1] if found else ""


@dataclass(frozen=True, kw_only=True)
class Result(_Record):
    """One published result of a dense task.

    Args:
        task: `detection` or `segmentation`.
        method: what stood on the backbone, such as `Mask R-CNN` or `UPerNet`.
        dataset: what it was measured on, such as `COCO val2017`.
        metrics: `box_ap`, `mask_ap`, `miou` and `miou_ms` (several scales), in per cent.
        source: where it was published.
        schedule: of the training, such as `1x` or `160k` steps.
        size: of images or crops in training.
        pretrain: what the backbone had been trained on before.
        params: of the whole model, in millions.
        gflops: of the whole model, as its authors count them.
        checked: whether the figures were compared with the source.

    Raises:
        InvalidSpec: a field contradicts the above.
    """

    method: str
    task: str
    dataset: str
    metrics: Mapping[str, float] = field(hash=False)
    source: str
    schedule: str = ""
    size: str = ""
    pretrain: str = ""
    params: float | None = None
    gflops: float | None = None
    checked: bool = True

    def __post_init__(self) -> None:
        self._freeze("metrics")
        for name in ("method", "dataset", "source"):
            self._require(isinstance(getattr(self, name), str) and getattr(self, name) != "", name, "give a string")
        self._require(self.task in ("detection", "segmentation"), "task", "use 'detection' or 'segmentation'")
        numbers = isinstance(self.metrics, Mapping) and all(type(v) in (int, float) for v in self.metrics.values())
        known = numbers and len(self.metrics) > 0 and self.metrics.keys() <= {*_DENSE_METRICS}
        self._require(known, "metrics", f"give a mapping of {', '.join(_DENSE_METRICS)} to numbers")


def read_results(path: str | os.PathLike[str]) -> dict[str, tuple[Result, ...]]:
    """Published results by backbone, from a CSV file: columns are `backbone`, fields of `Result`, and metrics."""
    found: dict[str, list[Result]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row.pop("backbone")
            metrics = {key: float(value) for key in _DENSE_METRICS if (value := row.pop(key, ""))}
            told: dict[str, Any] = {**row, "metrics": metrics, "checked": row.get("checked", "yes") == "yes"}
            for key in ("params", "gflops"):
                told[key] = float(row[key]) if row.get(key) else None
            found.setdefault(name, []).append(Result(**told))
    return {name: tuple(rows) for name, rows in found.items()}


def torchvision_weights(
    enum: str, file: str, top1: float | None, top5: float | None, recipe: str, side: int = 224, **fields: Any
) -> Weights:
    """Weights that torchvision publishes, under torchvision's tag.

    Args:
        enum: the member of torchvision's enum, such as `Swin_T_Weights.IMAGENET1K_V1`.
        file: name of the file on download.pytorch.org, without ending.
        top1, top5: accuracy on ImageNet-1K, in per cent; None for features without a classifier.
        recipe: address of how they were trained.
        side: of the images that the accuracy is for.
        **fields: of `Weights`.
    """
    return Weights(
        **{
            "tag": enum.partition(".")[2],
            "source": f"https://download.pytorch.org/models/{file}.pth",
            "layout": "torchvision",
            "input_size": (3, side, side),
            "interpolation": "bilinear",
            "license": "CC-BY-NC-4.0" if "SWAG" in enum else "BSD-3-Clause",
            "metrics": {} if top1 is None else {"imagenet_top1": top1, "imagenet_top5": top5},
            "classes": 0 if top1 is None else 1000,
            "recipe": recipe,
            "enum": enum,
            **fields,
        }
    )


@dataclass(frozen=True, kw_only=True)
class BackboneSpec(_Record):
    """One backbone that a plugin offers, described without importing it.

    Args:
        name: bare name, such as `pvt_v2_b2`; the plugin's namespace comes before it in the canonical id. A plugin that
            finds backbones by the ids of a hub or in folders has names with '/'.
        family: what variants of one architecture share, such as `PVTv2`.
        entry: `module:callable` that returns a `Backbone` when called with the options; a class as a rule.
        channels: channels of each map of the full pyramid.
        strides: input pixels per map pixel, ascending, one for each entry of `channels`.
        defaults: options given to `entry` unless the user gives them.
        weights: published weights; the first is what `pretrained=True` loads.
        aliases: other names for the same thing, such as timm's and torchvision's; those of its weights are among them.
        params: parameters of the published model, in millions.
        gmacs: multiply-adds of the published model for one image of 224 x 224, in billions.
        options: options of the architecture that users may want to set, beside those of every backbone.
        layer_decay: factor to the learning rate per layer towards the input that suits fine-tuning of published
            weights; 1, the same rate for all layers, where its papers and official code know none.
        summary: one line for people.
        paper: address of the paper.
        license: licence of the code, as an SPDX identifier.
        requires: requirements beyond the plugin's own install, as pip takes them (`"einops>=0.7"`).
        results: what was published of it in dense tasks.
        timm_name: timm's name of the same model, if it has one: without weights, that is whose preprocessing it has.

    Raises:
        InvalidSpec: a field contradicts the above.
    """

    name: str
    family: str
    entry: str
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weights: tuple[Weights, ...] = ()
    aliases: tuple[str, ...] = ()
    params: float | None = None
    gmacs: float | None = None
    options: tuple[str, ...] = ()
    layer_decay: float = 1.0
    summary: str = ""
    paper: str = ""
    license: str = ""
    requires: tuple[str, ...] = ()
    results: tuple[Result, ...] = ()
    timm_name: str = ""

    def __post_init__(self) -> None:
        self._freeze("channels", "strides", "defaults", "weights", "aliases", "options", "requires", "results")
        self._require(is_path(self.name), "name", "use letters, digits, '_', '.' and '-', and '/' in ids and paths")
        self._require(isinstance(self.family, str) and self.family != "", "family", "name the architecture")
        entry = isinstance(self.entry, str) and _ENTRY.fullmatch(self.entry)
        self._require(bool(entry), "entry", "write it as 'package.module:callable'")
        self._require(_positive_integers(self.channels), "channels", "give one positive integer per map")
        self._require(_positive_integers(self.strides), "strides", "give one positive integer per map")
        self._require(len(self.strides) == len(self.channels), "strides", f"give as many as channels={self.channels}")
        ascending = all(a < b for a, b in zip(self.strides, self.strides[1:], strict=False))
        self._require(ascending, "strides", "put the finest map first")
        self._require(_is_options(self.defaults), "defaults", "give a mapping of option name to value")
        weights = isinstance(self.weights, tuple) and all(isinstance(w, Weights) for w in self.weights)
        self._require(weights, "weights", "give a tuple of Weights")
        results = isinstance(self.results, tuple) and all(isinstance(r, Result) for r in self.results)
        self._require(results, "results", "give a tuple of Result")
        tags = [w.tag for w in self.weights]
        self._require(len(set(tags)) == len(tags), "weights", "give each tag once")
        self._require(_are_names(self.aliases), "aliases", "give a tuple of names")
        of_weights = (alias for w in self.weights for alias in w.aliases)
        object.__setattr__(self, "aliases", tuple(dict.fromkeys((*self.aliases, *of_weights))))
        for name, unit in (("params", "millions of parameters"), ("gmacs", "billions of multiply-adds")):
            value = getattr(self, name)
            number = value is None or (isinstance(value, (int, float)) and value > 0)
            self._require(number, name, f"give {unit}, or leave it out")
        options = isinstance(self.options, tuple) and all(isinstance(o, str) and o.isidentifier() for o in self.options)
        self._require(options, "options", "give a tuple of option names")
        decay = type(self.layer_decay) in (int, float) and 0 < self.layer_decay <= 1
        self._require(decay, "layer_decay", "give a number over 0 and at most 1")
        for name in ("summary", "paper", "license", "timm_name"):
            self._require(isinstance(getattr(self, name), str), name, "give a string")
        self._require(
            isinstance(self.requires, tuple) and all(_is_requirement(r) for r in self.requires),
            "requires",
            "give a tuple of requirements as pip takes them, such as ('einops>=0.7',)",
        )

    def under(self, alias: str) -> "BackboneSpec":
        """The spec as an alias has it: weights that this is an alias of come first."""
        first = [w for w in self.weights if alias in w.aliases]
        return replace(self, weights=(*first, *(w for w in self.weights if w not in first))) if first else self


@dataclass(frozen=True, kw_only=True)
class BackboneInfo(BackboneSpec):
    """A `BackboneSpec` together with who provides it.

    Args:
        canonical_name: `namespace/name`; means this backbone whatever else is installed.
        plugin: namespace of the plugin.
        distribution: what to `pip install` to have it; empty for `register`ed specs.
        version: the distribution's installed version.
    """

    canonical_name: str
    plugin: str
    distribution: str
    version: str


def _positive_integers(value: object) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(type(v) is int and v > 0 for v in value)


def _is_options(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) for k in value)


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(is_name(v) for v in value)


def _is_requirement(text: object) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement  # few specs have any: not for every `list`

    try:
        Requirement(text)  # type: ignore[arg-type]
    except (InvalidRequirement, TypeError):
        return False
    return True


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):  # most are: asked first, for the sake of `list --json`
        return value
    if isinstance(value, _Record):
        return value.as_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
