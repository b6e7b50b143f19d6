"""Run folders: where a training writes, and where a later command finds it."""

import os
import re
from pathlib import Path
from typing import Any

from backbones import weights
from backbones.errors import InputError, WeightsError

RUNS = Path("runs")
_HANDED_DOWN = "BACKBONES_RUN"  # tells the processes that Lightning starts for further GPUs which folder it is


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def new_run(task: str, out: str | None) -> Path:
    """Claim a folder for a new run: `out`, or else the next of `runs/TASK-001`, `runs/TASK-002`, ...

    Raises:
        InputError: `out` holds a run already
    """
    if _HANDED_DOWN in os.environ and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return Path(os.environ[_HANDED_DOWN])
    if out is None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("processes started by a launcher must be told one run folder: add --out DIR")
        folder = _next(task)
    else:
        folder = Path(out)
        if is_run(folder) and int(os.environ.get("RANK", 0)) == 0:
            raise InputError(
                f"{folder} already holds a run; add --ckpt_path last to go on with it, or choose another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
    os.environ[_HANDED_DOWN] = str(folder.resolve())
    return folder


def newest_run(task: str) -> Path:
    """The run folder of `runs/` with the highest number."""
    runs = _numbered(task)
    if not runs:
        raise InputError(f"there is no run in {RUNS.resolve()}; name its folder by --out DIR")
    return runs[max(runs)]


def _numbered(task: str) -> dict[int, Path]:
    found = {path: re.fullmatch(rf"{re.escape(task)}-(\d+)", path.name) for path in RUNS.glob(f"{task}-*")}
    return {int(match[1]): path for path, match in found.items() if match}


def _next(task: str) -> Path:
    number = max(_numbered(task), default=0) + 1
    while True:
        folder = RUNS / f"{task}-{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another training started at the same moment
            number += 1
        else:
            return folder


def read_checkpoint(path: Path, task: str) -> dict[str, Any]:
    """The content of a checkpoint of a run of this task.

    Raises:
        WeightsError: it is missing, truncated, or no checkpoint of a run
        InputError: it is of another task
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint; a run keeps them in its folder checkpoints/")
    content = weights.read_checkpoint(path)
    if not {"state_dict", "hyper_parameters"} <= content.keys():
        raise WeightsError(f"{path} is no checkpoint of `backbones fit`")
    if content.get("task") != task:
        raise InputError(f"{path} is a checkpoint of {content.get('task')}, not of {task}")
    return content
