"""Images in a folder per class, or single shapes drawn on the fly, for training classifiers."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .coco import check_names
from .faults import Faults, count, tell
from .folders import DataError, tell_others
from .images import IMAGE_SUFFIXES, JUNK, UNREADABLE, each_in_threads, find_files
from .layouts import SPLIT_NAMES
from .loading import DataModule, held_out, jitter, seeded
from .published import Published, find_published
from .reading import Bands, Range, Reading, to_unit
from .segmentation import ShapesOptions
from .shapes import SHAPES, draw_scene
from .strong import Policy, Strong

SPLITS = ("train", "val", "test")

Item = tuple[Any, int]  # a file, or a number, and a class


class ImageFolderDataset(Dataset):
    """Files and classes as (image, class): (C, size, size) float32 in [0, 1] and an int64 scalar.

    Args:
        items: files and the indices of their classes
        transform: from an image (C, H, W) to one of `size` x `size`
        size: side of the images handed out
        seed: with it the transform draws anew in each epoch, and indices are the (epoch, index) pairs of
            `EpochSampler`; None for validation
        skip: what cannot be read is named in a warning, and the next image is handed out in its place; else it is an
            error
        reading: how files are read
    """

    def __init__(
        self,
        items: list[Item],
        transform: v2.Transform,
        size: int,
        seed: int | None = None,
        skip: bool = False,
        reading: Reading = Reading(),  # noqa: B008  (never changed)
    ):
        self.items, self.transform, self.seed, self.skip, self.reading = items, transform, seed, skip, reading
        self.sizes = [(size, size)] * len(items)

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """What a sample is called, for people."""
        return str(self.items[index][0])

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self._read(index)
        pixels = tv_tensors.Image(image)
        if self.seed is None:
            pixels = self.transform(pixels)
        else:
            with seeded(self.seed, epoch, index):
                pixels = self.transform(pixels)
        return to_unit(pixels), torch.tensor(label)

    @property
    def files(self) -> list[Path]:
        return [file for file, _ in self.items]

    def _read(self, index: int) -> tuple[torch.Tensor, int]:
        if index >= len(self):
            raise IndexError(index)  # which ends an iteration
        for step in range(len(self)):
            file, label = self.items[(index + step) % len(self)]
            try:
                return self.reading.tensor(file), label
            except UNREADABLE as error:
                message = f"{file}: cannot be read: {error}"
                if not self.skip:
                    raise DataError(f"{message}; mend it, or leave such files out: --data.faults drop") from error
                warnings.warn(f"{message}; the next image takes its place", stacklevel=2)
        raise DataError(f"none of {len(self)} images can be read, {self.items[0][0]} among them")


class PublishedDataset(ImageFolderDataset):
    """Images of one of torchvision's data sets, like `ImageFolderDataset`; the items are indices and classes."""

    def __init__(self, published: Published, split: str, items: list[tuple[int, int]], *options: Any):
        super().__init__(items, *options)
        self.published, self.split = published, split

    def name(self, index: int) -> str:
        return f"{self.published.kind} {self.split} {self.items[index][0]}"

    @property
    def files(self) -> list[Path]:
        """None that are known."""
        return []

    def _read(self, index: int) -> tuple[torch.Tensor, int]:
        number, label = self.items[index]
        try:
            return self.published.image(self.split, number), label
        except UNREADABLE as error:
            raise DataError(f"{self.published.root}: {self.name(index)} cannot be read: {error}") from error


class SingleShapes(Dataset):
    """Pictures of one shape each as (image, class), like `ImageFolderDataset`; each split has seeds of its own."""

    def __init__(self, length: int, size: int, split: str, seed: int = 0, transform: v2.Transform | None = None):
        self.length, self.size, self.seed = length, size, (seed, SPLITS.index(split))
        self.transform = transform
        self.sizes = [(size, size)] * length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """What a sample is called, for people."""
        return f"drawn shape {index}"

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        scene = draw_scene((*self.seed, epoch, index), self.size, shapes=1)
        pixels = tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1))
        if self.transform is not None:
            with seeded(*self.seed, epoch, index):
                pixels = self.transform(pixels)
        image = pixels.as_subclass(torch.Tensor).float() / 255
        return image, torch.tensor(int(scene.labels[0]) - 1)  # no background among the classes


