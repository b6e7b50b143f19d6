"""`backbones COMMAND`: each command is a module here, or an entry point of the group `backbones.commands`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from backbones.cli.summary import summary
from backbones.discovery import FIRST_PARTY, describe, normalized, owner
from backbones.errors import BackboneError, PluginError

# Command: its module here, and its line in `backbones --help`, which imports none of them.
# (No module is called `list`: once imported, it would hide the built-in in this one.)
COMMANDS = {
    "list": ("listing", "the backbones that are installed"),
    "info": ("info", "everything about one backbone"),
    "plugins": ("plugins", "where backbones come from, and which plugins do not work"),
    "check": ("check", "the conformance kit: whether a backbone or a plugin keeps its promises"),
    "new-plugin": ("new_plugin", "a working plugin package to start from"),
    "bench": ("bench", "parameters, GMACs, latency, throughput and peak memory, beside timm's if asked"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for an error that the user can mend, printed in one line."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BackboneError as error:
        print(f"backbones: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; keep Python from complaining as it flushes on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    return code


def _dispatch(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    if command in COMMANDS:
        module = import_module(f".{COMMANDS[command][0]}", __name__)
        parser = argparse.ArgumentParser(prog=f"backbones {command}", description=module.__doc__)
        module.add_arguments(parser)
        return module.run(parser.parse_args(argv[1:]))
    others = _other_commands()
    if command in others:
        return _load(others[command])(argv[1:]) or 0
    parser = argparse.ArgumentParser(prog="backbones", description="Vision backbones for dense tasks, as plugins.")
    parser.add_argument("--version", action="store_true", help="print the installed version")
    choices = parser.add_subparsers(metavar="COMMAND", title="commands (backbones COMMAND --help tells more)")
    for name, (_, does) in COMMANDS.items():
        choices.add_parser(name, help=does)
    for name, entry_point in others.items():
        choices.add_parser(name, help=_line(entry_point).replace("%", "%%"))
    if parser.parse_args([command]).version:
        from backbones import __version__

        print(f"dense-backbones {__version__}")
    return 0


def _other_commands() -> dict[str, EntryPoint]:
    """Commands of installed packages; nobody takes over one of dense-backbones."""
    found = entry_points(group="backbones.commands")
    ours_last = sorted(found, key=lambda e: (owner(e)[0] == FIRST_PARTY, owner(e)[0]))
    return {e.name: e for e in ours_last}  # the last one of a name is kept


def _line(entry_point: EntryPoint) -> str:
    """What a command does, and whose it is unless it is ours."""
    does, distribution = summary(entry_point), owner(entry_point)[0]
    if not does:
        return f"from {distribution}"
    return does if normalized(distribution) == FIRST_PARTY else f"{does} (from {distribution})"


def _load(entry_point: EntryPoint) -> Callable[[list[str]], int | None]:
    try:
        return entry_point.load()
    except Exception as error:
        raise PluginError(
            f"command {entry_point.name!r} of {owner(entry_point)[0]} cannot be loaded: {describe(error)}; "
            "is it installed with all the extras it needs?"
        ) from error
