"""The folder layouts that segmentation data come in: where images and masks are, and what masks' values mean."""

from pathlib import Path
from typing import ClassVar

from .folders import MASK_FOLDERS, Classes, DataError, Pair, by_name, pair_up, read_list
from .loading import held_out

ADE20K_CLASSES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag
"""
# name: the value in *_labelIds.png; its place in this list is the value in *_labelTrainIds.png
CITYSCAPES_CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
VOC_CLASSES = """
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
    person, pottedplant, sheep, sofa, train, tvmonitor
"""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
UNLABELLED = 255  # in all of the published ones


class Layout:
    """Images and masks in a folder; one subclass for each layout.

    Args:
        root: the folder.
    """

    #: What the user calls it.
    name: ClassVar[str]
    #: What is in such a folder, for errors.
    holds: ClassVar[str]
    #: What such folders are called in the one that their archive is unpacked to.
    usual_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, root: Path):
        self.root = root

    @classmethod
    def fits(cls, root: Path) -> bool:
        """Whether a folder has this layout."""
        raise NotImplementedError

    def splits(self) -> set[str]:
        """Those of "train", "val" and "test" that there are images and masks of."""
        raise NotImplementedError

    def pairs(self, split: str) -> tuple[list[Pair], list[str]]:
        """The images of such a split with their masks, and the problems found."""
        raise NotImplementedError

    def classes(self, ignore_index: int | None) -> Classes | None:
        """What was published of the masks' values, less `ignore_index`; None where every folder has its own."""
        return None


class PlainFolders(Layout):
    """`images` and `labels` (or `masks`), both with a folder for each split, or with files alone, all for training."""

    name = "folders"
    holds = (
        "images/{train,val,test}/*, labels/{train,val,test}/*.png (or masks/...), classes.json; or images/*, masks/*"
    )

    @classmethod
    def fits(cls, root: Path) -> bool:
        return (root / "images").is_dir() and any((root / name).is_dir() for name in MASK_FOLDERS)

    def splits(self) -> set[str]:
        return {split for split in SPLIT_NAMES if self._folder(split)} or {"train"}

    def pairs(self, split: str) -> tuple[list[Pair], list[str]]:
        masks = [self.root / name for name in MASK_FOLDERS if (self.root / name).is_dir()]
        if len(masks) > 1:
            raise DataError(f"{self.root}: has masks in {' and in '.join(MASK_FOLDERS)}; which of them? Keep one")
        folder = self._folder(split) or "."
        return pair_up(self.root / "images" / folder, masks[0] / folder, self.root)

    def _folder(self, split: str) -> str | None:
        found = [name for name in SPLIT_NAMES[split] if (self.root / "images" / name).is_dir()]
        if len(found) > 1:
            raise DataError(f"{self.root}: which of images/{' and images/'.join(found)} is {split}? Keep one")
        return found[0] if found else None


class Ade20k(Layout):
    """The scene parsing benchmark of ADE20K (http://sceneparsing.csail.mit.edu); 0 is what has no label."""

    name = "ade20k"
    holds = "images/{training,validation}/*.jpg, annotations/{training,validation}/*.png (ADEChallengeData2016)"
    usual_names = ("ADEChallengeData2016",)
    folders: ClassVar[dict[str, str]] = {"train": "training", "val": "validation"}

    @classmethod
    def fits(cls, root: Path) -> bool:
        return any((root / "annotations" / folder).is_dir() for folder in cls.folders.values())

    def splits(self) -> set[str]:
        return {split for split, folder in self.folders.items() if (self.root / "annotations" / folder).is_dir()}

    def pairs(self, split: str) -> tuple[list[Pair], list[str]]:
        folder = self.folders[split]
        return pair_up(self.root / "images" / folder, self.root / "annotations" / folder, self.root)

    def classes(self, ignore_index: int | None) -> Classes:
        names = _names(ADE20K_CLASSES)
        return Classes.make(names, ignore_index, ids=range(1, len(names) + 1), ignored=[0, UNLABELLED])


