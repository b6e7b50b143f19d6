"""Files that are whole or not there, and checkpoints of many processes as one."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from backbones import weights
from backbones.errors import BackboneError, WeightsError

_INDEX = "index.pt"  # in a sharded checkpoint: all but the shards, and the names of the files that hold these
_SHARD = "__shard__"


class WriteError(BackboneError, OSError):
    """A file cannot be written: the disk is full, the folder is read-only or gone."""


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write a file that is whole or not there, or what it was before, whenever the process is killed.

    Raises:
        WriteError: it cannot be written; what was there before is as it was
    """
    unfinished = file.with_name(f".unfinished-{file.name}")
    try:
        yield unfinished
        with unfinished.open("rb+") as stream:
            os.fsync(stream.fileno())
        if file.is_dir():  # a checkpoint in shards; a file cannot take its place
            shutil.rmtree(file)
        os.replace(unfinished, file)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and _is_about(error, file):
            raise WriteError(f"{file} cannot be written: {reason(error, file)}") from error
        raise


def _is_about(error: OSError, file: Path) -> bool:
    """Whether it is one of writing this file, and not of reading what goes into it."""
    if isinstance(error, WriteError) or error.errno is None:
        return False
    return error.filename is None or Path(os.fsdecode(error.filename)).parent == file.parent


def reason(error: OSError, file: Path) -> str:
    """Why a file cannot be written, in a few words."""
    if isinstance(error, FileNotFoundError) and not file.parent.is_dir():
        return f"the folder {file.parent} is gone"
    return (error.strerror or str(error)).lower()


def write_json(file: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")


def save(content: Any, file: Path) -> None:
    """`torch.save`, which tells what hinders it; by itself it says "unexpected pos" of a full disk or a signal."""
    with file.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            cause: BaseException | None = error
            while isinstance(cause, Exception) and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint, in one file or in shards."""
    return path.is_file() or is_sharded(path)


def is_sharded(path: Path) -> bool:
    return (path / _INDEX).is_file()


def save_shards(
    checkpoint: Mapping[str, Any], folder: Path, token: str, rank: int, barrier: Callable[[], None]
) -> None:
    """Write a checkpoint with DTensors, each process its shards; all of them call this, with one token.

    Whenever a process is killed, the folder holds this checkpoint or the one before: the index is written last, and
    names files that belong to it alone. torch.distributed.checkpoint is not used because it unpickles what it reads
    without any check.

    Args:
        checkpoint: nested dicts, lists and tuples; DTensors are sharded along their first dimension, by one mesh.
        folder: what to write; it may hold an earlier checkpoint, or be one in a single file.
        token: a word that no earlier checkpoint had.
        rank: of this process.
        barrier: waits for all processes.
    """
    shards: list[Tensor] = []

    def take_out(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        shards.append(value.detach().to_local().to("cpu", copy=True))
        return {_SHARD: len(shards) - 1, "shape": list(value.shape)}

    content = _map(take_out, checkpoint)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    if rank == 0:
        (unfinished if folder.is_file() else folder).mkdir(parents=True, exist_ok=True)
    barrier()
    target = unfinished if folder.is_file() else folder
    with whole(target / f"{token}-{rank:05d}.pt") as file:
        save({"shards": shards}, file)
    barrier()
    if rank == 0:
        files = sorted(path.name for path in target.glob(f"{token}-*.pt"))
        with whole(target / _INDEX) as file:
            save({"content": content, "files": files}, file)
        for path in target.iterdir():
            if path.name not in (_INDEX, *files):
                path.unlink()
        if target is unfinished:
            folder.unlink()
            unfinished.rename(folder)
    barrier()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, in one file or in shards, on the CPU; no code in it is run.

    Raises:
        WeightsError: it is missing, truncated, or holds more than plain data
    """
    if not is_sharded(path):
        return dict(weights.read_checkpoint(path))
    index = weights.read_checkpoint(path / _INDEX)
    named = index.get("files")
    if "content" not in index or not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise WeightsError(f"{path / _INDEX} is no index of a checkpoint in shards")
    parts = [weights.read_checkpoint(path / Path(name).name).get("shards") for name in named]

    def put_in(value: Any) -> Any:
        if not (isinstance(value, dict) and _SHARD in value):
            return value
        return torch.cat([part[value[_SHARD]] for part in parts]).view(value["shape"])

    try:
        return dict(_map(put_in, index["content"]))
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: its shards do not make up what {_INDEX} says; one is damaged, or of another moment ({error})"
        ) from error


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested dicts, lists and tuples, with everything in them changed; what a change returns is left as it is."""
    changed = change(value)
    if changed is not value:
        return changed
    if isinstance(value, Mapping):
        return {key: _map(change, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(change, inner) for inner in value)
    return value
