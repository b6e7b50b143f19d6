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
#: Kinds of architectures, beside pyramids of convolutions: what they have instead of some files of the template.
KINDS = {
    "columnar": "a plain transformer: one width and stride throughout, and a pyramid made of its last map",
    "wrap": "a network that knows nothing of dense-backbones, through backbones.wrap",
}
SUFFIXES = (".py", ".md", ".toml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of the package, such as mynet; small letters, digits and '_'")
    parser.add_argument("--out", type=Path, help="folder to write, by default NAME in this one")
    kinds = parser.add_mutually_exclusive_group()
    for kind, meaning in KINDS.items():
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=f"start from {meaning}")


def run(args: argparse.Namespace) -> int:
    name, folder = args.name.replace("-", "_"), args.out or Path(args.name)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise InputError(f"{args.name!r} cannot be a package's name; use small letters, digits and '_'")
    if found := find_spec(name):
        raise InputError(f"there is a module {name!r} already, at {found.origin}; choose another name")
    if folder.exists():
        raise InputError(f"{folder} exists; choose another name, or another folder with --out")
    for path, text in template(args.kind).items():
        target = folder / rename(path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rename(text, name), encoding="utf-8")
        print(target)
    print(
        f"\nnext: pip install -e {folder} && backbones check --plugin {name} --quick\n"
        f"then: backbones fit segmentation --backbone {name}_s, and {folder / 'README.md'} for the rest"
    )
    return 0


def template(kind: str | None = None) -> dict[str, str]:
    """Files of the template by their paths within it, those of a kind of architecture in place of its own."""
    folder = find_template()
    folders = [folder, *([folder.with_name(f"{TEMPLATE}-{kind}")] if kind else [])]
    return {
        str(path.relative_to(each)): path.read_text(encoding="utf-8")
        for each in folders
        for path in sorted(each.rglob("*"))
        if path.is_file() and path.suffix in SUFFIXES
    }


def find_template() -> Path:
    """The template's folder, beside which are those of kinds: beside the sources, or where the wheel put it."""
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
