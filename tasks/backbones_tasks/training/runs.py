"""Run folders: where a training writes, and where a later command finds it."""

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from backbones.errors import BackboneError, InputError, WeightsError
from backbones.weights import require_whole

from .. import files

RUNS = Path("runs")
HANDED_DOWN = "BACKBONES_RUN"  # tells the processes that Lightning starts for further GPUs which folder it is


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def new_run(task: str, out: str | None, nodes: int = 1) -> Path:
    """Claim a folder for a new run: `out`, or else the next of `runs/TASK-001`, `runs/TASK-002`, ...

    Args:
        nodes: how many machines train together.

    Raises:
        InputError: `out` holds a run already, or is not given where a launcher starts the processes
    """
    if HANDED_DOWN in os.environ and _number("LOCAL_RANK") > 0 and not _launched():
        return Path(os.environ[HANDED_DOWN])
    if out is None:
        if nodes > 1 or _launched():
            raise InputError("processes started by a launcher must be told one run folder: add --out DIR")
        folder = next_folder(task)
    else:
        folder = Path(out)
        if is_run(folder) and _first():
            raise InputError(
                f"{folder} already holds a run; add --ckpt_path last to go on with it, or choose another --out"
            )
        with told_as_written(folder):
            folder.mkdir(parents=True, exist_ok=True)
    os.environ[HANDED_DOWN] = str(folder.resolve())
    return folder


class Lock:
    """A run folder belongs to one training at a time, until its process ends, however it does.

    Of all the processes of a training, the first one holds it. A lock by `lockf` is not handed down to the processes
    that load data, which may outlive a killed training by seconds.

    Raises:
        InputError: another training holds the folder
        WriteError: the folder cannot be written to
    """

    def __init__(self, folder: Path):
        self.file = folder / ".lock"
        self.stream = None
        if not _first():
            return
        with told_as_written(self.file):
            self.stream = self.file.open("a+")
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.lockf(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"{folder} is being trained in by another process; wait, or choose another --out"
                ) from None
            # a file system without locks

    def release(self, undo: bool = False) -> None:
        """Let go of the folder; to undo also removes what has been made of it so far."""
        if self.stream is None:
            return
        if undo:
            self.file.unlink(missing_ok=True)
            with suppress(OSError):  # what holds something stays
                self.file.parent.rmdir()
                self.file.parent.parent.rmdir()
        self.stream.close()
        self.stream = None


@contextmanager
def told_as_written(path: Path) -> Iterator[None]:
    """Within, an OSError is told as one of writing this file or folder."""
    try:
        yield
    except OSError as error:
        raise files.WriteError(f"{path} cannot be written: {files.reason(error, path)}") from error


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM raises SystemExit(143), so that callbacks can say how to go on; a second one changes nothing."""
    handler = signal.getsignal(signal.SIGTERM)
    # SLURM's requeueing has a use of its own for the signal
    ours = handler == signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if not ours or SLURMEnvironment.detect():
        yield
        return
    ended = []

    def end(number: int, frame: Any) -> None:
        if not ended:
            ended.append(number)
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def told_once() -> Iterator[None]:
    """What is wrong with the arguments or the data, every process that torchrun or SLURM starts finds for itself.

    The first one of each machine tells it. The others wait to be stopped, as launchers do once one has failed; what
    only they have found, they tell then.
    """
    try:
        yield
    except BackboneError:
        if _launched() and _number("LOCAL_RANK", "SLURM_LOCALID") > 0:
            time.sleep(30)
        raise


def _launched() -> bool:
    """Whether processes are started by torchrun or SLURM, and not by Lightning in the first one."""
    if TorchElasticEnvironment.detect():
        return _number("WORLD_SIZE") > 1
    return SLURMEnvironment.detect() and _number("SLURM_NTASKS") > 1


def _first() -> bool:
    """Whether this is the first of all processes, whoever starts them."""
    if "RANK" in os.environ:
        return _number("RANK") == 0
    return _number("LOCAL_RANK", "SLURM_PROCID") == _number("NODE_RANK") == 0


def _number(*names: str) -> int:
    """The first of these environment variables that is set, or 0."""
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def newest_run(task: str) -> Path:
    """The run folder of `runs/` with the highest number."""
    runs = _numbered(task)
    if not runs:
        raise InputError(f"there is no run in {RUNS.resolve()}; name its folder by --out DIR")
    return runs[max(runs)]


def _numbered(task: str) -> dict[int, Path]:
    found = {path: re.fullmatch(rf"{re.escape(task)}-(\d+)", path.name) for path in RUNS.glob(f"{task}-*")}
    return {int(match[1]): path for path, match in found.items() if match}


def next_folder(task: str) -> Path:
    """Make the next of `runs/TASK-001`, `runs/TASK-002`, ..."""
    number = max(_numbered(task), default=0) + 1
    while True:
        folder = RUNS / f"{task}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another training started at the same moment
            number += 1
        except OSError as error:
            raise files.WriteError(f"{folder} cannot be made: {files.reason(error, folder)}") from error
        else:
            return folder


def read_checkpoint(path: Path, task: str | None = None) -> dict[str, Any]:
    """The content of a checkpoint of a run, of this task if one is given.

    Raises:
        WeightsError: it is missing, truncated, or no checkpoint of a run
        InputError: it is of another task
    """
    if not files.is_checkpoint(path):
        raise WeightsError(f"{path}: no such checkpoint; a run keeps them in its folder checkpoints/")
    content = files.read_checkpoint(path)
    for key, kind in {"state_dict": Mapping, "hyper_parameters": Mapping, "task": str}.items():
        if not isinstance(content.get(key), kind):
            raise WeightsError(f"{path} is no checkpoint of `backbones fit`: it has no {key}, or not as it writes it")
    if task is not None and content["task"] != task:
        raise InputError(f"{path} is a checkpoint of {content['task']}, not of {task}")
    return content


def restore(kind: type[LightningModule], content: Mapping[str, Any], source: Path) -> Any:
    """The trained task of a class in the content of a checkpoint.

    Raises:
        WeightsError: its options build no such task, or one of other weights
    """
    try:
        task = kind(**content["hyper_parameters"])
    except BackboneError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{source}: its hyper_parameters build no {kind.name} ({error}); it was damaged, or written by another "
            "version of dense-backbones"
        ) from error
    require_whole(task, content["state_dict"], str(source))
    task.load_state_dict(content["state_dict"])
    return task
