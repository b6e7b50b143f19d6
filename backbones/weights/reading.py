"""Files of weights, and where in them the tensors of a model are."""

import argparse
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import WeightsError
from .layouts import AVERAGED

__all__ = ["StateDict", "read_checkpoint", "state_dicts"]


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The content of a .safetensors or torch file, read without running any code in it.

    Raises:
        WeightsError: the file is missing, truncated, no checkpoint, or holds more than plain data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Namespaces of command-line arguments are plain data, and several releases hold one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own ways to fail, from zipfile's to pickle's
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint: {_reason(error)}. "
            "If it was downloaded, download it again; if it holds more than tensors, save its state dict alone with "
            "torch.save"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a state dict or a dict that has one")
    return content


def _reason(error: Exception) -> str:
    """Why a file could not be read, without torch's advice to run the code in it."""
    message = str(error).strip()
    if found := re.search(r"\bGLOBAL (\S+)", message):
        return f"it holds a {found[1]}, which may run code"
    if not message or isinstance(error, (pickle.UnpicklingError, KeyError, EOFError)):
        return "it is no torch file, or a part of one"
    return re.split(r"\. |\n", message)[0]


# In which mappings of a checkpoint weights are not looked for, though names and shapes may be those of weights.
_NO_WEIGHTS = re.compile(r"optim|exp_avg|grad|sched|momentum|scaler|callback|loops|hyper_parameters|args|c(on)?fi?g$")
# What releases call the state dict, as timm looks for them; averaged weights come before all of these.
_CONTAINERS = (
    *("state_dict", "model", "model_state", "model_state_dict", "module", "net", "network", "params", "weights"),
    *("backbone", "encoder"),
)


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, and where in a checkpoint they stand."""

    path: str
    tensors: Mapping[str, Tensor]
    rank: int  # copies of smaller ranks are meant first


def state_dicts(content: Mapping[Any, Any], source: str) -> list[StateDict]:
    """Every mapping of a checkpoint that holds tensors, in the order in which releases mean them to be used.

    Raises:
        WeightsError: there is none, or tensors whose names are no strings.
    """
    found, unnamed = [], []
    for path, mapping in _mappings(content):
        tensors = {key: value for key, value in mapping.items() if isinstance(value, Tensor)}
        if all(isinstance(key, str) for key in tensors):
            found += [StateDict(path, tensors, _rank(path))] if tensors else []
        else:
            unnamed.append(mapping)
    if unnamed and not found:
        keys = ", ".join(repr(key) for key in list(unnamed[0])[:4])
        raise WeightsError(f"{source}: names of tensors are strings, and it has {keys}; save model.state_dict()")
    if not found:
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise WeightsError(f"{source} holds no tensors where a state dict was looked for; its keys: {keys}")
    return sorted(found, key=lambda each: each.rank)


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """A mapping and those within it, each once, with the names that lead there."""
    waiting, seen = [("", content)], set()
    while waiting:
        path, mapping = waiting.pop(0)
        if id(mapping) in seen:  # one that holds itself
            continue
        seen.add(id(mapping))
        yield path, mapping
        for key, value in mapping.items():
            if isinstance(value, Mapping) and isinstance(key, str) and not _NO_WEIGHTS.search(key.lower()):
                waiting.append((f"{path}.{key}".lstrip("."), value))


def _rank(path: str) -> int:
    if AVERAGED.search(path):
        return 0
    if "student" in path:  # of which a teacher is the average
        return 2 + len(_CONTAINERS)
    known = [_CONTAINERS.index(part) for part in path.split(".") if part in _CONTAINERS]
    return 1 + min(known, default=len(_CONTAINERS)) if path else 1
