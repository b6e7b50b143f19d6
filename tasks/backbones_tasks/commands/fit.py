"""`backbones fit TASK`: train a model into a run folder, or go on with one."""

import argparse
import errno
import math
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException

from backbones.errors import InputError

from ..data.folders import IMAGE_FOLDERS
from ..files import WriteError, is_checkpoint, reason
from ..training.callbacks import (
    quiet,
    read_metrics,
)
from ..training.runs import is_run, new_run, newest_run, read_checkpoint, terminable, told_once
from ..training.task import Task
from ..training.tasks import find_task
from .command_line import CommandLine, own_options, read_as_trained, write_config
from .trust import config_arguments


def run_fit(name: str, argv: Sequence[str]) -> int:
    """Train a model for a task; returns the exit code.

    Raises:
        InputError: a key, a backbone, a folder or data that cannot be used; all but faulty data are refused before
            anything is read or built
    """
    quiet()
    own, rest = own_options(argv)
    with told_once():
        return _fit(find_task(name), own, rest)


def _fit(task: type[Task], own: argparse.Namespace, argv: list[str]) -> int:
    run, checkpoint = _find_run(task.name, own)
    trained = None if checkpoint is None else read_checkpoint(checkpoint, task.name)
    if run is not None and not own.has_config:
        read = [] if trained is None else read_as_trained(task, trained["hyper_parameters"])
        argv = [*config_arguments(run / "config.yaml", task, own.trust), *read, *argv]
    if own.print_groups:
        print_groups(CommandLine("fit", task, argv).model)
        return 0
    if trained is not None and not {"loops", "optimizer_states", "epoch"} <= trained.keys():
        raise InputError(f"{checkpoint} holds weights alone, and no state of a training to go on with")
    cli = CommandLine("fit", task, argv, lambda nodes: run or new_run(task.name, own.out, nodes), trained, checkpoint)
    try:
        return _train(cli, own, checkpoint)
    finally:
        cli.lock.release()


def _train(cli: CommandLine, own: argparse.Namespace, checkpoint: Path | None) -> int:
    run, trainer = cli.run_folder, cli.trainer
    if trainer.is_global_zero:
        write_config(cli, run / "config.yaml")
        print(f"{cli.describe()}\nrun folder: {run}", flush=True)
        if own.ckpt_path is not None:
            print(
                "starting anew: this run has no checkpoint yet" if checkpoint is None else f"going on from {checkpoint}"
            )
    try:
        with terminable(), _quiet_writers(run):
            trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:  # as Lightning raises it under SLURM
        return 143
    except Exception as error:
        _end_others(trainer)
        if isinstance(error, OSError) and _of_run(error, run):  # from what Lightning writes itself
            raise WriteError(f"{run} cannot be written: {reason(error, run / 'checkpoints')}") from error
        raise
    if trainer.is_global_zero and not trainer.fast_dev_run:
        report(run, cli.model, cli.datamodule)
    return 0


def print_groups(task: Task) -> None:
    """Print the optimizer's groups: learning rate at its highest, weight decay, parameters and their names."""
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    print(f"{'lr':>9}  {'decay':>5}  {'tensors':>7}  {'parameters':>11}  names")
    rates = [(g["lr"] * g.get("lr_scale", 1.0), g["weight_decay"], g) for g in task.make_optimizer().param_groups]
    for rate, _, group in sorted(rates, key=lambda row: row[:2]):
        numbers = sum(p.numel() for p in group["params"])
        shown = _shortened([names[p] for p in group["params"]])
        print(f"{rate:9.2e}  {group['weight_decay']:5.2f}  {len(group['params']):7}  {numbers:11,}  {shown}")
    frozen = [name for parameter, name in names.items() if not parameter.requires_grad]
    print(f"gradients are cut to a norm of {task.recipe.clip:g}, unless --trainer.gradient_clip_val says another")
    if frozen:
        print(f"{'frozen':>9}  {'':5}  {len(frozen):7}  {'':11}  {_shortened(frozen)}")


def _shortened(names: list[str], most: int = 4) -> str:
    """The numbered modules that parameters belong to, each once: `stages.0.blocks.1` for all that is in it."""
    owners = list(dict.fromkeys(re.sub(r"^(.*\.\d+)\..*|\.(?:weight|bias)$", r"\1", name) for name in names))
    more = f" and {len(owners) - most} more" if len(owners) > most else ""
    return ", ".join(owners[:most]) + more


def report(run: Path, task: Task, data: LightningDataModule) -> None:
    """Say in plain words what came out, where it is, and what to type next."""
    table = read_metrics(run / "metrics.csv")
    rows = [row for row in table if row[task.metric] and math.isfinite(float(row[task.metric]))]
    if rows:
        best = max(rows, key=lambda row: float(row[task.metric]))
        print(f"\nbest {task.metric} on unseen images: {float(best[task.metric]):.3f} (epoch {int(best['epoch']) + 1})")
    elif any(row[task.metric] for row in table):
        print(
            f"\nno {task.metric} in any epoch: the validation images have nothing to measure by; there is no best.ckpt"
        )
    print(f"pictures: {run / 'predictions.png'} (truth and prediction), {run / 'curves.png'}")
    print(f"metrics, config, checkpoints: {run}")
    images = "DIR"
    if data.root:
        images = next((data.root / name for name in IMAGE_FOLDERS if (data.root / name).is_dir()), data.root)
    checkpoint = "best.ckpt" if rows else "last.ckpt"
    command = ["--ckpt", run / "checkpoints" / checkpoint, "--images", images, "--out", run / "labelled"]
    print(f"label your own images: backbones predict {task.name} {shlex.join(map(str, command))}")


def _of_run(error: OSError, run: Path) -> bool:
    """Whether it is about writing into the run folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return True
    return error.filename is not None and Path(os.fsdecode(error.filename)).absolute().is_relative_to(run.absolute())


@contextmanager
def _quiet_writers(run: Path) -> Iterator[None]:
    """TensorBoard writes in a thread, whose traceback about a run folder would hide what the run itself says of it."""
    hook = threading.excepthook

    def told(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and _of_run(args.exc_value, run)):
            hook(args)

    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = hook


def _end_others(trainer: Trainer) -> None:
    """End the processes that this one has started: what they wait for will not come."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        try:
            process.wait(10)  # it may be about to tell what went wrong
        except subprocess.TimeoutExpired:
            process.kill()


def _find_run(task: str, own: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The run folder and the checkpoint to go on with; None for a new one."""
    if own.ckpt_path is None:
        return None, None
    if own.ckpt_path in ("best", "last"):
        run = Path(own.out) if own.out else newest_run(task)
        if not is_run(run):
            raise InputError(f"{run} holds no run to go on with")
        checkpoint = run / "checkpoints" / f"{own.ckpt_path}.ckpt"
        if not is_checkpoint(checkpoint):  # killed within its first epoch
            return run, None
    else:
        checkpoint = Path(own.ckpt_path)
        run = checkpoint.parent.parent
        if not is_run(run) or (own.out is not None and Path(own.out).resolve() != run.resolve()):
            run = None  # a new run that begins with the state of another
    return run, checkpoint