class Cityscapes(Layout):
    """Cityscapes' fine annotations (https://www.cityscapes-dataset.com), by the 19 classes that are evaluated.

    `*_gtFine_labelTrainIds.png` where Cityscapes' scripts have made such files, else `*_gtFine_labelIds.png`. Labels of
    its test images are not published; the files in their place are empty and not read.
    """

    name = "cityscapes"
    holds = "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png, gtFine/{train,val}/CITY/*_gtFine_label{TrainIds,Ids}.png"
    usual_names = ("cityscapes", "Cityscapes")

    @classmethod
    def fits(cls, root: Path) -> bool:
        return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()

    def splits(self) -> set[str]:
        return {split for split in ("train", "val") if (self.root / "gtFine" / split).is_dir()}

    def pairs(self, split: str) -> tuple[list[Pair], list[str]]:
        ending = "_gtFine_labelTrainIds" if self._has_train_ids() else "_gtFine_labelIds"
        images, masks = (self.root / folder / split for folder in ("leftImg8bit", "gtFine"))
        return pair_up(images, masks, self.root, "_leftImg8bit", ending)

    def classes(self, ignore_index: int | None) -> Classes:
        names = list(CITYSCAPES_CLASSES)
        if self._has_train_ids():
            return Classes.make(names, ignore_index, ignored=[UNLABELLED])
        ids = list(CITYSCAPES_CLASSES.values())
        return Classes.make(names, ignore_index, ids=ids, ignored=set(range(-1, 34)) - set(ids) | {UNLABELLED})

    def _has_train_ids(self) -> bool:
        return any((self.root / "gtFine").glob("*/*/*_gtFine_labelTrainIds.png"))


class PascalVoc(Layout):
    """Pascal VOC's segmentation (http://host.robots.ox.ac.uk/pascal/VOC); 255 is the rim of objects."""

    name = "voc"
    holds = "JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val,test}.txt (VOC2012)"
    usual_names = ("VOC2012", "VOC2007", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007")

    @classmethod
    def fits(cls, root: Path) -> bool:
        return (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir()

    def splits(self) -> set[str]:
        return {split for split in ("train", "val", "test") if self._list(split).is_file()}

    def pairs(self, split: str) -> tuple[list[Pair], list[str]]:
        problems: list[str] = []
        images = by_name(self.root / "JPEGImages", self.root, problems)
        masks = by_name(self.root / "SegmentationClass", self.root, problems, masks=True)
        names = dict.fromkeys(read_list(self._list(split)))
        for name in names:
            missing = [
                folder for folder, files in (("JPEGImages", images), ("SegmentationClass", masks)) if name not in files
            ]
            problems += [f"{self._list(split).relative_to(self.root)}: {name} is not in {folder}" for folder in missing]
        return [Pair(images[name], masks[name]) for name in names if name in images and name in masks], problems

    def classes(self, ignore_index: int | None) -> Classes:
        return Classes.make(_names(VOC_CLASSES), ignore_index, ignored=[UNLABELLED])

    def _list(self, split: str) -> Path:
        return self.root / "ImageSets" / "Segmentation" / f"{split}.txt"


LAYOUTS = (Ade20k, Cityscapes, PascalVoc, PlainFolders)


def find_layout(root: Path, name: str | None = None) -> Layout:
    """The layout of a folder, or of the folder in it that has the usual name; of this `name`, if one is given."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    kinds = [kind for kind in LAYOUTS if name in (None, kind.name)]
    for kind in kinds:
        for place in (root, *(root / usual for usual in kind.usual_names)):
            if kind.fits(place):
                return kind(place)
    accepted = "".join(f"\n  {kind.name}: {kind.holds}" for kind in kinds)
    raise DataError(f"{root}: does not look like a folder of images and masks. Accepted are:{accepted}")


def find_pairs(layout: Layout, split: str, val_fraction: float, split_seed: int) -> tuple[list[Pair], list[str]]:
    """The images of a split with their masks, and the problems found.

    Where there is no "val", it is a random `val_fraction` of the training images, and "train" the rest of them.
    """
    there = layout.splits()
    if split == "test" and split not in there:
        raise DataError(f"{layout.root}: has no masks to test on; `validate` measures on the validation images")
    if split == "train" and split not in there:
        raise DataError(f"{layout.root}: has nothing to train on; expected {layout.holds}")
    if split in there and not (split == "train" and "val" not in there):
        return layout.pairs(split)
    pairs, problems = layout.pairs("train")
    if not pairs:
        return pairs, problems
    train, val = held_out(len(pairs), val_fraction, split_seed)
    return [pairs[i] for i in (val if split == "val" else train)], problems


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
