"""What commands and tasks share in reading options: extras, KEY=VALUE, and the nearest of what is known."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import yaml

from backbones.errors import InputError, MissingDependency

#: Tasks of `backbones fit | validate | test | predict | compare`, whose classes are in `training.tasks`.
TASKS = ("segmentation", "classification", "detection", "multitask")

#: What training needs beyond the bare install.
TRAINING = ("jsonargparse", "matplotlib", "pytorch_lightning", "torchmetrics")


def require(what: str, extra: str, *modules: str) -> None:
    """Raise MissingDependency, with the line that installs the extra, unless all these modules are there."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise MissingDependency(f"{what} needs {module}; run `pip install 'dense-backbones[{extra}]'`") from error


def key_values(given: Sequence[str]) -> dict[str, Any]:
    """What `--option KEY=VALUE ...` says, values as in YAML."""
    options = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--option {each}: write KEY=VALUE, such as pyramid=taps or out_indices=[1,2]")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {each}: {value!r} is no YAML: {error}") from error
    return options


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error says about an unknown name: the nearest one, and all that there are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}There are {', '.join(known)}"


def explain(message: str, parser: argparse.ArgumentParser) -> str:
    """The parser's message, with the nearest option where one is unknown."""
    unknown = re.search(r"unrecognized arguments: (?:--)?([\w.]+)", message)
    in_group = re.search(r"[Gg]roup '([\w.]+)' does not accept option '([\w.]+)'", message)
    key = re.search(r"(?:[Oo]ption|[Kk]ey) '([\w.]+)' is not (?:accepted|expected)", message)
    if not (unknown or in_group or key):
        return message
    name = f"{in_group[1]}.{in_group[2]}" if in_group else (unknown or key)[1]
    known = {action.dest for action in parser._actions} | {"backbone", "data", "out", "ckpt_path"}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists all options"
    return f"unknown option {name!r}; {hint}"