def training_transform(
    size: int,
    scale: tuple[float, float],
    flip: float,
    color_jitter: float,
    strong: Sequence[v2.Transform] = (),
    channels: int = 3,
    padding: int | None = None,
) -> v2.Transform:
    """A random part of the image, resized to `size` x `size`, horizontal flip, colour jitter, and `strong` at last.

    With `padding`, it is one of `size` x `size` of the image, brought to that and padded by black on all sides.
    """
    bicubic = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    if padding is None:
        part = [v2.RandomResizedCrop(size, scale, **bicubic)]
    else:
        part = [v2.Resize(size, **bicubic), v2.RandomCrop(size, padding)]
    return v2.Compose([*part, v2.RandomHorizontalFlip(flip), *jitter(color_jitter, channels), *strong])


def evaluation_transform(size: int, crop: float) -> v2.Transform:
    """The middle `crop` of the image's shorter side, resized to `size` x `size`."""
    resize = v2.Resize(round(size / crop), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


class ClassificationData(DataModule):
    """Images in a folder per class, or drawn shapes where no root is given.

    Args:
        root: a folder with `train/CLASS/*.jpg` and `val/CLASS/*.jpg` and, for testing, `test/CLASS/*.jpg`; without
            `val`, some images of each class are held out. Or a folder with a folder per class. Classes are the names of
            the folders, sorted. Or NAME:DIR for one of torchvision's data sets, such as cifar10:DIR, where torchvision
            has put it
        batch_size: images per step and device
        image_size: side in pixels of the images handed out
        scale: range of the random training crop's share of the image's area
        padding: train on crops of `image_size` of images that are brought to that and padded by so many pixels, in
            place of `scale`; 4 is usual for CIFAR
        flip: probability of a horizontal flip
        color_jitter: strength of the random brightness, contrast and saturation; a quarter of it for hue; 0 is off
        auto_augment: "randaugment" draws `ra_operations` of fourteen changes of geometry and colour, each at
            `ra_magnitude`; "trivialaugment" one, at a magnitude drawn as well. Shapes, too, are changed
        ra_operations: of RandAugment, for each image
        ra_magnitude: of RandAugment, from 0 to 30
        random_erasing: probability that a random rectangle of the image is painted over; of shapes, too
        crop: share of the shorter side that is seen in validation
        val_fraction: share of the images held out, per class, where there is no `val`
        split_seed: decides which ones
        num_workers: processes that prepare batches; by default none for shapes, else one per core but at most 8
        check: read every file before training starts
        faults: files that cannot be read are "fatal", or you "drop" them; either way one report names them. What is
            found in the middle of an epoch only, with `check` off, is likewise an error, or replaced by the next image
        shapes: the data set that is drawn where no root is given, one shape per picture
        range: the values of images that are black and white, [low, high], or "uint8", "uint16", "dtype" (all that each
            file's type can hold); what lies beyond is cut. Files of 8 bits need none
        bands: indices, from 0, of the bands of each image to train on, or "all"; RGB, or grey, unless given
        nodata: the value that stands in where a file says that there is none, or NaN; an error unless given
        mean, std: of each band, from 0 to 1, in place of those that the backbone's weights were made for; those of
            other bands than RGB are computed from training images
        seed: decides the order, the augmentation and the drawn shapes
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        image_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        padding: int | None = None,
        flip: float = 0.5,
        color_jitter: float = 0.3,
        auto_augment: Policy | None = None,
        ra_operations: int = 2,
        ra_magnitude: int = 9,
        random_erasing: float = 0.0,
        crop: float = 0.875,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int | None = None,
        check: bool = True,
        faults: Literal["fatal", "drop"] = "fatal",
        shapes: ShapesOptions = ShapesOptions(size=64, val=200),  # noqa: B008  (never changed)
        range: Range | None = None,
        bands: Bands | None = None,
        nodata: float | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
    ):
        self.published = None if root is None else find_published(root)
        folder = root if self.published is None else str(self.published.root)
        super().__init__(folder, batch_size, num_workers, seed, range, bands, nodata, mean, std)
        if self.published is not None and (range is not None or bands is not None):
            raise DataError(f"{root}: range and bands are for files of your own")
        if not 0 < crop <= 1:
            raise DataError(f"crop={crop} must be over 0 and at most 1")
        photographs = range is None and bands is None
        self.strong = Strong(auto_augment, ra_operations, ra_magnitude, random_erasing, photographs)
        self.image_size = shapes.size if root is None else image_size
        self.scale, self.padding, self.flip, self.color_jitter = scale, padding, flip, color_jitter
        self.crop, self.val_fraction, self.split_seed = crop, val_fraction, split_seed
        self.check, self.faults, self.shapes = check, faults, shapes
        if self.published is not None:
            self.classes = self.published.classes
        else:
            self.classes = list(SHAPES) if self.root is None else find_classes(self.root)

    @property
    def class_names(self) -> list[str]:
        return self.classes

    def load(self, splits: list[str]) -> dict[str, Dataset]:
        """Find and check the files of the splits; `DataError` reports the faulty ones."""
        if self.root is None:
            lengths = {split: self.shapes.train if split == "train" else self.shapes.val for split in splits}
            strong = self.strong.steps(Reading().fill)
            strong = v2.Compose(strong) if strong else None
            return {
                split: SingleShapes(n, self.shapes.size, split, self.seed, strong if split == "train" else None)
                for split, n in lengths.items()
            }

        if self.published is not None:
            return self._load_published(self.published, splits)
        there = find_folders(self.root)
        held_out = "val" not in there
        folders = {split: there.get("train" if held_out and split == "val" else split) for split in splits}
        for split, folder in folders.items():
            if folder is None:
                hint = "; `validate` measures on the validation images" if split == "test" else ""
                raise DataError(f"{self.root}: has no folder {split}{hint}")
        faults = {folder: Faults(folder, self.root, objects=None) for folder in folders.values()}
        items = {folder: find_items(folder, self.classes, found) for folder, found in faults.items()}
        first = [file for file, _ in next(iter(items.values()))]
        reading = self.resolve_reading(first) if first else Reading()
        if self.check:
            items = {folder: check_items(items[folder], found, reading) for folder, found in faults.items()}
        tell(faults.values(), self.faults, count(sum(map(len, items.values())), "image"))
        first = [file for file, _ in next(iter(items.values()))]
        if first:
            self.measure_reading(first)
        if held_out and there.get("train") in items:
            parts = hold_out(items[there["train"]], self.val_fraction, self.split_seed)
        else:
            parts = {}
        return {split: self._dataset(parts.get(split, items[folder]), split) for split, folder in folders.items()}

    def _dataset(self, items: list[Item], split: str) -> ImageFolderDataset:
        missing = sorted(set(range(len(self.classes))) - {label for _, label in items}) if split == "train" else []
        if missing or not items:
            names = ", ".join(self.classes[label] for label in missing)
            raise DataError(f"{self.root}: no image for {split}" + (f" of {names}" if names and items else ""))
        skip = self.faults == "drop"
        return ImageFolderDataset(items, *self._handed_out(split), skip, self._reading)

    def _handed_out(self, split: str) -> tuple[v2.Transform, int, int | None]:
        """The transform of a split's images, their size, and the seed where it is random."""
        if split != "train":
            return evaluation_transform(self.image_size, self.crop), self.image_size, None
        options = (self.scale, self.flip, self.color_jitter, self.strong.steps(self._reading.fill))
        transform = training_transform(self.image_size, *options, self._reading.channels, self.padding)
        return transform, self.image_size, self.seed

    def _load_published(self, published: Published, splits: list[str]) -> dict[str, Dataset]:
        """The splits of one of torchvision's data sets; some of each class are held out where there is no "val"."""
        there = published.options
        found: dict[str, Dataset] = {}
        for split in splits:
            held_out = "val" not in there and split in ("train", "val")
            source = "train" if held_out else split
            if source not in there:
                raise DataError(f"{published.root}: {published.kind} has no images of {split}, only {', '.join(there)}")
            items = list(enumerate(published.labels(source)))
            if held_out:
                items = hold_out(items, self.val_fraction, self.split_seed)[split]
            found[split] = PublishedDataset(published, source, items, *self._handed_out(split))
        return found


def find_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits that there are; a folder of classes alone is for training."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    there = {}
    for split, names in SPLIT_NAMES.items():
        found = [root / name for name in names if (root / name).is_dir()]
        if len(found) > 1:
            raise DataError(f"{root}: which of {' and '.join(path.name for path in found)} is {split}? Keep one")
        if found:
            there[split] = found[0]
    return there or {"train": root}


def find_classes(root: Path) -> list[str]:
    """Names of the classes: the folders in `train`, or in whichever split there is, sorted."""
    folder = next(iter(find_folders(root).values()))
    names = [path.name for path in _subfolders(folder)]
    if not names:
        raise DataError(f"{folder}: expected a folder of images per class, or {root}/train and {root}/val with those")
    if len(names) == 1:
        raise DataError(f"{folder}: {names[0]} is the only class; a classifier tells two or more from each other")
    return check_names(names, str(folder))


def find_items(folder: Path, classes: list[str], faults: Faults) -> list[Item]:
    """The image files in the class folders of a split, however deep, with the indices of their classes."""
    found = find_files(folder, IMAGE_SUFFIXES)
    tell_others(folder, found)
    by_class: dict[str, list[Path]] = {path.name: [] for path in _subfolders(folder)}
    for file in found.files:
        parts = file.relative_to(folder).parts
        if len(parts) == 1:
            faults.add("image outside the class folders", faults.name(file))
        else:
            by_class[parts[0]].append(file)
    items: list[Item] = []
    for name, files in by_class.items():
        if name not in classes:
            faults.add(
                "class that is not among those to train", f"{faults.name(folder / name)}, {count(len(files), 'image')}"
            )
            continue
        if not files:
            faults.add("class without an image", faults.name(folder / name))
        label = classes.index(name)
        items += [(file, label) for file in files]
    faults.images = len(items)
    return items


def check_items(items: list[Item], faults: Faults, reading: Reading) -> list[Item]:
    """Read every image once; returns those that can be read."""
    problems = each_in_threads(lambda item: _problem(item, reading), items, "checking images")
    for (file, _), problem in zip(items, problems, strict=True):
        if problem is not None:
            faults.add("image that cannot be read", f"{faults.name(file)}, {problem}")
    return [item for item, problem in zip(items, problems, strict=True) if problem is None]


def hold_out(items: list[Item], fraction: float, seed: int) -> dict[str, list[Item]]:
    """The same share of each class for validation, drawn by the seed; classes of one image are for training alone."""
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item[1], []).append(item)
    parts: dict[str, list[Item]] = {"train": [], "val": []}
    for label, same in by_class.items():
        train, val = held_out(len(same), fraction, seed, label)
        parts["train"] += [same[i] for i in train]
        parts["val"] += [same[i] for i in val]
    return parts


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name not in JUNK
    )


def _problem(item: Item, reading: Reading) -> str | None:
    try:
        reading.read(item[0])
    except UNREADABLE as error:
        return str(error)
    return None
