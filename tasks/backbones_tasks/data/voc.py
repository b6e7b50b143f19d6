"""Images and objects in the layout of Pascal VOC: JPEGImages, Annotations, ImageSets/Main."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from .faults import Faults
from .folders import DataError
from .images import IMAGE_SUFFIXES, UNREADABLE, read_image
from .samples import ObjectList, Sample

LISTS = "ImageSets/Main"
SPLITS = ("train", "val", "test")


class VocFolder:
    """A folder with `JPEGImages`, `Annotations` and `ImageSets/Main/SPLIT.txt`.

    Objects marked difficult are kept aside as crowds are: as in VOC's own evaluation, they do not count.

    Args:
        root: the folder, such as VOCdevkit/VOC2012.
        classes: the classes to learn, in this order; objects of others are left out. By default all that any
            annotation names, in alphabetical order.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        self.root = root
        self.splits = {split for split in SPLITS if self._list(split).is_file()}
        if not self.splits:
            raise DataError(f"{root}: has no {LISTS}/train.txt that names the images to train on, one a line")
        self._trees: dict[str, ElementTree.Element | Exception] = {}
        names = sorted(self._names())
        if not names:
            raise DataError(f"{root / 'Annotations'}: names no object")
        self.classes = list(classes or names)
        unknown = [name for name in self.classes if name not in names]
        if unknown:
            raise DataError(f"{root}: no object is a {' or '.join(map(repr, unknown))}; there are {', '.join(names)}")

    def read(self, split: str, masks: bool) -> tuple[list[Sample], dict[int, tuple[int, str]], Faults]:
        """The samples of a split that are sound, its categories (id and name by label), and the faults of the rest."""
        if masks:
            raise DataError(f"{self.root}: boxes in Pascal VOC's layout come without masks; masks need COCO's format")
        labels = {name: label for label, name in enumerate(self.classes, start=1)}
        names = self._images(split)
        faults = Faults(self._list(split), self.root, len(names))
        images = {file.stem: file for file in sorted((self.root / "JPEGImages").glob("*")) if _is_image(file)}
        samples, seen = [], set()
        for image_id, name in enumerate(names, start=1):
            tree = self._tree(name)
            if name in seen:
                faults.add("image listed twice", name)
            elif name not in images:
                faults.add("missing image", f"JPEGImages/{name}")
            elif isinstance(tree, FileNotFoundError):
                faults.add("missing annotation", faults.name(self._annotation(name)))
            elif isinstance(tree, Exception):
                faults.add("broken annotation", f"{faults.name(self._annotation(name))}, {tree}")
            else:
                size = _size(tree, images[name])
                if size is None:
                    faults.add("image of unknown size", faults.name(images[name]))
                else:
                    objects = ObjectList(size, masks=False, faults=faults)
                    _add_objects(tree, labels, objects, name)
                    samples.append(objects.sample(images[name], image_id))
                    faults.objects += len(tree.findall("object"))
            seen.add(name)
        return samples, {label: (label, name) for name, label in labels.items()}, faults

    def _list(self, split: str) -> Path:
        return self.root / LISTS / f"{split}.txt"

    def _images(self, split: str) -> list[str]:
        lines = self._list(split).read_text(encoding="utf-8").splitlines()
        return [line.split()[0] for line in lines if line.strip()]  # lists of a class have a second column

    def _annotation(self, name: str) -> Path:
        return self.root / "Annotations" / f"{name}.xml"

    def _tree(self, name: str) -> ElementTree.Element | Exception:
        if name not in self._trees:
            try:
                self._trees[name] = ElementTree.parse(self._annotation(name)).getroot()
            except (OSError, ElementTree.ParseError) as error:
                self._trees[name] = error
        return self._trees[name]

    def _names(self) -> set[str]:
        trees = [self._tree(name) for split in sorted(self.splits) for name in self._images(split)]
        found = {name.strip() for tree in trees if not isinstance(tree, Exception) for name in _object_names(tree)}
        return found - {""}


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
        difficult = thing.findtext("difficult", "0").strip() == "1"
        objects.add(where, [x0, y0, x1 - x0, y1 - y0], labels[name], crowd=difficult)


def _size(tree: ElementTree.Element, file: Path) -> tuple[int, int] | None:
    """(H, W) as the annotation has it; some tools leave it out, and then as the image has it."""
    try:
        height, width = (int(float(tree.findtext(f"size/{side}", "0"))) for side in ("height", "width"))
        if height > 0 and width > 0:
            return height, width
        image = read_image(file)
        return image.height, image.width
    except UNREADABLE:
        return None


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
