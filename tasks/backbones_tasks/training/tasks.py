"""Tasks by name, and the trained ones in checkpoints."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from backbones.errors import InputError, WeightsError

from ..models.base import HoldsBackbone
from .callbacks import read_metrics
from .classification import ClassificationTask
from .detection import DetectionTask
from .multitask import MultiTask
from .runs import read_checkpoint, restore
from .segmentation import SegmentationTask
from .task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (SegmentationTask, ClassificationTask, DetectionTask, MultiTask)
}


def find_task(name: str) -> type[Task]:
    """The class of a task."""
    return TASKS[name]


def load_task(checkpoint: Path, name: str | None = None, device: str = "cpu") -> Task:
    """The trained task in a checkpoint, in eval mode; the checkpoint alone says how to build it.

    Raises:
        WeightsError: it is missing, truncated, or no checkpoint of a run
        InputError: it is of another task than the one of this name
    """
    return restore_task(read_checkpoint(checkpoint, name), checkpoint).to(device).eval()


def restore_task(content: Mapping[str, Any], source: Path) -> Task:
    """The trained task in the content of a checkpoint.

    Raises:
        WeightsError: its options build no task, or one of other weights
    """
    if content["task"] not in TASKS:
        raise WeightsError(f"{source} is a checkpoint of {content['task']!r}, which is none of {', '.join(TASKS)}")
    restored: Task = restore(find_task(content["task"]), content, source)
    return restored


def load_model(checkpoint: Path) -> HoldsBackbone:
    """The trained model in a checkpoint of `backbones fit`, in eval mode, with what its run tells in `metadata`."""
    content = read_checkpoint(checkpoint)
    task = restore_task(content, checkpoint).eval()
    if type(content.get("epoch")) is not int:
        raise WeightsError(f"{checkpoint} does not say of which epoch it is; it is no checkpoint of `backbones fit`")
    task.model.metadata = _facts(task, content["epoch"], checkpoint.absolute().parent.parent)
    model: HoldsBackbone = task.model
    return model


def _facts(task: Any, epoch: int, run: Path) -> dict[str, Any]:
    """What a checkpoint of an epoch and its run tell: classes, data, metrics and recipe, no private paths."""
    options = task.hparams
    facts: dict[str, Any] = {"class_names": task.class_names}
    if not task.reading.photographs:  # else images are what everyone takes them for
        facts["reading"] = task.reading.plain()
    if root := _data_root(run / "config.yaml"):
        facts["data"] = root
    for row in read_metrics(run / "metrics.csv"):
        if int(row["epoch"]) == epoch:
            scores = {name: float(row[name]) for name in task.scores if row.get(name)}
            facts["metrics"] = {name: score for name, score in scores.items() if math.isfinite(score)}
    recipe = [f"{epoch + 1} epoch{'s' if epoch else ''}", options["optimizer"], f"learning rate {options['lr']:g}"]
    facts["training"] = ", ".join(recipe)
    facts["input"] = {name: options[name] for name in ("image_size", "crop") if options.get(name)}
    return {name: value for name, value in facts.items() if value}


def _data_root(config: Path) -> str | None:
    """What a run was trained on, by the name of its folder."""
    if not config.is_file():
        return None
    try:
        data = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data") or {}
        if "root" not in data:
            return None
        root = data["root"] and str(data["root"])
    except (AttributeError, TypeError, UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"{config} is no config of options: {error}") from error
    return Path(root).expanduser().resolve().name if root else "coloured shapes, drawn on the fly"
