"""Images and objects listed in COCO's format, in the layouts that are about."""

import codecs
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .faults import Faults
from .folders import DataError, is_inside
from .samples import MOST, ObjectList, Sample

ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
ANNOTATIONS = (
    "annotations/instances_{}.json",
    "annotations/instances_{}[0-9]*.json",  # train2017
    "instances_{}.json",
    "instances_{}[0-9]*.json",
    "annotations/{}.json",
    "{}/_annotations.coco.json",  # Roboflow
    "{}.json",
)
IMAGES = ("images/{name}", "{name}", "images/{split}", "{split}", "images", ".")
CROWDS = {0: False, 1: True, None: False, "0": False, "1": True}  # True and 1.0 are 1 to Python
PARTS = ("images", "annotations", "categories")


@dataclass
class CocoFiles:
    """Where a split is, relative to the data's root.

    annotations: the JSON file. images: the folder that its file names are in.
    """

    annotations: str
    images: str


class CocoFolder:
    """Annotation files in COCO's format and the images they list.

    Args:
        root: the folder; `ANNOTATIONS` says where files are looked for in it, `IMAGES` where their images are.
        files: says it for splits that are elsewhere.
        classes: the classes to learn, in this order; objects of others are left out. By default all that the first
            split lists, in the order of their ids.
    """

    def __init__(self, root: Path, files: dict[str, CocoFiles], classes: Sequence[str] | None = None):
        self.root = root
        self.files = {split: root / where.annotations for split, where in files.items()}
        self.folders = {split: root / where.images for split, where in files.items()}
        for split in ALIASES.keys() - files.keys():
            found = _find_annotations(root, split)
            if found is not None:
                self.files[split] = found
        self._contents: dict[str, dict[str, Any]] = {}  # a large file takes a while to read: once will do
        if not self.files:
            return
        first = next(split for split in ALIASES if split in self.files)
        self.first = _categories(self._content(first), self.files[first])
        self.classes = check_names(classes) if classes else sorted(self.first, key=self.first.get)
        self.chosen = bool(classes)
        unknown = [name for name in self.classes if name not in self.first]
        if unknown:
            raise DataError(
                f"{self.files[first]}: lists no class {', '.join(map(repr, unknown))}; it has {', '.join(self.first)}"
            )

    @property
    def splits(self) -> set[str]:
        return set(self.files)

    def read(self, split: str, masks: bool) -> tuple[list[Sample], dict[int, tuple[int, str]], Faults]:
        """The samples of a split that are sound, its categories (id and name by label), and the faults of the rest."""
        file = self.files[split]
        content = self._content(split)
        del self._contents[split]
        ids = _categories(content, file)
        labels = {ids[name]: label for label, name in enumerate(self.classes, start=1) if name in ids}
        categories = {label: (number, self.classes[label - 1]) for number, label in labels.items()}
        faults = Faults(file, self.root, len(content["images"]), len(content["annotations"]))
        self._tell_unlike(ids, faults)
        folder = self.folders.get(split) or _find_images(self.root, file, split, content["images"])

        found: dict[int, tuple[Path, ObjectList]] = {}
        listed = set()
        for entry in content["images"]:
            try:
                number, name, size = _image(entry)
            except ValueError as error:
                faults.add(*error.args)
                continue
            place = folder / name
            if number in listed:
                faults.add("image id used twice", f"{number}, {name}")
            elif not is_inside(place, folder, self.root):
                faults.add("file name that leads out of the folder", name)
            elif not os.path.isfile(place):
                faults.add("missing image", faults.name(place))
            else:
                found[number] = (place, ObjectList(size, masks, faults))
            listed.add(number)

        seen, known = set(), set(ids.values())
        for entry in content["annotations"]:
            if not isinstance(entry, dict):
                faults.add("annotation that is no object", repr(entry)[:100])
                continue
            number, image, category = (_key(entry.get(name)) for name in ("id", "image_id", "category_id"))
            where = f"annotation {number} of {found[image][0].name if image in found else f'image {image}'}"
            crowd = CROWDS.get(entry.get("iscrowd", 0)) if _hashable(entry.get("iscrowd")) else None
            if image not in listed:
                faults.add("annotation of an image that is not listed", where)
            elif number is not None and number in seen:
                faults.add("annotation id used twice", where)
            elif category not in known:
                faults.add("unknown category", f"{where}, {category}")
            elif crowd is None:
                faults.add("iscrowd that is neither 0 nor 1", f"{where}, {entry['iscrowd']!r}")
            elif image in found and category in labels:
                found[image][1].add(
                    where, entry.get("bbox"), labels[category], entry.get("area"), crowd, entry.get("segmentation")
                )
            seen.add(number)
        samples = [objects.sample(path, number) for number, (path, objects) in found.items()]
        return samples, categories, faults

    def _tell_unlike(self, ids: dict[str, int], faults: Faults) -> None:
        """Classes of another split that are not those to learn, unless they were left out by choice."""
        unlike = [name for name in ids if name not in self.classes]
        for name in unlike:
            alike = next((known for known in self.classes if known.strip().lower() == name.strip().lower()), None)
            if alike is not None and alike not in ids:
                faults.add("class that is spelt otherwise in training", f"{name!r}, there {alike!r}")
            elif not self.chosen:
                faults.add("class that is not among those to train", repr(name))

    def _content(self, split: str) -> dict[str, Any]:
        if split not in self._contents:
            self._contents[split] = _read_json(self.files[split])
        return self._contents[split]


