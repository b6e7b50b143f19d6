"""What a command of another package does, in a line, read from its source without importing it."""

import ast
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path


def summary(entry_point: EntryPoint) -> str:
    """First line of the docstring of the function, or of its module, as a phrase; empty where neither can be read.

    Args:
        entry_point: of `backbones.commands`. A name that its module imports from another is looked up there.
    """
    try:
        return _phrase(_first_line(entry_point.module, entry_point.attr))
    except Exception:  # whatever somebody's package is like, `backbones --help` is shown
        return ""


def _first_line(module: str, name: str) -> str:
    file = _locate(module).origin
    tree = ast.parse(Path(file).read_bytes() if file else b"")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return _docstring(node) or _docstring(tree)
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if name == (alias.asname or alias.name):
                return _first_line(_absolute(module, node), alias.name) or _docstring(tree)
    return _docstring(tree)


def _locate(module: str) -> ModuleSpec:
    """Where a module is, without importing the packages it is in, as `find_spec` does."""
    top, *parts = module.split(".")
    spec = find_spec(top)
    for part in parts:
        spec = spec and PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    if spec is None:
        raise ModuleNotFoundError(f"there is no module {module!r}", name=module)
    return spec


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that `from .x import y` in this one means."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    package = parts if _locate(module).submodule_search_locations is not None else parts[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def _docstring(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0].strip()


def _phrase(sentence: str) -> str:
    """As other lines of `--help` are written: no full stop, and a capital only where it is a name's."""
    sentence = sentence.removesuffix(".")
    return sentence if sentence[1:2].isupper() else sentence[:1].lower() + sentence[1:]
