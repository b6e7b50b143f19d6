"""Folders of images and masks: find the pairs, learn the classes, and check all of it before training starts."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.utilities import rank_zero_warn

from backbones.errors import InputError

from .images import (
    ARRAYS,
    EXIF_TURNS,
    IMAGE_SUFFIXES,
    LOSSY,
    UNREADABLE,
    Found,
    each_in_threads,
    find_files,
    orientation,
    read_mask,
    stored_size,
    turned,
)
from .reading import Reading

IMAGE_FOLDERS = ("images", "JPEGImages", "leftImg8bit")  # ours and ADE20K's, Pascal VOC's, Cityscapes'
MASK_FOLDERS = ("labels", "masks")
MASK_SUFFIXES = {".png", ".tif", ".tiff", ".bmp", *ARRAYS}


class DataError(InputError):
    """Images or masks on disk that cannot be trained on; the message names the files."""


@dataclass(frozen=True)
class Pair:
    """An image file, its mask file, and the image's upright (height, width) once it has been checked."""

    image: Path
    mask: Path
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Classes:
    """The classes to learn: `names[i]` is class `i` to the model and any of the values `ids[i]` in mask files.

    ignored: values in mask files that neither train nor count. coloured: values are colours, see `colour_value`.
    A single class is told from the rest: `rest` are values of pixels that are not of it, index 0, and the class is 1.
    """

    names: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    ignored: frozenset[int]
    coloured: bool = False
    rest: frozenset[int] = frozenset()

    @classmethod
    def make(
        cls,
        names: Iterable[str],
        ignore_index: int | Iterable[int] | None = None,
        ids: Iterable[Any] | None = None,
        ignored: Iterable[Any] = (),
        coloured: bool = False,
    ) -> "Classes":
        """Name the mask values `ids`, one or several for each name, which are 0, 1, 2, ... unless given.

        `ignore_index` and what is `ignored` besides may be among them, and then are no classes. The values of a single
        class are 1 unless given, and 0 is the rest.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise DataError(f"the classes must be a list of names, but are {names!r}")
        names = list(names)
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise DataError(f"the classes must be a list of at least one name, but are {names}")
        _check_twice(names)
        more = [] if ignore_index is None else ignore_index if isinstance(ignore_index, list) else [ignore_index]
        ignored = frozenset(_value(value, coloured) for value in [*ignored, *more])
        if ids is None:
            ids = range(len(names)) if len(names) > 1 else [1]
        ids = [_values(value, coloured) for value in ids]
        if len(ids) != len(names):
            raise DataError(f"{len(names)} classes, but the values of {len(ids)}: give each class its own")
        every = [value for values in ids for value in values]
        twice = sorted({value for value in every if every.count(value) > 1})
        if twice:
            raise DataError(f"the value {_named(twice[0], coloured)} stands for two classes")
        found = [(name, kept) for name, values in zip(names, ids, strict=True) if (kept := values - ignored)]
        if not found:
            raise DataError(f"all of the classes {', '.join(names)} are ignored")
        rest = frozenset({0} - ignored - found[0][1]) if len(found) == 1 else frozenset()
        if len(found) == 1 and not rest:
            raise DataError(
                f"{found[0][0]} is the only class, and no mask value is left for what is not of it: let 0 be the rest, "
                'and tell the class by "values", or name both'
            )
        return cls(tuple(name for name, _ in found), tuple(tuple(sorted(v)) for _, v in found), ignored, coloured, rest)

    @property
    def ignore_index(self) -> int:
        """The value that stands for 'ignored' once masks are read."""
        return max(255, len(self.names))

    def read(self, file: Path) -> np.ndarray:
        """The values (H, W) of a mask file, as `ids` has them."""
        return read_mask(file, self.coloured)

    def indices(self, values: np.ndarray) -> np.ndarray:
        """Turn mask-file values into class indices; ignored ones become `ignore_index`, and unknown ones -1."""
        first = 1 if self.rest else 0
        pairs = [(value, index) for index, ids in enumerate(self.ids, start=first) for value in ids]
        pairs += [(value, self.ignore_index) for value in self.ignored] + [(value, 0) for value in self.rest]
        known, indices = map(np.array, zip(*sorted(pairs), strict=True))
        if known[-1] - known[0] < 2**16:  # looked up in a table, which takes a tenth of the time
            table = np.full(known[-1] - known[0] + 2, -1)
            table[known - known[0]] = indices
            places = values - known[0]
            return table[np.where((places < 0) | (places >= len(table)), len(table) - 1, places)]
        places = np.searchsorted(known, values).clip(max=len(known) - 1)
        return np.where(known[places] == values, indices[places], -1)

    def told(self, values: Iterable[int]) -> str:
        """Mask values in words."""
        if self.coloured:
            return ", ".join(_named(value, True) for value in values)
        return _ranges(sorted(values))


def colour_value(colour: Iterable[int]) -> int:
    """A colour (red, green, blue) as one number."""
    red, green, blue = colour
    return (red << 16) + (green << 8) + blue


def _named(value: int, coloured: bool) -> str:
    return f"[{value >> 16}, {value >> 8 & 255}, {value & 255}]" if coloured else str(value)


def _value(value: Any, coloured: bool) -> int:
    """A mask value as a config has it: a whole number, or a colour."""
    if coloured:
        if isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int and 0 <= v < 256 for v in value):
            return colour_value(value)
        raise DataError(f"{value!r} is no colour; give [red, green, blue], each from 0 to 255")
    if type(value) is not int:
        raise DataError(f"{value!r} is no mask value; give a whole number")
    return value


def _values(value: Any, coloured: bool) -> frozenset[int]:
    """The values of one class, one or several."""
    several = isinstance(value, list) and (not coloured or any(isinstance(inner, list) for inner in value))
    values = frozenset(_value(inner, coloured) for inner in (value if several else [value]))
    if not values:
        raise DataError("a class has no value")
    return values


def _check_twice(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two classes are called {', '.join(map(repr, twice))}")


EXAMPLE = '{"classes": ["background", "cat"], "values": [0, 255]}'
KEYS = ("classes", "values", "colours", "ignore_index")


def read_classes(
    root: Path, names: list[str] | None, ignore_index: int | list[int] | None, published: Classes | None = None
) -> Classes:
    """The classes of a folder: as given, or from its `classes.json`, or else as published for its layout."""
    if names is not None:
        return Classes.make(names, ignore_index)
    file = root / "classes.json"
    if not file.is_file():
        if published is not None:
            return published
        raise DataError(
            f"{root}: class names are not known. Write {file.name} there, such as {EXAMPLE}, or give --data.classes. "
            f"The first masks hold {_values_seen(root)}."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict) or "classes" not in content:
            raise ValueError('it has no "classes"')
        content = {{"colors": "colours"}.get(key, key): value for key, value in content.items()}
        unknown = sorted(content.keys() - set(KEYS))
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is unknown; there are {', '.join(KEYS)}")
        coloured = "colours" in content
        if coloured and "values" in content:
            raise ValueError('give "values" or "colours", not both')
        ids = content.get("colours" if coloured else "values")
        if ids is not None and not isinstance(ids, list):
            raise ValueError("values and colours are lists, with an entry for each class")
        ignored = content.get("ignore_index") if ignore_index is None else ignore_index
        if coloured and isinstance(ignored, list) and ignored and not isinstance(ignored[0], list):
            ignored = [ignored]  # one colour
        return Classes.make(content["classes"], ignored, ids, coloured=coloured)
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file}: expected something like {EXAMPLE}, but: {error}") from None


def check_pairs(pairs: list[Pair], problems: list[str], classes: Classes, root: Path, reading: Reading) -> list[Pair]:
    """Read every file once, and raise one `DataError` that names what is wrong with which; fills in the sizes."""
    checked = each_in_threads(lambda pair: _check(pair, classes, root, reading), pairs, "checking files")
    problems = problems + [problem for check in checked for problem in check.problems]
    problems += _uncovered(checked, classes, root)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            f"{root}: {len(problems)} problem{'s'[: len(problems) > 1]} in {len(pairs)} pairs:{shown}{more}"
        )
    if not pairs:
        raise DataError(f"{root}: no image with a mask was found")
    if not any((check.indices[: classes.ignore_index]).any() for check in checked):
        raise DataError(f"{root}: all pixels of all masks are ignored, so that there is nothing to learn")
    _tell_turned(checked, root)
    return [check.pair for check in checked]


@dataclass(frozen=True)
class _Check:
    """What was found of a pair; of its mask: how often values that no rule covers, all its values where
    there are such, and how many pixels are of each index."""

    pair: Pair
    problems: list[str]
    unknown: dict[int, int]
    seen: frozenset[int]
    indices: np.ndarray
    turned: bool = False


def _uncovered(checked: list[_Check], classes: Classes, root: Path) -> list[str]:
    """The problem of pixels whose value no rule covers, if there are any."""
    found = [check for check in checked if check.unknown]
    if not found:
        return []
    values = sorted({value for check in found for value in check.unknown})
    missed = sum(sum(check.unknown.values()) for check in found)
    share = missed / (missed + sum(int(check.indices.sum()) for check in checked))
    ignored = f", ignored are {classes.told(classes.ignored)}" if classes.ignored else ", none is ignored"
    more = ", ..." if len(values) > 10 else ""
    problem = (
        f"{found[0].pair.mask.relative_to(root)}: unknown class value {classes.told(values[:10])}{more}; known are "
        f"{classes.told([*classes.rest, *(value for ids in classes.ids for value in ids)])}{ignored}. No rule covers "
        f"{share:.2%} of all pixels, in {len(found)} of {len(checked)} masks"
    )
    seen = set(values) | {v for check in checked for v in check.seen}
    if not classes.coloured and len(seen) == len(classes.names) <= 20:
        return [f'{problem}; if these are the classes, write "values": {sorted(seen)} into classes.json']
    if values == [255]:
        rule = 'write "ignore_index": 255 into classes.json, or give --data.ignore_index 255'
        return [f'{problem}; if 255 means "no label", {rule}']
    return [problem]


def _tell_turned(checked: list[_Check], root: Path) -> None:
    turned = [check.pair.image.relative_to(root) for check in checked if check.turned]
    if turned:
        rank_zero_warn(
            f"{root}: {len(turned)} images are turned upright by their EXIF orientation, the first {turned[0]}; their "
            "masks, which are stored as large as these, are turned with them. If those are upright already, save the "
            "images without EXIF"
        )


def pair_up(
    images: Path, masks: Path, root: Path, image_ending: str = "", mask_ending: str = ""
) -> tuple[list[Pair], list[str]]:
    """Pair the images in a folder, in any depth, with masks of the same name, and name those without a partner.

    Args:
        images, masks: the folders.
        root: what files are named relative to in the problems.
        image_ending, mask_ending: what only the names of images, or of masks, end with, before the suffix.
    """
    problems: list[str] = []
    image_files = by_name(images, root, problems, ending=image_ending)
    mask_files = by_name(masks, root, problems, masks=True, ending=mask_ending)
    problems += [
        f"{file.relative_to(root)}: has no mask {masks.relative_to(root) / name}{mask_ending}.png"
        for name, file in image_files.items()
        if name not in mask_files
    ]
    problems += [
        f"{file.relative_to(root)}: has no image in {images.relative_to(root)}"
        for name, file in mask_files.items()
        if name not in image_files
    ]
    names = sorted(image_files.keys() & mask_files.keys())
    return [Pair(image_files[name], mask_files[name]) for name in names], problems


def by_name(folder: Path, root: Path, problems: list[str], *, masks: bool = False, ending: str = "") -> dict[str, Path]:
    """The images or masks in a folder, in any depth, by their paths in it without ending and suffix."""
    seen = find_files(folder, MASK_SUFFIXES | LOSSY if masks else IMAGE_SUFFIXES)
    tell_others(folder, seen, hidden_alone=bool(ending))
    found: dict[str, Path] = {}
    for file in seen.files:
        if not file.stem.endswith(ending):
            continue
        name = file.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        if name in found:
            problems.append(f"{file.relative_to(root)}: {found[name].name} beside it has the same name")
        found[name] = file
    return found


def read_list(file: Path) -> list[str]:
    """The lines of a text file that are not empty, stripped."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is no text in UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def is_inside(file: Path, *folders: Path) -> bool:
    """Whether a path leads into one of the folders by its words; what is there may be links."""
    path = Path(os.path.abspath(file))
    return any(path.is_relative_to(os.path.abspath(folder)) for folder in folders)


