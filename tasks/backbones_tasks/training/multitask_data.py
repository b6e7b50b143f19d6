"""The data of several tasks that are trained together, and what the heads and their data are called in a config."""

import argparse
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Literal

import jsonargparse
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from backbones.errors import InputError

from ..data.loading import DataModule
from ..models.multitask import check_names, find_kind
from ..options import explain
from ..ranges import check_ranges
from .classification import ClassificationTask
from .detection import DetectionTask
from .segmentation import SegmentationTask
from .task import Task

Order = Literal["proportional", "round_robin", "mixed"]

#: What a head can be trained for.
_TASKS: dict[str, type[Task]] = {task.name: task for task in (SegmentationTask, ClassificationTask, DetectionTask)}

#: What is trained unless told.
HEADS = {"det": {"task": "detection"}, "seg": {"task": "segmentation"}}


@dataclass(frozen=True)
class Head:
    """A head as a config describes it.

    task: its class. weight: factor to its loss. out_indices: the maps that it takes, if told. options: of `task`,
    but for those that all heads share and those that the data decide. parser, parsed: what made it of the config.
    """

    name: str
    task: type[Task]
    weight: float
    out_indices: list[int] | None
    options: dict[str, Any]
    parser: jsonargparse.ArgumentParser
    parsed: jsonargparse.Namespace

    def data(self) -> DataModule:
        """Its data, by the options that it was read with."""
        with _telling(self.name, self.parser):
            return self.parser.instantiate_classes(self.parsed).data


