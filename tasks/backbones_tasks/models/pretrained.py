"""Models for tasks, from the folders and repositories that `save_pretrained` and `push_to_hub` wrote."""

import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backbones import LoadReport, build_backbone, hub, saving
from backbones.errors import InputError, WeightsError
from backbones.weights import read_checkpoint, require_sound

from .base import HoldsBackbone
from .classifier import build_classifier
from .detector import build_detector
from .multitask import build_multitask
from .panoptic import build_panoptic
from .segmenter import build_segmenter

_BUILDERS: dict[str, Callable[..., HoldsBackbone]] = {
    "segmentation": build_segmenter,
    "classification": build_classifier,
    "detection": build_detector,
    "multitask": build_multitask,
    "panoptic": build_panoptic,
}


_FIELDS = {"task": str, "options": dict, "backbone": dict}


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    backbone: Mapping[str, Any] | None = None,
    **options: Any,
) -> HoldsBackbone:
    """Build a model for a task that `save_pretrained`, `push_to_hub` or `backbones share` saved, with its weights.

    Args:
        source: a folder, or a repository of the hub, `ORGANISATION/NAME`.
        revision: branch, tag or commit of the repository.
        token: for private repositories; by default the one that `hf auth login` has stored.
        backbone: options of the backbone that replace those that it was saved with, such as `drop_path_rate`.
        **options: replace those that the model was saved with, such as `num_classes` to fine-tune it on other data.
            What then fits is loaded, and `load_report` has the rest.

    Returns:
        The model, in training mode, as from `build_segmenter`, `build_classifier`, `build_detector` or
        `build_multitask`; its `metadata` has the names of the classes, where they are known.

    Raises:
        MissingDependency: the plugin that the backbone comes from is not installed.
        WeightsError: the folder or repository cannot be had, holds no such model, is of a newer format, or its weights
            are of another model.
    """
    config, weights = hub.read_folder(source, revision=revision, token=token)
    if "task" not in config and isinstance(config.get("backbone"), str):
        raise InputError(f"{source} holds a backbone alone; load it with backbones.from_pretrained")
    hub.require_fields(config, _FIELDS, source)
    saved = config["backbone"]
    hub.require_fields(saved, hub.BACKBONE_FIELDS, source)
    task = config["task"]
    if task not in _BUILDERS:
        raise WeightsError(f"{source} is a model for {task!r}, which dense-backbones {version(saving.LIBRARY)} has not")
    inner = {**saved["options"], **(backbone or {})}
    if "num_classes" in options and inner.get("features_only") is False:  # the classifier is the backbone's
        inner["num_classes"] = options["num_classes"]
    with hub.explained(saved, source):
        body = build_backbone(saved["backbone"], **{"pretrained_cfg": saved.get("pretrained_cfg"), **inner})
    model = _BUILDERS[task](backbone=body, **{**config["options"], **options})
    model.metadata = dict(config.get("metadata", {}))
    changed = inner != saved["options"] or any(
        name not in config["options"] or hub.as_saved(value) != config["options"][name]
        for name, value in options.items()
    )
    if changed and model.saved_options().get("num_classes") != config["options"].get("num_classes"):
        model.metadata.pop("class_names", None)
    same_classes = model.saved_options().get("num_classes") == config["options"].get("num_classes")
    model.load_report = _load(model, weights, str(source), not changed, same_classes and "num_classes" not in options)
    return model


def _load(model: HoldsBackbone, weights: Path, source: str, exactly: bool, same_classes: bool) -> LoadReport:
    """Load what fits: all of it, but for heads that changed options ask for, and for other classes."""
    state, own = read_checkpoint(weights), model.state_dict()
    report = LoadReport(source=source)
    for name, value in state.items():
        if name not in own:
            report.unexpected[name] = tuple(value.shape)
        elif value.shape != own[name].shape:
            report.mismatched[name] = (tuple(value.shape), tuple(own[name].shape))
        else:
            require_sound(name, value, own[name])  # before anything is written
            report.loaded[name] = tuple(value.shape)
    report.missing = {name: tuple(value.shape) for name, value in own.items() if name not in state}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report.share = sum(size for name, size in sizes.items() if name in report.loaded) / max(1, sum(sizes.values()))
    if exactly and (report.missing or report.mismatched or report.unexpected):
        raise WeightsError(
            f"{source}: {saving.WEIGHTS} does not hold the weights of the {saving.CONFIG} beside it.\n{report}"
        )
    body = {id(parameter) for parameter in model.inner_backbone.parameters()}
    fresh = [n for n, p in model.named_parameters() if id(p) in body and n in report.missing]
    wrong = [*report.unexpected, *fresh, *(report.mismatched if same_classes else ())]
    if wrong:
        raise WeightsError(
            f"{source}: with these options, {len(wrong)} tensors of {saving.WEIGHTS} would not be loaded or have "
            f"nowhere to go ({', '.join(wrong[:3])}, ...); build the model with its own builder, and load what you "
            f"want of them\n{report}"
        )
    model.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report