def tell_others(folder: Path, found: Found, hidden_alone: bool = False) -> None:
    """Warn of what is not read in a folder: hidden files, what tools leave behind, and other kinds of file."""
    others = [name for name in found.others if not hidden_alone or Path(name).name.startswith(".")]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        rank_zero_warn(f"{folder}: not read are {', '.join(sorted(others)[:5])}{more}")


def turn_of(pair: Pair) -> Image.Transpose | None:
    """What turns a mask upright with its image, whose EXIF orientation does not say it of the mask.

    None where the image is upright, or where the mask has another size than the image as it is stored: it was then
    drawn on the upright image.
    """
    turn = EXIF_TURNS.get(orientation(pair.image))
    if turn is None or orientation(pair.mask) != 1:
        return None
    return turn if stored_size(pair.image) == stored_size(pair.mask) else None


def read_pair_mask(pair: Pair, classes: Classes) -> np.ndarray:
    """The values (H, W) of a pair's mask, upright as its image is."""
    values = classes.read(pair.mask)
    own = EXIF_TURNS.get(orientation(pair.mask))
    turn = turn_of(pair) if own is None else own
    return values if turn is None else turned(values, turn)


def _check(pair: Pair, classes: Classes, root: Path, reading: Reading) -> _Check:
    problems = []
    size = shape = None
    unknown: dict[int, int] = {}
    seen: frozenset[int] = frozenset()
    counts = np.zeros(classes.ignore_index + 1, dtype=np.int64)
    try:
        size = reading.read(pair.image).shape[:2]
    except UNREADABLE as error:
        problems.append(f"{pair.image.relative_to(root)}: cannot be read: {error}")
    try:
        values = read_pair_mask(pair, classes)
        shape = values.shape
        indices = classes.indices(values)
        if (indices < 0).any():
            numbers, amounts = np.unique(values[indices < 0], return_counts=True)
            unknown = dict(zip(numbers.tolist(), amounts.tolist(), strict=True))
            seen = frozenset(np.unique(values).tolist())
        counts += np.bincount(indices[indices >= 0], minlength=len(counts))
    except UNREADABLE as error:
        problems.append(f"{pair.mask.relative_to(root)}: cannot be read: {error}")
    if size and shape and size != shape:
        problems.append(
            f"{pair.mask.relative_to(root)}: is {shape[1]} x {shape[0]}, its image is {size[1]} x {size[0]}"
        )
    turned_with = size is not None and shape is not None and turn_of(pair) is not None
    return _Check(Pair(pair.image, pair.mask, size), problems, unknown, seen, counts, turned_with)


def _ranges(values: Iterable[int]) -> str:
    """'0-10, 12' for 0 to 10 and 12."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


def _values_seen(root: Path) -> str:
    """What the first masks hold, to help to write a message; the check names those that cannot be read."""
    files = [file for name in MASK_FOLDERS for file in find_files(root / name, MASK_SUFFIXES).files[:20]]
    seen: set[int] = set()
    for file in files:
        try:
            seen.update(np.unique(read_mask(file)).tolist())
        except UNREADABLE:
            try:
                colours = np.unique(read_mask(file, coloured=True))[:10].tolist()
                return f"colours, such as {', '.join(_named(colour, True) for colour in colours)}"
            except UNREADABLE:
                continue
    return f"the values {_ranges(sorted(seen)) or 'none'}"
