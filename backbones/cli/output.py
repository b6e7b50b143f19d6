"""How commands print: a table for people, JSON for programs."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(data: Any) -> None:
    """A list has an entry per line: good to grep and to compare, and many times as quick as indenting it."""
    if isinstance(data, list):
        encode = json.JSONEncoder(default=str).encode
        print("[", ",\n".join(map(encode, data)), "]", sep="\n")
    else:
        print(json.dumps(data, indent=2, default=str))


def print_hint(text: str) -> None:
    """To standard error, after what has been printed so far."""
    sys.stdout.flush()
    print(text, file=sys.stderr)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "") -> None:
    """Columns as wide as their widest cell; columns whose cells are all numbers are flush right."""
    table = [header, *rows]
    right = [all(_is_number(cell) for cell in column[1:]) for column in zip(*table, strict=True)]
    texts = [[str(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        print((indent + "  ".join(cells)).rstrip())


def _is_number(cell: object) -> bool:
    """Whether a cell is empty or a number, as such or written out with the digits that matter."""
    return isinstance(cell, (int, float)) or re.fullmatch(r"|-?\d+\.\d+|-?\d+", str(cell)) is not None


def print_markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as GitHub and PyPI show it."""
    for row in (header, ["---"] * len(header), *rows):
        cells = (" ".join(str(cell).split()).replace("|", r"\|") for cell in row)
        print(f"| {' | '.join(cells)} |")
