"""Images and objects in Pascal VOC's XML: in its layout, or beside the images as labelImg writes it."""

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .coco import check_names
from .faults import Faults
from .folders import DataError, read_list, tell_others
from .images import IMAGE_SUFFIXES, UNREADABLE, find_files, orientation, stored_size
from .samples import ObjectList, Sample

LISTS = "ImageSets/Main"
SPLITS = ("train", "val", "test")
ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class XmlAnnotations:
    """Images of which each has an annotation in VOC's XML; a subclass says where both are.

    Objects marked difficult are kept aside as crowds are: as in VOC's own evaluation, they do not count.

    Args:
        root: the folder.
        splits: those that there are.
        classes: the classes to learn, in this order; objects of others are left out. By default all that any
            annotation names, in alphabetical order.
    """

    def __init__(self, root: Path, splits: set[str], classes: Sequence[str] | None = None):
        self.root, self.splits = root, splits
        self._trees: dict[Path, ElementTree.Element | Exception] = {}
        names = sorted(self._names())
        if not names:
            raise DataError(f"{root}: no annotation names an object")
        self.classes = check_names(classes or names, str(root) if not classes else "--data.classes")
        unknown = [name for name in self.classes if name not in names]
        if unknown:
            raise DataError(f"{root}: no object is a {' or '.join(map(repr, unknown))}; there are {', '.join(names)}")

    def source(self, split: str) -> Path:
        """What lists the images of a split, for errors."""
        raise NotImplementedError

    def items(self, split: str, faults: Faults) -> list[tuple[str, Path, Path]]:
        """Name, image and annotation of each; what is faulty is noted and left out."""
        raise NotImplementedError

    def read(self, split: str, masks: bool) -> tuple[list[Sample], dict[int, tuple[int, str]], Faults]:
        """The samples of a split that are sound, its categories (id and name by label), and the faults of the rest."""
        if masks:
            raise DataError(f"{self.root}: boxes in Pascal VOC's layout come without masks; masks need COCO's format")
        labels = {name: label for label, name in enumerate(self.classes, start=1)}
        faults = Faults(self.source(split), self.root)
        samples = []
        for image_id, (name, image, annotation) in enumerate(self.items(split, faults), start=1):
            tree = self._tree(annotation)
            if isinstance(tree, FileNotFoundError):
                faults.add("missing annotation", faults.name(annotation))
            elif isinstance(tree, Exception):
                faults.add("broken annotation", f"{faults.name(annotation)}, {tree}")
            else:
                size = _size(tree, image)
                if size is None:
                    faults.add("image of unknown size", faults.name(image))
                else:
                    objects = ObjectList(size, masks=False, faults=faults)
                    _add_objects(tree, labels, objects, name)
                    samples.append(objects.sample(image, image_id))
                    faults.objects += len(tree.findall("object"))
        return samples, {label: (label, name) for name, label in labels.items()}, faults

    def _tree(self, annotation: Path) -> ElementTree.Element | Exception:
        if annotation not in self._trees:
            try:
                tree = ElementTree.parse(annotation).getroot()
                for element in tree.iter():  # a namespace, which some tools write, says nothing
                    element.tag = str(element.tag).rpartition("}")[2]
                if tree.tag != "annotation":
                    raise ElementTree.ParseError(f"its root is <{tree.tag}>, not <annotation>")
                self._trees[annotation] = tree
            except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
                self._trees[annotation] = error
        return self._trees[annotation]

    def _names(self) -> set[str]:
        unheard = Faults(self.root, self.root)  # `read` tells these
        items = [item for split in sorted(self.splits) for item in self.items(split, unheard)]
        trees = [self._tree(annotation) for _, _, annotation in items]
        found = {name.strip() for tree in trees if not isinstance(tree, Exception) for name in _object_names(tree)}
        return found - {""}


