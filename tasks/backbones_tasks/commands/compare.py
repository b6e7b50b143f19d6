"""`backbones compare TASK`: one recipe on several backbones, one after another, into one table and one picture."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from backbones import backbone_info
from backbones.errors import InputError

from ..training.callbacks import quiet
from ..training.runs import is_run, next_folder
from ..training.task import Task
from ..training.tasks import find_task
from .command_line import CommandLine, own_options, write_config
from .comparison import Comparison, arguments, is_comparison
from .trust import config_arguments

_DESCRIPTION = (
    "Train the same recipe on several backbones, one after another, each in a process of its own, and put score, "
    "parameters, multiply-adds, latency and memory into comparison.csv, .md and .png. Every other option is one of "
    "`backbones fit {task}`; options of the config's backbone, such as `pretrained`, are those of all."
)


_EPILOG = (
    "The same command, or --out DIR alone, goes on with a comparison that was interrupted, exactly where it was: what "
    "is finished stays, what failed is tried again, and --backbones may name more. Another recipe needs another folder."
)


def run_comparison(name: str, argv: Sequence[str]) -> int:
    """Run the command for a task; returns 0, 1 if a backbone failed, or 130 if it was stopped by Ctrl-C.

    Raises:
        InputError: options or names that cannot be used, or a recipe that is not that of the folder; all are refused
            before anything is trained
    """
    quiet()
    task = find_task(name)
    parser = argparse.ArgumentParser(
        prog=f"backbones compare {name}",
        description=_DESCRIPTION.format(task=name),
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=[],
        metavar="NAME",
        help="or '{name: NAME, option: value, model.pool: max}': options of the backbone, and the model's for it",
    )
    parser.add_argument("--out", type=Path, help="its folder; by default the next of runs/compare-TASK-001, -002, ...")
    parser.add_argument("--report", action="store_true", help="make table and picture of what is there, and no more")
    own, rest = parser.parse_known_args(list(argv))
    if own.report:
        if own.out is None or own.backbones or rest:
            raise InputError("--report goes with --out DIR alone")
        Comparison.read(own.out, task).report()
        return 0
    comparison = _open(task, own, rest)
    if not comparison.entries:
        raise InputError("name the backbones to compare: --backbones NAME NAME ...")
    try:
        comparison.train()
        comparison.measure()
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: backbones compare {name} --out {comparison.folder}")
        return 130
    comparison.report()
    return int(any(entry.error for entry in comparison.entries))


def _open(task: type[Task], own: argparse.Namespace, argv: Sequence[str]) -> Comparison:
    """The comparison to start or to go on with; it is saved once all that can be checked has been."""
    fit, argv = own_options(argv)
    if fit.ckpt_path is not None or fit.print_groups:
        raise InputError("compare goes on by itself, given the same --out; --ckpt_path and --print_groups are for fit")
    if any(re.match(r"--model\.backbone(=|$)", argument) for argument in argv):
        raise InputError("compare takes --backbones NAME NAME ..., not --backbone")
    given = [_parse(text) for text in own.backbones]
    for backbone, _ in given:
        backbone_info(backbone["name"])  # an unknown name is refused now, with the nearest one

    if own.out is not None and is_comparison(own.out):
        comparison = Comparison.read(own.out, task)
        before = config_arguments(own.out / "recipe.yaml", task, fit.trust)
        recipe = Recipe("fit", task, before)
        told = before
        changed = Recipe("fit", task, argv if fit.has_config else [*before, *argv])
        if differences := _differences(recipe.values(), changed.values()):
            raise InputError(
                f"{own.out} compares under another recipe: {'; '.join(differences)}; take its own (--out alone), or "
                "another --out"
            )
        _check_own(task, told, given)
    else:
        if own.out is not None and is_run(own.out):
            raise InputError(f"{own.out} holds a run, not a comparison; choose another --out")
        told = list(argv)
        recipe = Recipe("fit", task, told)
        if not given:
            raise InputError("name the backbones to compare: --backbones NAME NAME ...")
        _check_own(task, told, given)
        folder = own.out or next_folder(f"compare-{task.name}")
        write_config(recipe, folder / "recipe.yaml")
        comparison = Comparison(folder, task)
    for backbone, options in given:
        comparison.add(recipe.backbone_options | backbone, options)
    comparison.save()
    states = [entry.state for entry in comparison.entries]
    print(f"{comparison.folder}: {states.count('finished')} of {len(states)} backbones finished", flush=True)
    return comparison


def _check_own(task: type[Task], recipe: list[str], given: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
    """Raise InputError for options of single backbones that the recipe cannot have."""
    for _, options in given:
        if options:
            Recipe("fit", task, [*recipe, *arguments(options)])


def _parse(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A backbone, from its name or '{name: NAME, option: value, model.option: value}', and its own model's options."""
    value = yaml.safe_load(text) if text.lstrip().startswith("{") else {"name": text}
    if not isinstance(value.get("name"), str):
        raise InputError(f'--backbones {text}: the options lack "name"')
    options = {key: each for key, each in value.items() if "." in str(key)}
    if wrong := [key for key in options if not key.startswith("model.") or key.startswith("model.backbone")]:
        raise InputError(f"--backbones {text}: {', '.join(wrong)}: a backbone may have options of the model of its own")
    return {key: each for key, each in value.items() if key not in options}, options


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [key for key in (*old, *(key for key in new if key not in old)) if old.get(key) != new.get(key)]
    return [f"{key} was {old.get(key)!r} and would be {new.get(key)!r}" for key in keys]


class Recipe(CommandLine):
    """The options of a training, resolved and checked, with nothing built."""

    def instantiate_classes(self) -> None:
        """Nothing: the processes that train do it."""

    @property
    def backbone_options(self) -> dict[str, Any]:
        """Options that the recipe gives every backbone."""
        backbone = self._plain["model"]["backbone"]
        return {} if isinstance(backbone, str) else {k: v for k, v in backbone.items() if k != "name"}

    def values(self) -> dict[str, Any]:
        """Every option but the backbone's name, by its dotted key."""
        plain = self._plain
        plain["model"]["backbone"] = self.backbone_options
        return dict(_flat(plain))

    @property
    def _plain(self) -> dict[str, Any]:
        return yaml.safe_load(self.parser.dump(self.config, skip_none=False))