def _find_annotations(root: Path, split: str) -> Path | None:
    for pattern in ANNOTATIONS:
        for alias in ALIASES[split]:
            files = sorted(root.glob(pattern.format(alias)))
            if len(files) > 1:
                names = ", ".join(str(file.relative_to(root)) for file in files)
                raise DataError(f"{root}: which of {names}? Say it with --data.{split}.annotations and .images")
            if files:
                return files[0]
    return None


def _find_images(root: Path, file: Path, split: str, images: list) -> Path:
    """The folder that holds the first images of a list; if none does, the first of the likely ones that exists."""
    name = file.stem.removeprefix("instances_")
    names = [name, split, *ALIASES[split]]
    folders = [root / pattern.format(name=name, split=alias) for pattern in IMAGES for alias in names]
    folders = [folder for folder in dict.fromkeys([*folders, file.parent]) if folder.is_dir()]
    first = [entry.get("file_name") for entry in images[:10] if isinstance(entry, dict)]
    first = [name for name in first if isinstance(name, str) and name]
    return max(folders, key=lambda folder: sum(os.path.isfile(folder / name) for name in first))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes().removeprefix(codecs.BOM_UTF8))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is no JSON: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in PARTS):
        raise DataError(f"{file}: expected COCO's format, an object of the lists {', '.join(PARTS)}")
    return content


def _categories(content: dict[str, Any], file: Path) -> dict[str, int]:
    """Ids by name."""
    pairs = []
    for entry in content["categories"]:
        name, number = (entry.get("name"), _key(entry.get("id"))) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name.strip() or not isinstance(number, int):
            raise DataError(f"{file}: categories need an id, a whole number, and a name each, but one is {entry!r}")
        pairs.append((name, number))
    for kind, values in (("name", [name for name, _ in pairs]), ("id", [number for _, number in pairs])):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise DataError(f"{file}: categories of the same {kind}: {', '.join(map(str, twice))}")
    if not pairs:
        raise DataError(f"{file}: lists no category")
    check_names([name for name, _ in pairs], str(file))
    return dict(pairs)


def check_names(names: Sequence[str], where: str = "--data.classes") -> list[str]:
    """Class names as a list; DataError where two are the same but for case or space."""
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(name.strip().lower(), name)) is not name or names.count(name) > 1:
            raise DataError(f"{where}: the classes {other!r} and {name!r} are one, or are they? Give each another name")
    return list(names)


def _hashable(value: Any) -> bool:
    return not isinstance(value, list | dict)


def _key(value: Any) -> int | str | None:
    """An id: whole numbers are such however they are written, as 7, 7.0 or "7"."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < MOST:
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,18}(\.0*)?\s*", value):
        return int(value.partition(".")[0])
    return str(value)


def _image(entry: Any) -> tuple[int, str, tuple[int, int]]:
    """Id, file name and (H, W) of an image's entry; ValueError(kind of fault, where) for what is missing or wrong."""
    if not isinstance(entry, dict):
        raise ValueError("image entry that is no object", repr(entry)[:100])
    number: Any = _key(entry.get("id"))
    name, sides = entry.get("file_name"), [_key(entry.get(side)) for side in ("height", "width")]
    height: Any = sides[0]
    width: Any = sides[1]
    where = name if isinstance(name, str) and name else repr(entry)[:100]
    for label, value in (("id", number), ("width", width), ("height", height)):
        if value is None:
            raise ValueError(f"image without {'an' if label == 'id' else 'a'} {label}", where)
        if not isinstance(value, int) or (label != "id" and value <= 0) or abs(value) >= MOST:
            raise ValueError(f"image whose {label} is no whole number", f"{where}, {entry[label]!r}")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("image without a file name", where)
    return number, name, (height, width)