class VocFolder(XmlAnnotations):
    """A folder, such as VOCdevkit/VOC2012, with `JPEGImages`, `Annotations` and `ImageSets/Main/SPLIT.txt`."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        self.root = root
        splits = {split for split in SPLITS if self.source(split).is_file()}
        if not splits:
            raise DataError(f"{root}: has no {LISTS}/train.txt that names the images to train on, one a line")
        super().__init__(root, splits, classes)

    def source(self, split: str) -> Path:
        return self.root / LISTS / f"{split}.txt"

    def items(self, split: str, faults: Faults) -> list[tuple[str, Path, Path]]:
        found = find_files(self.root / "JPEGImages", IMAGE_SUFFIXES).files
        images = {file.relative_to(self.root / "JPEGImages").with_suffix("").as_posix(): file for file in found}
        items, seen = [], set()
        lines = read_list(self.source(split))
        for line in lines:
            name = _listed(line, images)
            if name in seen:
                faults.add("image listed twice", name)
            elif name not in images:
                told = f"JPEGImages/{name}" if name == line else f"JPEGImages/{name}, by the line {line!r}"
                faults.add("missing image", told)
            else:
                items.append((name, images[name], self.root / "Annotations" / f"{name}.xml"))
            seen.add(name)
        faults.images = len(lines)
        return items


class FlatFolder(XmlAnnotations):
    """Images with an XML file of the same name beside each, as labelImg writes it, in a folder or in one per split."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        self.root = root
        self.folders = _flat_splits(root)
        super().__init__(root, set(self.folders), classes)

    @classmethod
    def fits(cls, root: Path) -> bool:
        return bool(_flat_splits(root))

    def source(self, split: str) -> Path:
        return self.folders[split]

    def items(self, split: str, faults: Faults) -> list[tuple[str, Path, Path]]:
        folder = self.folders[split]
        found = find_files(folder, {*IMAGE_SUFFIXES, ".xml"})
        if faults.source == folder:  # once
            tell_others(folder, found)
        images: dict[Path, Path] = {}
        for file in found.files:
            if file.suffix.lower() == ".xml":
                continue
            if file.with_suffix("") in images:
                faults.add("images that share an annotation", faults.name(file))
            images[file.with_suffix("")] = file
        annotations = {file.with_suffix("") for file in found.files if file.suffix.lower() == ".xml"}
        for name in sorted(annotations - images.keys()):
            faults.add("annotation without an image", f"{faults.name(name)}.xml")
        faults.images = len(images)
        return [(faults.name(name), image, name.with_name(f"{name.name}.xml")) for name, image in images.items()]


def _flat_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits, which hold XML files beside images, or this one to train on."""
    places = {split: root / name for split, names in ALIASES.items() for name in names if (root / name).is_dir()}
    there = {split: folder for split, folder in places.items() if any(folder.rglob("*.xml"))}
    return there or ({"train": root} if any(root.glob("*.xml")) else {})


def _listed(line: str, images: dict[str, Path]) -> str:
    """The image that a line names, with a suffix or without; lists of a class have a second column of -1, 0 or 1."""
    first, _, second = line.rpartition(" ")
    candidates = [line, *([first.strip()] if second in ("-1", "0", "1") else [])]
    for name in candidates:
        stem, suffix = os.path.splitext(name)
        for candidate in (name, *([stem] if suffix.lower() in IMAGE_SUFFIXES else [])):
            if candidate.removeprefix("JPEGImages/") in images:
                return candidate.removeprefix("JPEGImages/")
    return candidates[-1]


def _object_names(tree: ElementTree.Element) -> list[str]:
    return [thing.findtext("name", "") for thing in tree.findall("object")]


def _add_objects(tree: ElementTree.Element, labels: dict[str, int], objects: ObjectList, image: str) -> None:
    for number, thing in enumerate(tree.findall("object"), start=1):
        where = f"object {number} of {image}"
        name = thing.findtext("name", "").strip()
        if not name:
            objects.faults.add("object without a name", where)
            continue
        if name not in labels:  # not among the classes asked for
            continue
        corners = [thing.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            # pixels are counted from 1, the last included
            x0, y0, x1, y1 = (float(value) - first for value, first in zip(corners, (1, 1, 0, 0), strict=True))
        except ValueError:
            objects.faults.add("box that is not four numbers", f"{where}, {corners}")
            continue
        difficult = thing.findtext("difficult", "0").strip()
        if difficult not in ("", "0", "1"):
            objects.faults.add("difficult that is neither 0 nor 1", f"{where}, {difficult!r}")
            continue
        objects.add(where, [x0, y0, x1 - x0, y1 - y0], labels[name], crowd=difficult == "1")


def _size(tree: ElementTree.Element, file: Path) -> tuple[int, int] | None:
    """(H, W) as the annotation has it; some tools leave it out, and then as the image has it."""
    try:
        height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
        if height > 0 and width > 0:
            return height, width
        return upright_size(file)
    except (*UNREADABLE, OverflowError):
        return None


def upright_size(file: Path) -> tuple[int, int]:
    """(H, W) of an image, once it is upright."""
    width, height = stored_size(file)
    return (width, height) if orientation(file) >= 5 else (height, width)
