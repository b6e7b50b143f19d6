"""Images and objects listed in COCO's format, in the layouts that are about."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .faults import Faults
from .folders import DataError
from .samples import ObjectList, Sample

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
        self.classes = list(classes or sorted(self.first, key=self.first.get))
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
        folder = self.folders.get(split) or _find_images(self.root, file, split, content["images"])

        found: dict[int, tuple[Path, ObjectList]] = {}
        listed = set()
        for entry in content["images"]:
            number, name, size = _image(entry)
            where = f"{name or entry}"
            if number is None or name is None or size is None:
                faults.add("image without an id, a file name, a width or a height", where)
            elif number in listed:
                faults.add("image id used twice", f"{number}, {where}")
            elif not (folder / name).is_file():
                faults.add("missing image", faults.name(folder / name))
            else:
                found[number] = (folder / name, ObjectList(size, masks, faults))
            if number is not None:
                listed.add(number)

        seen, known = set(), set(ids.values())
        for entry in content["annotations"]:
            if not isinstance(entry, dict):
                faults.add("annotation that is no object", repr(entry))
                continue
            number, image, category = (_key(entry.get(name)) for name in ("id", "image_id", "category_id"))
            where = f"annotation {number} of {found[image][0].name if image in found else f'image {image}'}"
            if image not in listed:
                faults.add("annotation of an image that is not listed", where)
            elif number is not None and number in seen:
                faults.add("annotation id used twice", where)
            elif category not in known:
                faults.add("unknown category", f"{where}, {category}")
            elif image in found and category in labels:
                found[image][1].add(
                    where,
                    entry.get("bbox"),
                    labels[category],
                    entry.get("area"),
                    bool(entry.get("iscrowd")),
                    entry.get("segmentation"),
                )
            seen.add(number)
        samples = [objects.sample(path, number) for number, (path, objects) in found.items()]
        return samples, categories, faults

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
    first = [entry["file_name"] for entry in images[:10] if _image(entry)[1]]
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in first))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except ValueError as error:
        raise DataError(f"{file}: is no JSON: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in PARTS):
        raise DataError(f"{file}: expected COCO's format, an object of the lists {', '.join(PARTS)}")
    return content


def _categories(content: dict[str, Any], file: Path) -> dict[str, int]:
    """Ids by name."""
    try:
        pairs = [(str(entry["name"]), int(entry["id"])) for entry in content["categories"]]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{file}: categories need an id and a name each") from None
    for kind, values in (("name", [name for name, _ in pairs]), ("id", [number for _, number in pairs])):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise DataError(f"{file}: categories of the same {kind}: {', '.join(map(str, twice))}")
    if not pairs:
        raise DataError(f"{file}: lists no category")
    return dict(pairs)


def _key(value: Any) -> int | str | None:
    return value if value is None or isinstance(value, int) else str(value)


def _image(entry: Any) -> tuple[int | None, str | None, tuple[int, int] | None]:
    """Id, file name and (H, W) of an image's entry; None for what is missing."""
    if not isinstance(entry, dict):
        return None, None, None
    number, name, size = entry.get("id"), entry.get("file_name"), (entry.get("height"), entry.get("width"))
    return (
        number if isinstance(number, int) else None,
        name if isinstance(name, str) and name else None,
        size if all(isinstance(side, int) and side > 0 for side in size) else None,
    )
