"""Folders of images and masks: find the pairs, learn the classes, and check all of it before training starts."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbones.errors import InputError

from .images import IMAGE_SUFFIXES, UNREADABLE, each_in_threads, read_image, read_mask

IMAGE_FOLDERS = ("images", "JPEGImages", "leftImg8bit")  # ours and ADE20K's, Pascal VOC's, Cityscapes'
MASK_FOLDERS = ("labels", "masks")
MASK_SUFFIXES = {".png", ".tif", ".tiff", ".bmp"}
ALWAYS_IGNORED = 255  # the field's customary value for "no label"


class DataError(InputError):
    """Images or masks on disk that cannot be trained on; the message names the files."""


@dataclass(frozen=True)
class Pair:
    """An image file, its mask file, and the image's (height, width) once it has been checked."""

    image: Path
    mask: Path
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Classes:
    """The classes to learn: `names[i]` is class `i` to the model and the value `ids[i]` in mask files.

    ignored: values in mask files that neither train nor count.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    ignored: frozenset[int]

    @classmethod
    def make(
        cls,
        names: Iterable[str],
        ignore_index: int | None = None,
        ids: Iterable[int] | None = None,
        ignored: Iterable[int] = (),
    ) -> "Classes":
        """Name the mask values `ids`, which are 0, 1, 2, ... unless given.

        `ignore_index`, 255 and what is `ignored` besides may be among them, and then are no classes.
        """
        names = list(names)
        ignored = frozenset({ALWAYS_IGNORED, *ignored} | ({ignore_index} - {None}))
        ids = range(len(names)) if ids is None else ids
        found = [(name, i) for name, i in zip(names, ids, strict=True) if i not in ignored]
        if not found or not all(isinstance(name, str) for name in names):
            raise DataError(f"the classes must be a list of at least one name, but are {names}")
        return cls(*map(tuple, zip(*found, strict=True)), ignored)

    @property
    def ignore_index(self) -> int:
        """The value that stands for 'ignored' once masks are read."""
        return max(ALWAYS_IGNORED, len(self.names))

    def indices(self, values: np.ndarray) -> np.ndarray:
        """Turn mask-file values into class indices; ignored and unknown values become `ignore_index`."""
        table = np.full(max(self.ids) + 2, self.ignore_index)  # the last entry is for all values beyond
        table[list(self.ids)] = np.arange(len(self.ids))
        return table[np.where((values < 0) | (values > max(self.ids)), len(table) - 1, values)]


def read_classes(
    root: Path, names: list[str] | None, ignore_index: int | None, published: Classes | None = None
) -> Classes:
    """The classes of a folder: as given, or from its `classes.json`, or else as published for its layout."""
    if names is not None:
        return Classes.make(names, ignore_index)
    file = root / "classes.json"
    if not file.is_file():
        if published is not None:
            return published
        raise DataError(
            f"{root}: class names are not known. Write {file.name} there, "
            f'{{"classes": ["background", "cat"], "ignore_index": 255}}, or give --data.classes. '
            f"The first masks hold the values {_values_seen(root)}."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Classes.make(content["classes"], content.get("ignore_index") if ignore_index is None else ignore_index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        example = '{"classes": ["background", "cat"], "ignore_index": 255}'
        raise DataError(f"{file}: expected something like {example}, but: {error!r}") from None


def check_pairs(pairs: list[Pair], problems: list[str], classes: Classes, root: Path) -> list[Pair]:
    """Read every file once, and raise one `DataError` that names what is wrong with which; fills in the sizes."""
    checked = each_in_threads(lambda pair: _check(pair, classes, root), pairs, "checking files")
    problems = problems + [problem for _, found in checked for problem in found]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            f"{root}: {len(problems)} problem{'s'[: len(problems) > 1]} in {len(pairs)} pairs:{shown}{more}"
        )
    if not pairs:
        raise DataError(f"{root}: no image with a mask was found")
    return [pair for pair, _ in checked]


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
    suffixes = MASK_SUFFIXES if masks else IMAGE_SUFFIXES
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in suffixes or file.name.startswith(".") or not file.stem.endswith(ending):
            continue
        name = file.relative_to(folder).with_suffix("").as_posix().removesuffix(ending)
        if name in found:
            problems.append(f"{file.relative_to(root)}: {found[name].name} beside it has the same name")
        found[name] = file
    return found


def _check(pair: Pair, classes: Classes, root: Path) -> tuple[Pair, list[str]]:
    problems = []
    size = shape = None
    try:
        image = read_image(pair.image)
        size = (image.height, image.width)
    except UNREADABLE as error:
        problems.append(f"{pair.image.relative_to(root)}: cannot be read: {error}")
    try:
        mask = read_mask(pair.mask)
        shape = mask.shape
        unknown = sorted(set(np.unique(mask).tolist()) - set(classes.ids) - classes.ignored)
        if unknown:
            problems.append(
                f"{pair.mask.relative_to(root)}: unknown class value {', '.join(map(str, unknown[:10]))}; known are "
                f"{_ranges(classes.ids)}, ignored are {_ranges(sorted(classes.ignored))}"
            )
    except UNREADABLE as error:
        problems.append(f"{pair.mask.relative_to(root)}: cannot be read: {error}")
    if size and shape and size != shape:
        problems.append(
            f"{pair.mask.relative_to(root)}: is {shape[1]} x {shape[0]}, its image is {size[1]} x {size[0]}"
        )
    return Pair(pair.image, pair.mask, size), problems


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
    files = [file for name in MASK_FOLDERS for file in sorted((root / name).rglob("*.png"))[:20]]
    seen: set[int] = set()
    for file in files:
        try:
            seen.update(np.unique(read_mask(file)).tolist())
        except UNREADABLE:
            continue  # this only helps to write a message; the check names such files
    return _ranges(sorted(seen)) or "none"
