"""Images and objects in YOLO's layout: data.yaml, and a text file of labels for each image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .coco import check_names
from .faults import Faults
from .folders import DataError, is_inside, read_list, tell_others
from .images import IMAGE_SUFFIXES, UNREADABLE, find_files
from .samples import ObjectList, Sample
from .voc import upright_size

FILES = ("data.yaml", "data.yml", "dataset.yaml")
NOT_LABELS = ("classes.txt", "labels.txt", "notes.txt")  # which tools write beside them
KEYS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


class YoloFolder:
    """A folder whose `data.yaml` names the classes and the images of each split.

    A line of a label file is a class index and a box (centre, width and height), or a polygon (x, y, x, y, ...), all as
    shares of the image's sides. An image without a label file has no object.

    Args:
        root: the folder.
        classes: the classes to learn, in this order; objects of others are left out. By default all of data.yaml's.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        self.root = root
        self.file = next(root / name for name in FILES if (root / name).is_file())
        content = _read_yaml(self.file)
        self.names = _names(content.get("names"), content.get("nc"), self.file)
        self.base = root / str(content.get("path") or ".")
        self.places: dict[str, list[Path]] = {}
        for split, keys in KEYS.items():
            told = next((content[key] for key in keys if content.get(key)), None)
            if told is not None:
                told = told if isinstance(told, list) else [told]
                self.places[split] = [self._place(split, entry) for entry in told]
        if not self.places:
            raise DataError(f'{self.file}: names no images; "train" and "val" are folders of images')
        self.splits = set(self.places)
        self.classes = check_names(classes or list(self.names.values()), self.file if not classes else "--data.classes")
        unknown = [name for name in self.classes if name not in self.names.values()]
        if unknown:
            raise DataError(f"{self.file}: names no class {', '.join(map(repr, unknown))}")

    @classmethod
    def fits(cls, root: Path) -> bool:
        return any((root / name).is_file() for name in FILES)

    def read(self, split: str, masks: bool) -> tuple[list[Sample], dict[int, tuple[int, str]], Faults]:
        """The samples of a split that are sound, its categories (id and name by label), and the faults of the rest."""
        labels = {name: label for label, name in enumerate(self.classes, start=1)}
        faults = Faults(self.file, self.root)
        images = self._images(split, faults)
        samples, unlabelled = [], []
        for image_id, image in enumerate(images, start=1):
            try:
                size = upright_size(image)
            except UNREADABLE as error:
                faults.add("image that cannot be read", f"{faults.name(image)}, {error}")
                continue
            objects = ObjectList(size, masks, faults)
            label_file = _label_file(image)
            if label_file.is_file():
                self._add_objects(label_file, labels, objects)
            else:
                unlabelled.append(image)
            samples.append(objects.sample(image, image_id))
        faults.images = len(images)
        for file in self._without_image(split, images):
            faults.add("label file without an image", faults.name(file))
        if images and len(unlabelled) == len(images):
            raise DataError(f"{self.root}: no image of {split} has labels; the first would be {_label_file(images[0])}")
        if unlabelled:
            faults.note(
                f"{len(unlabelled)} of {len(images)} images of {split} have no label file, and so no object: the first "
                f"is {faults.name(unlabelled[0])}"
            )
        return samples, {label: (label, name) for name, label in labels.items()}, faults

    def _without_image(self, split: str, images: list[Path]) -> list[Path]:
        """Label files in the folders of a split's labels that belong to no image; a list may leave images out."""
        if not all(place.is_dir() for place in self.places[split]):
            return []
        expected = {_label_file(image) for image in images}
        found = {file for folder in {file.parent for file in expected} for file in folder.glob("*.txt")}
        return sorted(file for file in found - expected if file.name not in NOT_LABELS)

    def _place(self, split: str, entry: Any) -> Path:
        """Where a split is; the paths that tools write beside data.yaml are found as Ultralytics finds them."""
        if not isinstance(entry, str):
            raise DataError(f"{self.file}: {split}: {entry!r} is no path")
        options = [self.base / entry, self.root / entry, self.root / entry.removeprefix("../")]
        inside = [place for place in options if is_inside(place, self.root)]
        if not inside:
            raise DataError(f"{self.file}: {split}: {entry} leads out of the folder")
        there = next((place for place in inside if place.exists()), None)
        if there is None:
            raise DataError(f"{self.file}: {split}: {entry} is not there")
        return there

    def _images(self, split: str, faults: Faults) -> list[Path]:
        images: list[Path] = []
        for place in self.places[split]:
            if place.is_dir():
                found = find_files(place, {*IMAGE_SUFFIXES, ".txt"})
                tell_others(place, found)
                images += [file for file in found.files if file.suffix.lower() != ".txt"]
                continue
            for line in read_list(place):
                file = self.base / line if (self.base / line).exists() else place.parent / line
                if not is_inside(file, self.root):
                    faults.add("file name that leads out of the folder", line)
                elif not file.is_file():
                    faults.add("missing image", f"{place.name}, {line}")
                else:
                    images.append(file)
        twice = len(images) - len(set(images))
        if twice:
            faults.add("images listed twice", f"{twice} of {split}", repaired=True)
        return list(dict.fromkeys(images))

    def _add_objects(self, file: Path, labels: dict[str, int], objects: ObjectList) -> None:
        faults, (height, width) = objects.faults, objects.size
        for number, line in enumerate(read_list(file), start=1):
            where = f"{faults.name(file)}, line {number}"
            faults.objects += 1
            try:
                index, *shares = map(float, line.split())
            except ValueError:
                faults.add("line that is not numbers", f"{where}, {line[:60]!r}")
                continue
            if index not in self.names:
                faults.add("unknown class", f"{where}, {index:g}; data.yaml names {_told(self.names)}")
                continue
            if len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
                faults.add("line of neither a box nor a polygon", f"{where}, of {len(shares)} numbers beside the class")
                continue
            if not all(-1 <= share <= 2 for share in shares):
                faults.add("coordinates that are no shares of the image", f"{where}, {line[:60]!r}; are they pixels?")
                continue
            if self.names[index] not in labels:  # not among the classes asked for
                continue
            polygon = None
            if len(shares) == 4:
                x, y, w, h = shares
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            else:
                polygon = [share * (width, height)[i % 2] for i, share in enumerate(shares)]
                xs, ys = polygon[::2], polygon[1::2]
                box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            objects.add(where, box, labels[self.names[index]], segmentation=polygon and [polygon])


def _label_file(image: Path) -> Path:
    """`labels/.../x.txt` of `images/.../x.jpg`, by the last folder called images; else beside the image."""
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f'{file}: expected YOLO\'s "names", "train" and "val"')
    return content


def _names(names: Any, count: Any, file: Path) -> dict[int, str]:
    """Class names by index."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    sound = isinstance(names, dict) and all(type(i) is int and isinstance(n, str) and n for i, n in names.items())
    if not names or not sound:
        raise DataError(f'{file}: "names" is to be a list of class names, or their indices and names')
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc is {count}, but {len(names)} classes are named")
    return names


def _told(names: dict[int, str]) -> str:
    return f"{min(names)} to {max(names)}"
