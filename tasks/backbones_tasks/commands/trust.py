"""What is read of a run folder that may be somebody else's: plain options, and nothing that can run code.

Lightning's command line builds any class that a config names (`class_path`), and reads any file that a section is set
to. What the user gives with `--config` is the user's own; what a run folder says is not, unless `--trust` says so.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from backbones.errors import InputError

from ..training.task import Task

SECTIONS = ("model", "data", "trainer")
# Options of the trainer that take objects, or say where to write; of a stranger's they can only be unset, or switches.
_OBJECTS = {"callbacks", "default_root_dir", "logger", "model_registry", "plugins", "profiler"}
_WORD = re.compile(r"[\w,:+\-\[\] ]*")  # names of strategies, precisions, devices and times; no dotted path, no file


def config_arguments(file: Path, task: type[Task], trust: bool) -> list[str]:
    """Arguments that read the config of a run folder, if there is one.

    Raises:
        InputError: it is no config, or asks for code, which only `--trust` allows
    """
    if not file.is_file():
        return []
    if not trust:
        told = next(_code(read_config(file), task), None)
        if told is not None:
            raise InputError(
                f"{file}: {told}, which can run code; if you trust whoever wrote this folder, add --trust, else give "
                "the options by a --config of your own"
            )
    return ["--config", str(file)]


def read_config(file: Path) -> dict[str, Any]:
    """The content of a config, as plain values."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as a config: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is no config of options")
    return content


def _code(config: Mapping[str, Any], task: type[Task]) -> Iterator[str]:
    """What of a config can run code, or reads other files that could, in words."""
    for name, value in config.items():
        if name not in (*SECTIONS, "seed_everything"):
            yield f"{name!r} is no section of a run"
        elif name in SECTIONS and not isinstance(value, Mapping):
            yield f"{name}={value!r} is read from another file"
        elif name == "seed_everything" and not isinstance(value, int):
            yield f"{name}={value!r} is no number"
    for name, value in config.get("trainer", {}).items():
        if name in _OBJECTS:
            if value is not None and not isinstance(value, bool):
                yield f"trainer.{name} asks for {_named(value)}"
        elif not _is_plain(value):
            yield f"trainer.{name} asks for {_named(value)}"
    for section, owner in (("model", task), ("data", task.data_class)):
        for name in _groups(owner):
            value = config.get(section, {}).get(name)
            if value is not None and not isinstance(value, Mapping):
                yield f"{section}.{name}={value!r} is read from another file"
        yield from _classes(config.get(section, {}), section)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, int) for item in value)  # devices
    if isinstance(value, Mapping):
        return all(isinstance(item, int) for item in value.values())  # hours and minutes
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and _fits(value))


def _fits(value: str) -> bool:
    return _WORD.fullmatch(value) is not None


def _groups(owner: type) -> list[str]:
    """Options that are dataclasses, for which jsonargparse takes the name of a file as well."""
    found = []
    for name, annotation in typing.get_type_hints(owner.__init__).items():
        if any(dataclasses.is_dataclass(each) for each in (annotation, *typing.get_args(annotation))):
            found.append(name)
    return found


def _classes(value: Any, where: str) -> Iterator[str]:
    """Classes that are named at any depth."""
    if isinstance(value, Mapping):
        if {"class_path", "init_args", "dict_kwargs"} & value.keys():
            yield f"{where} asks for {_named(value)}"
        for name, inner in value.items():
            yield from _classes(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _classes(inner, f"{where}[{number}]")


def _named(value: Any) -> str:
    """What a value names, for people."""
    if isinstance(value, list) and value:
        return _named(value[0])
    if isinstance(value, Mapping) and "class_path" in value:
        return f"the class {value['class_path']}"
    return repr(value)
