"""Faults of a data set: gathered, counted and told in one report."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

from pytorch_lightning.utilities import rank_zero_warn

from .folders import DataError

SHOWN = 5  # of each kind

Policy = Literal["fatal", "clip", "drop"]


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
        self.repaired: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def add(self, kind: str, where: str, repaired: bool = False) -> None:
        """Note a fault: `kind` is counted, `where` names the file or the annotation; is there a repair for it?"""
        (self.repaired if repaired else self.found).setdefault(kind, []).append(where)

    def note(self, text: str) -> None:
        """Have something told that is no fault, but may not be meant."""
        self.notes.append(text)

    def name(self, file: Path) -> str:
        """What a file is called in the report."""
        return str(file.relative_to(self.root) if file.is_relative_to(self.root) else file)

    @property
    def repairs(self) -> int:
        """How many of them are repaired, unless they are fatal."""
        return sum(map(len, self.repaired.values()))

    def __len__(self) -> int:
        return self.repairs + sum(map(len, self.found.values()))

    def __str__(self) -> str:
        head = f"{self.source}: {count(len(self), 'fault')} in "
        head += count(self.images, "image")
        if self.objects is not None:
            head += f" with {count(self.objects, 'object')}"
        return "\n".join([head, *self._lines()])

    def _lines(self) -> Iterator[str]:
        for kind, places in (*self.found.items(), *self.repaired.items()):
            more = [f"and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
            yield f"  {kind} ({len(places)}): {'; '.join(places[:SHOWN] + more)}"


def report(faults: Iterable[Faults]) -> str:
    """The faults of several splits; empty if there are none."""
    return "\n".join(str(found) for found in faults if len(found))


def tell(faults: Iterable[Faults], policy: Policy, left: str) -> None:
    """Raise the report, or warn by it and say what is left; nothing where there are no faults.

    Args:
        faults: of the splits.
        policy: "fatal" raises any, "clip" those that cannot be repaired, "drop" none.
        left: what is there without those that cannot be repaired.
    """
    faults = list(faults)
    for note in (note for found in faults for note in found.notes):
        rank_zero_warn(note)
    told = report(faults)
    if not told:
        return
    repaired = sum(found.repairs for found in faults)
    dropped = sum(map(len, faults)) - repaired
    if policy == "fatal":
        raise DataError(f"{told}\nmend them, or leave them out: --data.faults drop")
    if policy == "clip" and dropped:
        hint = f"; {repaired} of them can be repaired" if repaired else ""
        raise DataError(f"{told}\nmend them, or leave them out: --data.faults drop{hint}")
    rank_zero_warn(f"{told}\n{repaired} repaired, {dropped} dropped; there are {left}")


def tell_shared(splits: Mapping[str, Sequence[Path]]) -> None:
    """Warn of images that are in two splits, by their content: what is measured on those, is known by heart."""
    sizes = {split: {} for split in splits}
    for split, files in splits.items():
        for file in files:
            if file.is_file():
                sizes[split].setdefault(file.stat().st_size, []).append(file)
    for one, other in combinations(splits, 2):
        pairs = []
        for size in sizes[one].keys() & sizes[other].keys():
            known = {_content(file): file for file in sizes[one][size]}
            pairs += [(known[key], file) for file in sizes[other][size] if (key := _content(file)) in known]
        if pairs:
            first = f"{pairs[0][0]} is {pairs[0][1]}" if pairs[0][0] != pairs[0][1] else str(pairs[0][0])
            rank_zero_warn(
                f"{count(len(pairs), 'image')} of {one} and {other} are the same, so that scores say too much: {first}"
            )


def _content(file: Path) -> bytes:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return digest.digest()


def count(number: int, noun: str) -> str:
    """'1 image', '1,024 images'."""
    return f"{number:,} {noun}{'s'[: number != 1]}"
