"""`backbones show KIND NAME [IMAGE]`: pictures of what a backbone does, on any backbone."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from backbones.errors import InputError, MissingDependency

# Kind of picture: its module here, and its line in `backbones show --help`.
KINDS = {
    "pyramid": ("pyramid", "every level of the pyramid, its channels as colours by their principal components"),
    "features": ("features", "single channels of one level"),
    "attention": ("attention", "what the heads of a block attend to, and the roll-out of all blocks"),
    "receptive-field": ("receptive_field", "how much each pixel sways the centre of each level"),
    "positions": ("positions", "similarity of position embeddings, or relative position biases"),
    "shift": ("shift", "how features change when the image moves by a few pixels, backbones side by side"),
}


def show(argv: Sequence[str]) -> int:
    """Draw what a backbone does: its maps, attention, receptive fields or positions.

    Says where the picture is; errors are those of `build_backbone`, and InputError.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "backbones show needs matplotlib; run `pip install 'dense-backbones[train]'`"
        ) from error
    args = build_parser(*argv[:1]).parse_args(list(argv))
    return _draw(argv[0], args)


def build_parser(asked: str = "") -> argparse.ArgumentParser:
    """The command's parser, with the options of the kind that is asked for: no other is imported, nor torch for it."""
    parser = argparse.ArgumentParser(prog="backbones show", description=__doc__)
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    for name, (_, summary) in KINDS.items():
        sub = kinds.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == asked:
            kind = _load(name)
            _add_common_arguments(sub, several=kind.SEVERAL)
            kind.add_arguments(sub)
    return parser


def _load(kind: str) -> ModuleType:
    return import_module(f".{KINDS[kind][0]}", __name__)


def _add_common_arguments(parser: argparse.ArgumentParser, several: bool) -> None:
    parser.add_argument("name", metavar="NAME", help="a name from `backbones list`")
    if several:
        parser.add_argument("--backbone", nargs="+", default=[], metavar="NAME", help="further ones, beside it")
    parser.add_argument(
        "--pretrained",
        nargs="*",
        metavar="TAG|PATH",
        help="weights, one for each backbone; alone, the first published ones; left out, random ones",
    )
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of build_backbone")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of what else is drawn")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default NAME-KIND.png")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the numbers behind the picture, too")


def _draw(name: str, args: argparse.Namespace) -> int:
    from ..files import whole
    from .subject import build_subjects, file_name

    kind = _load(name)
    out = args.out or Path(f"{file_name(args.name)}-{name}.png")
    for option, file in (("--out", out), ("--json", args.json)):  # before minutes of work
        if file and not file.absolute().parent.is_dir():
            raise InputError(f"{option}={file}: there is no folder {file.absolute().parent}")
        if file and file.is_dir():
            raise InputError(f"{option}={file}: that is a folder; give a file")
    photos = kind.photos(args)
    subjects = build_subjects(args)
    picture = kind.draw(subjects, photos, args)
    try:
        picture.figure.savefig(out, dpi=150)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise InputError(f"--out={out}: {str(error).splitlines()[0]}") from error
    print(out)
    if args.json:
        shown = getattr(args, "image", None) or []
        numbers = {
            "kind": name,
            "images": [shown] if isinstance(shown, str) else shown,
            "sizes": [list(photo.size) for photo in photos],
            **picture.common,
            "backbones": [
                {"name": subject.name, "weights": subject.weights, **own}
                for subject, own in zip(subjects, picture.numbers, strict=True)
            ],
        }
        with whole(args.json) as file:
            file.write_text(json.dumps(numbers, allow_nan=False) + "\n")
        print(args.json)
    sys.stdout.flush()
    return 0
