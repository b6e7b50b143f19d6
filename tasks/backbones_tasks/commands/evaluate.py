"""`backbones validate | test TASK`: measure a checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from backbones.errors import InputError

from ..training.callbacks import (
    quiet,
)
from ..training.runs import is_run, newest_run, read_checkpoint, told_once
from ..training.task import Task
from ..training.tasks import find_task
from .command_line import CommandLine, as_trained, own_options


def run_evaluation(command: str, name: str, argv: Sequence[str]) -> int:
    """Run validate or test for a task; returns the exit code.

    Raises:
        InputError: no checkpoint is given, or its classes are not those of the data
        WeightsError: the checkpoint cannot be read
    """
    quiet()
    own, rest = own_options(argv)
    with told_once():
        return _evaluate(command, find_task(name), own, rest)


def _evaluate(command: str, task: type[Task], own: argparse.Namespace, argv: list[str]) -> int:
    if own.ckpt_path is None:
        raise InputError(f"backbones {command} needs --ckpt_path: best, last, or a checkpoint file")
    checkpoint = Path(own.ckpt_path)
    if own.ckpt_path in ("best", "last"):
        checkpoint = (Path(own.out) if own.out else newest_run(task.name)) / "checkpoints" / f"{own.ckpt_path}.ckpt"
    trained = read_checkpoint(checkpoint, task.name)
    argv = [*as_trained(task, checkpoint, trained["hyper_parameters"], not own.has_config, own.trust), *argv]
    cli = CommandLine(command, task, argv, trained=trained, source=checkpoint)
    if is_run(checkpoint.parent.parent):
        cli.model.folder = checkpoint.parent.parent
    measure = cli.trainer.validate if command == "validate" else cli.trainer.test
    measure(cli.model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    if cli.trainer.is_global_zero:
        values = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
        width = max(map(len, values))
        print(checkpoint, *(f"  {name:{width}}  {value:.4f}" for name, value in values.items()), sep="\n")
    return 0
