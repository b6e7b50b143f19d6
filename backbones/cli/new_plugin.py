"""Write a working plugin package to start from: it installs, lists, passes the checks and trains as it is."""

import argparse
import keyword
import re
import sys
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

from backbones.discovery import FIRST_PARTY
from backbones.errors import InputError

TEMPLATE = "plugin-template"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of the package, such as mynet; small letters, digits and '_'")
    parser.add_argument("--out", type=Path, help="folder to write, by default NAME in this one")


def run(args: argparse.Namespace) -> int:
    name, folder = args.name.replace("-", "_"), args.out or Path(args.name)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise InputError(f"{args.name!r} cannot be a package's name; use small letters, digits and '_'")
    if found := find_spec(name):
        raise InputError(f"there is a module {name!r} already, at {found.origin}; choose another name")
    if folder.exists():
        raise InputError(f"{folder} exists; choose another name, or another folder with --out")
    template = find_template()
    for file in sorted(
        path for path in template.rglob("*") if path.is_file() and path.suffix in (".py", ".md", ".toml")
    ):
        target = folder / rename(str(file.relative_to(template)), name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename(file.read_text(encoding="utf-8"), name), encoding="utf-8")
        print(target)
    print(
        f"\nnext: pip install -e {folder} && backbones check --plugin {name} --quick\n"
        f"then: backbones fit segmentation --backbone {name}_s, and {folder / 'README.md'} for the rest"
    )
    return 0


def find_template() -> Path:
    """The template's folder: beside the sources, or where the wheel put it."""
    folder = Path(__file__).parents[2] / "examples" / TEMPLATE
    if folder.is_dir():
        return folder
    try:
        installed = [file for file in files(FIRST_PARTY) or () if file.parts[-2:] == (TEMPLATE, "pyproject.toml")]
    except PackageNotFoundError:
        installed = []
    if not installed:
        raise InputError(f"{FIRST_PARTY} is installed without its plugin template; reinstall it with pip")
    return Path(installed[0].locate()).resolve().parent


def rename(text: str, name: str) -> str:
    """The template's names replaced: mynet by the name, MyNet by the same in capitals."""
    return text.replace("mynet", name).replace("MyNet", "".join(part.capitalize() for part in name.split("_")))
