"""Faults of a data set: gathered, counted and told in one report."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pytorch_lightning.utilities import rank_zero_warn

from .folders import DataError

SHOWN = 5  # of each kind


class Faults:
    """What is wrong with which files and annotations of a split.

    Args:
        source: the file that lists the split.
        root: the data's folder, which files are named relative to.
        images, objects: how many are listed; None for data that have no objects.
    """

    def __init__(self, source: Path, root: Path, images: int = 0, objects: int | None = 0):
        self.source, self.root, self.images, self.objects = source, root, images, objects
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, where: str) -> None:
        """Note a fault: `kind` is counted, `where` names the file or the annotation."""
        self.found.setdefault(kind, []).append(where)

    def name(self, file: Path) -> str:
        """What a file is called in the report."""
        return str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def __str__(self) -> str:
        head = f"{self.source}: {count(len(self), 'fault')} in "
        head += count(self.images, "image")
        if self.objects is not None:
            head += f" with {count(self.objects, 'object')}"
        return "\n".join([head, *self._lines()])

    def _lines(self) -> Iterator[str]:
        for kind, places in self.found.items():
            more = [f"and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
            yield f"  {kind} ({len(places)}): {'; '.join(places[:SHOWN] + more)}"


def report(faults: Iterable[Faults]) -> str:
    """The faults of several splits; empty if there are none."""
    return "\n".join(str(found) for found in faults if len(found))


def tell(faults: Iterable[Faults], policy: Literal["fatal", "drop"], left: str) -> None:
    """Raise the report, or warn by it and say what is left; nothing where there are no faults."""
    told = report(faults)
    if told and policy == "fatal":
        raise DataError(f"{told}\nmend them, or leave them out: --data.faults drop")
    if told:
        rank_zero_warn(f"{told}\nwithout them there are {left}")


def count(number: int, noun: str) -> str:
    """'1 image', '1,024 images'."""
    return f"{number:,} {noun}{'s'[: number != 1]}"