def read_heads(heads: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> dict[str, Head]:
    """What a config says of the heads and of their data, checked as if each were a task of its own.

    Args:
        heads: by name, "task", "weight", "out_indices" and the options of the task
        data: by name, the options of their data

    Raises:
        InputError: an unknown task or option, or a value that cannot be
    """
    check_names(heads)
    for name in data or {}:
        if name not in heads:
            raise InputError(f"data.heads.{name}: there is no such head among {', '.join(heads)}")
    return {name: _read_head(name, options, (data or {}).get(name, {})) for name, options in heads.items()}


def _read_head(name: str, options: Any, data: Any) -> Head:
    for section, value in (("model", options), ("data", data)):
        if not isinstance(value, Mapping):
            raise InputError(f"{section}.heads.{name}={value!r}: expected a dict of options")
    options = dict(options)
    kind, weight, out_indices = options.pop("task", None), options.pop("weight", 1.0), options.pop("out_indices", None)
    find_kind(name, kind)
    if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise InputError(f"model.heads.{name}.weight={weight!r} must be over 0")
    task = _TASKS[kind]
    common = {*inspect.signature(Task.__init__).parameters, "backbone", *task.linked, *task.alone}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(task, "model", skip=common - {"self"}, instantiate=False)
    parser.add_class_arguments(task.data_class, "data")
    task.link(parser)
    with _telling(name, parser):
        parsed = parser.parse_object({"model": options, "data": dict(data)})
    for section, values in (("model", parsed.model), ("data", parsed.data)):
        check_ranges(task.name, section, values.as_dict(), f"{section}.heads.{name}")
    return Head(name, task, float(weight), out_indices, parsed.model.as_dict(), parser, parsed)


@contextmanager
def _telling(name: str, parser: jsonargparse.ArgumentParser) -> Iterator[None]:
    """Within, an error in a head's options is told as one of the whole config."""
    try:
        yield
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        message = explain(str(error), parser)
        raise InputError(re.sub(r"\b(model|data)\.", rf"\1.heads.{name}.", message)) from error


class MultiTaskData(LightningDataModule):
    """The data sets of several heads, each as its task has it, and batches of one head or of each.

    A batch is a dict of the batches of heads by name.

    Args:
        heads: by name, the options of a head's data, which are those of `backbones fit TASK`, such as `root` and
            `batch_size`; shapes are drawn for heads without a root
        root: the folder of heads that name none
        order: "proportional": a step is one head's, each data set is gone through once per epoch, and their steps are
            spread evenly. "round_robin": a step is one head's, by turns, until the longest data set is through; others
            start over. "mixed": a step has a batch of each head, as long as that
        tasks: the heads themselves, as the model is told
        seed: decides the order, the augmentation and the drawn shapes
    """

    def __init__(
        self,
        heads: dict[str, dict[str, Any]] | None = None,
        root: str | None = None,
        order: Order = "proportional",
        tasks: dict[str, dict[str, Any]] = HEADS,
        seed: int = 0,
    ):
        super().__init__()
        own = {name: {"seed": seed, **({"root": root} if root else {})} for name in tasks}
        told = heads or {}
        options = {name: own.get(name, {}) | dict(told.get(name) or {}) for name in {**own, **told}}
        self.parts: dict[str, DataModule] = {n: head.data() for n, head in read_heads(tasks, options).items()}
        linked = {name: _TASKS[tasks[name]["task"]].linked for name in tasks}
        #: What the data of each head decide about its model.
        self.facts = {name: {fact: getattr(self.parts[name], fact) for fact in linked[name]} for name in tasks}
        self.order, self.root = order, next((part.root for part in self.parts.values() if root), None)
        self.datasets: dict[str, dict[str, Any]] = {}

    @property
    def class_names(self) -> list[str]:
        return [f"{name}/{label}" for name, part in self.parts.items() for label in part.class_names]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def reading(self) -> None:
        """Each head has its own, among the facts."""

    @property
    def source(self) -> str:
        """Where the images come from, in words."""
        return ", ".join(f"{name}: {part.source}" for name, part in self.parts.items())

    def setup(self, stage: str) -> None:
        """Load the splits that a stage needs, of every head."""
        for part in self.parts.values():
            part.setup(stage)

    def train_dataloader(self) -> "HeadBatches":
        return HeadBatches(self._loaders("train_dataloader"), self.order)

    def val_dataloader(self) -> "HeadBatches":
        return HeadBatches(self._loaders("val_dataloader"))

    def test_dataloader(self) -> "HeadBatches":
        return HeadBatches(self._loaders("test_dataloader"))

    def _loaders(self, kind: str) -> dict[str, DataLoader]:
        for part in self.parts.values():
            part.trainer = self.trainer  # which knows the processes
        return {name: getattr(part, kind)() for name, part in self.parts.items()}


class HeadBatches:
    """Batches of several loaders, each a dict by the names of the heads that it is for; see `MultiTaskData`.

    Args:
        loaders: by head
        order: how their batches follow each other
    """

    def __init__(self, loaders: Mapping[str, DataLoader], order: Order = "proportional"):
        self.loaders = dict(loaders)
        lengths = {name: len(loader) for name, loader in self.loaders.items()}
        self.longest = max(lengths.values())
        #: how often each loader is gone through in an epoch
        self.rounds = {name: 1 if order == "proportional" else -(-self.longest // n) for name, n in lengths.items()}
        if order == "mixed":
            self.steps = [tuple(lengths)] * self.longest
        elif order == "round_robin":
            self.steps = [(name,) for _ in range(self.longest) for name in lengths]
        else:
            places = [((i + 0.5) / length, name) for name, length in lengths.items() for i in range(length)]
            self.steps = [(name,) for _, name in sorted(places, key=lambda place: place[0])]
        self.sampler, self.batch_sampler = self, None  # which Lightning tells the epoch, as those of a DataLoader
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = {name: self._endless(name) for name in self.loaders}
        return ({name: next(batches[name]) for name in names} for names in self.steps)

    def batch_names(self, number: int) -> list[str]:
        """What the images of a step of this epoch are called, for people."""
        names = []
        for head in self.steps[number]:
            loader, before = self.loaders[head], sum(head in heads for heads in self.steps[:number])
            round_, place = divmod(before, len(loader))
            _set_epoch(loader, self.epoch * self.rounds[head] + round_)
            keys = next(islice(iter(loader.batch_sampler), place, None))
            names += [f"{head}: {loader.dataset.name(index)}" for _, index in keys]
        return names

    def _endless(self, name: str) -> Iterator[Any]:
        """Batches of one loader, over and over, each time those of another of its epochs."""
        for again in count(self.epoch * self.rounds[name]):
            _set_epoch(self.loaders[name], again)
            yield from self.loaders[name]


def _set_epoch(loader: DataLoader, epoch: int) -> None:
    """What Lightning does for the loaders that it sees."""
    for holder in (loader, loader.batch_sampler):
        sampler = getattr(holder, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
