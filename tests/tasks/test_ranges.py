"""Every number among the options has a range, and what lies outside is refused by its name before anything is built."""

import dataclasses
import math
import typing
from types import UnionType

import pytest
from pytorch_lightning import Trainer

from backbones.cli import main
from backbones.errors import InputError
from backbones_tasks.commands.command_line import CommandLine
from backbones_tasks.ranges import RANGES, check_ranges
from backbones_tasks.training.segmentation import SegmentationTask
from backbones_tasks.training.task import Task
from backbones_tasks.training.tasks import TASKS

INTERNAL = {"out_indices"}


def numeric(annotation):
    """Whether a number, or a list of them, is among the values; dicts have checks of their own."""
    if annotation in (int, float):
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, UnionType, list, tuple):
        return any(map(numeric, typing.get_args(annotation)))
    return False


def numbers(owner, section):
    """Options of a class that are numbers, those of dataclasses among them."""
    hints = typing.get_type_hints(owner if dataclasses.is_dataclass(owner) else owner.__init__)
    for name, annotation in hints.items():
        if dataclasses.is_dataclass(annotation):
            yield from numbers(annotation, f"{section}.{name}")
        elif numeric(annotation) and name not in INTERNAL:
            yield f"{section}.{name}"


OPTIONS = {
    (task.name, option)
    for task in TASKS.values()
    for owner, section in ((Task, "model"), (task, "model"), (task.data_class, "data"), (Trainer, "trainer"))
    for option in numbers(owner, section)
}


def test_every_number_has_a_range():
    missing = sorted({option for _, option in OPTIONS} - RANGES.keys())
    assert not missing, f"ranges.py lacks {', '.join(missing)}"
    assert len({option for _, option in OPTIONS}) > 50


def outside(allowed):
    """Values that are not allowed: on both sides, and what is no number."""
    below = allowed.low if allowed.open_low else allowed.low - 1
    yield below if below != allowed.also else below - 1
    if allowed.high < math.inf:
        yield allowed.high if allowed.open_high else allowed.high + 1
    yield from (math.nan, math.inf)


@pytest.mark.parametrize("key", sorted(RANGES))
def test_numbers_outside_their_range_are_refused_by_name(key):
    task, _, option = key.rpartition(":")
    section, _, name = option.rpartition(".") if "." in option else ("", "", option)
    outer, _, inner = section.partition(".")
    for value in outside(RANGES[key]):
        values = {inner: {name: value}} if inner else {name: value}
        with pytest.raises(InputError, match=f"{option}={value}"):
            check_ranges(task or "segmentation", outer, values)


@pytest.mark.parametrize(
    ("task", "argument", "told"),
    [
        ("segmentation", "--data.batch_size=0", "data.batch_size=0 must be at least 1"),
        ("segmentation", "--data.crop_size=-5", "data.crop_size=-5 must be at least 1"),
        ("segmentation", "--data.crop_size=[64, 0]", "data.crop_size=[64, 0] must be at least 1"),
        ("segmentation", "--data.scale=[0, 0]", "data.scale=[0.0, 0.0] must be over 0"),
        ("detection", "--data.scale=[2, 0.5]", "data.scale=[2.0, 0.5] must not fall"),
        ("classification", "--data.scale=[0.5, 2]", "data.scale=[0.5, 2.0] must be over 0 and at most 1"),
        ("segmentation", "--model.lr=-1", "model.lr=-1.0 must be at least 0"),
        ("segmentation", "--model.lr=.nan", "model.lr=nan must be at least 0"),
        ("segmentation", "--model.inference.window=3", "window=3 must be at least 32"),
        ("detection", "--data.num_workers=-1", "data.num_workers=-1 must be at least 0"),
        ("segmentation", "--trainer.max_epochs=-3", "trainer.max_epochs=-3 must be at least 1, or -1"),
        ("segmentation", "--trainer.max_epochs=-1", "has no end"),
        ("segmentation", "--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
        ("segmentation", "--seed_everything=-1", "seed_everything=-1 must be at least 0"),
        ("multitask", "--model.heads={a: {task: segmentation, class_weights: [1, -1]}}", "model.heads.a.class_weights"),
        ("multitask", "--data.heads={det: {batch_size: 0}}", "data.heads.det.batch_size=0 must be at least 1"),
        ("segmentation", "--model.optimizer_options={betas: [2, 2]}", "optimizer_options={'betas': [2, 2]}: Invalid"),
        ("segmentation", "--model.optimizer_options={beta: 1}", "optimizer_options={'beta': 1}"),
    ],
)
def test_the_command_line_refuses_them_before_anything_is_built(task, argument, told, capsys, monkeypatch, workplace):
    builds = CommandLine.instantiate_classes

    def stops(self):
        if task != "multitask":  # whose data read their heads
            pytest.fail("something was built")
        builds(self)

    monkeypatch.setattr(CommandLine, "instantiate_classes", stops)
    assert main(["fit", task, argument]) == 2
    assert told in capsys.readouterr().err
    assert not list(workplace.iterdir())


def test_python_is_refused_the_same():
    with pytest.raises(InputError, match=r"model\.warmup=2 must be at least 0 and at most 1"):
        SegmentationTask(num_classes=2, warmup=2, decoder_options={"decoder_channels": 8})
