"""Whether what a checkpoint holds is what the options ask for."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from backbones.errors import InputError

from .task import Task

SHOWN = 60  # characters of a value


def check_same(task: Task, content: Mapping[str, Any], source: Path) -> None:
    """Raise InputError, in a sentence, if the weights in a checkpoint are of other classes or of another model.

    Args:
        task: as the options have it.
        content: of the checkpoint.
        source: the checkpoint's file.
    """
    trained, asked = content["hyper_parameters"], task.hparams
    before, now = trained.get("class_names"), asked["class_names"]
    if before != now:
        names = ", ".join(map(str, before)) if isinstance(before, list) else repr(before)
        raise InputError(f"{source} was trained on the classes {names}, but the data have {', '.join(now)}")
    own, theirs = task.own_state(), content["state_dict"]
    wrong = [name for name in own if not _alike(own[name], theirs.get(name))]
    wrong += [name for name in theirs if name not in own]
    if not wrong:
        return
    general = inspect.signature(Task.__init__).parameters
    options = [name for name in asked if name not in general and _told(trained.get(name)) != _told(asked[name])]
    differ = [f"{name} was {_told(trained.get(name))} and would be {_told(asked[name])}" for name in options]
    why = (
        "; ".join(differ) or f"it was written by another version, or damaged: {len(wrong)} tensors, such as {wrong[0]}"
    )
    raise InputError(f"{source} holds another model than the options ask for: {why}")


def _alike(own: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and own.shape == other.shape


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        value = {key: inner for key, inner in value.items() if key != "pretrained_cfg"}
        value = value["name"] if value.keys() == {"name"} else value
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
