"""Teachers, and where they come from: checkpoints of runs, saved models, backbones with published weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import backbones
from backbones import backbone_info, build_backbone
from backbones.errors import InputError
from backbones.weights import load_weights

from ..data.reading import Reading, in_channels
from ..files import is_checkpoint
from ..models import pretrained
from .normalisation import Normalise
from .runs import read_checkpoint, restore

if TYPE_CHECKING:
    from .distillation import Student

TeacherLike = str | dict[str, Any]

_WEIGHTS = ("pretrained", "weights")


class Teacher:
    """A frozen model beside the student: it is no part of it, and neither trained, saved, averaged nor copied.

    Called with images (B, C, H, W), it returns what the model does in eval mode, without gradients, on their device.

    Args:
        model: such as a trained task, from images in [0, 1] to logits
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Any:
        with torch.no_grad():
            self.model.to(images.device)
            return self.model(images.to(next(self.model.parameters()).dtype))

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self


class Source:
    """What a teacher is made of; one subclass for each kind."""

    #: The task that it knows the classes of, if it knows any.
    task: str | None = None

    def logits(self, student: "Student") -> nn.Module:
        """From images in [0, 1] to logits of the student's classes."""
        raise NotImplementedError

    def maps(self, student: "Student", strides: Sequence[int]) -> nn.Module:
        """A backbone with maps of these strides, as far as it has them."""
        raise NotImplementedError


class Published(Source):
    """A backbone by name or options, with published weights unless told which."""

    def __init__(self, teacher: TeacherLike):
        options = {"name": teacher} if isinstance(teacher, str) else dict(teacher)
        if "name" not in options:
            raise InputError(f'model.teacher: the options {sorted(options)} lack "name"')
        self.info = backbone_info(options["name"])
        self.options = options if options.keys() & set(_WEIGHTS) else {**options, "pretrained": True}
        if not any(self.options.get(name) for name in _WEIGHTS):
            raise InputError(
                f"model.teacher={teacher!r} would be of random weights, which teach nothing; leave out pretrained"
            )

    def logits(self, student: "Student") -> nn.Module:
        return student.named_teacher(in_channels(self.options, student.reading))

    def maps(self, student: "Student", strides: Sequence[int]) -> nn.Module:
        return _with_strides(in_channels(self.options, student.reading), strides)


class Checkpoint(Source):
    """A checkpoint of a run."""

    def __init__(self, file: Path):
        self.file, self.content = file, read_checkpoint(file)
        self.task = self.content["task"]

    def logits(self, student: "Student") -> nn.Module:
        self._check_reading(student.reading)
        found = restore(type(student), self.content, self.file)
        _check_classes(self.file, found.class_names, student.class_names)
        return found

    def maps(self, student: "Student", strides: Sequence[int]) -> nn.Module:
        self._check_reading(student.reading)
        backbone = _with_strides(self.content["hyper_parameters"]["backbone"], strides)
        state = self.content["state_dict"]
        load_weights(backbone, {name: value for name, value in state.items() if "backbone." in name})
        return backbone

    def _check_reading(self, own: Reading) -> None:
        reading = Reading(**(self.content["hyper_parameters"].get("reading") or {}))
        for name in ("range", "bands", "nodata"):
            before, now = getattr(reading, name), getattr(own, name)
            if before != now:
                raise InputError(
                    f"model.teacher: {self.file} was trained on images read with {name}={before}, these are with {now}"
                )


class Saved(Source):
    """A folder of `save_pretrained` or `backbones share`, of a task's model or of a backbone."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.task = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("task")

    def logits(self, student: "Student") -> nn.Module:
        model = pretrained.from_pretrained(self.folder)
        _check_classes(self.folder, model.metadata.get("class_names"), student.class_names)
        return nn.Sequential(Normalise(model.inner_backbone), model)

    def maps(self, student: "Student", strides: Sequence[int]) -> nn.Module:
        load = backbones.from_pretrained if self.task is None else pretrained.from_pretrained
        model: Any = load(self.folder)
        backbone: nn.Module = getattr(model, "inner_backbone", model)
        if not getattr(backbone, "features_only", True):
            raise InputError(
                f"model.teacher: {self.folder} is a classifier and returns no maps; give the run's checkpoint"
            )
        return backbone


def find_teacher(teacher: TeacherLike) -> Source:
    """What a teacher is given by: a checkpoint or a run's folder, a saved model, or a backbone's name or options.

    Raises:
        InputError, WeightsError: there is no such teacher, or it would know nothing
    """
    if isinstance(teacher, str):
        path = Path(teacher).expanduser()
        best = path / "checkpoints" / "best.ckpt"
        if is_checkpoint(best):
            return Checkpoint(best)
        if path.suffix == ".ckpt" or is_checkpoint(path):
            return Checkpoint(path)
        if (path / "config.json").is_file():
            return Saved(path)
    return Published(teacher)


def _with_strides(options: Mapping[str, Any], strides: Sequence[int]) -> nn.Module:
    left_out = ("name", "out_indices", "features_only")
    kept = {name: value for name, value in options.items() if name not in left_out}
    there = backbone_info(options["name"]).strides
    indices = [i for i, stride in enumerate(there) if stride in strides]
    if not indices:
        raise InputError(
            f"model.teacher: {options['name']} has maps of strides {list(there)}, the student of {list(strides)}"
        )
    return build_backbone(options["name"], out_indices=indices, **kept)


def _check_classes(source: Path, theirs: Sequence[str] | None, own: Sequence[str]) -> None:
    if theirs is not None and list(theirs) != list(own):
        raise InputError(f"model.teacher: {source} tells the classes {', '.join(theirs)}, the student {', '.join(own)}")
