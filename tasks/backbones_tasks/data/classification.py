"""Images in a folder per class, or single shapes drawn on the fly, for training classifiers."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .faults import Faults, count, tell
from .folders import DataError
from .images import IMAGE_SUFFIXES, UNREADABLE, each_in_threads, read_image
from .loading import DataModule, held_out, jitter, seeded
from .segmentation import PAD_COLOUR, ShapesOptions
from .shapes import SHAPES, draw_scene

SPLITS = ("train", "val", "test")

Item = tuple[Path, int]


class ImageFolderDataset(Dataset):
    """Files and classes as (image, class): (3, size, size) float32 in [0, 1] and an int64 scalar.

    Args:
        items: files and the indices of their classes
        transform: from an image (3, H, W) uint8 to one of `size` x `size`
        size: side of the images handed out
        seed: with it the transform draws anew in each epoch, and indices are the (epoch, index) pairs of
            `EpochSampler`; None for validation
        skip: what cannot be read is named in a warning, and the next image is handed out in its place; else it is an
            error
    """

    def __init__(
        self, items: list[Item], transform: v2.Transform, size: int, seed: int | None = None, skip: bool = False
    ):
        self.items, self.transform, self.seed, self.skip = items, transform, seed, skip
        self.sizes = [(size, size)] * len(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self._read(index)
        pixels = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        if self.seed is None:
            pixels = self.transform(pixels)
        else:
            with seeded(self.seed, epoch, index):
                pixels = self.transform(pixels)
        return pixels.as_subclass(torch.Tensor).float() / 255, torch.tensor(label)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if index >= len(self):
            raise IndexError(index)  # which ends an iteration
        for step in range(len(self)):
            file, label = self.items[(index + step) % len(self)]
            try:
                return read_image(file), label
            except UNREADABLE as error:
                message = f"{file}: cannot be read: {error}"
                if not self.skip:
                    raise DataError(f"{message}; mend it, or leave such files out: --data.faults drop") from error
                warnings.warn(f"{message}; the next image takes its place", stacklevel=2)
        raise DataError(f"none of {len(self)} images can be read, {self.items[0][0]} among them")


class SingleShapes(Dataset):
    """Pictures of one shape each as (image, class), like `ImageFolderDataset`; each split has seeds of its own."""

    def __init__(self, length: int, size: int, split: str, seed: int = 0, transform: v2.Transform | None = None):
        self.length, self.size, self.seed = length, size, (seed, SPLITS.index(split))
        self.transform = transform
        self.sizes = [(size, size)] * length

    def __len__(self) -> int:
        return self.length

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
    size: int, scale: tuple[float, float], flip: float, color_jitter: float, strong: Sequence[v2.Transform] = ()
) -> v2.Transform:
    """A random part of the image, resized to `size` x `size`, horizontal flip, colour jitter, and `strong` at last."""
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(flip),
    ]
    return v2.Compose([*steps, *jitter(color_jitter), *strong])


def strong_augmentation(policy: str | None, operations: int, magnitude: int, erasing: float) -> list[v2.Transform]:
    """RandAugment or TrivialAugment, where asked for, and random erasing; `ClassificationData` tells the options."""
    steps: list[v2.Transform] = []
    common = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": list(PAD_COLOUR)}
    if policy == "randaugment":
        steps.append(v2.RandAugment(operations, magnitude, **common))
    elif policy == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(**common))
    if erasing:
        steps.append(v2.RandomErasing(erasing, value=list(PAD_COLOUR)))
    return steps


def evaluation_transform(size: int, crop: float) -> v2.Transform:
    """The middle `crop` of the image's shorter side, resized to `size` x `size`."""
    resize = v2.Resize(round(size / crop), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size)])


class ClassificationData(DataModule):
    """Images in a folder per class, or drawn shapes where no root is given.

    Args:
        root: a folder with `train/CLASS/*.jpg` and `val/CLASS/*.jpg` and, for testing, `test/CLASS/*.jpg`; without
            `val`, some images of each class are held out. Or a folder with a folder per class. Classes are the names of
            the folders, sorted
        batch_size: images per step and device
        image_size: side in pixels of the images handed out
        scale: range of the random training crop's share of the image's area
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
        seed: decides the order, the augmentation and the drawn shapes
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        image_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        color_jitter: float = 0.3,
        auto_augment: Literal["randaugment", "trivialaugment"] | None = None,
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
        seed: int = 0,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        if not 0 < crop <= 1:
            raise DataError(f"crop={crop} must be over 0 and at most 1")
        if ra_operations < 1 or not 0 <= ra_magnitude <= 30:
            raise DataError(
                f"ra_operations={ra_operations} must be at least 1, and ra_magnitude={ra_magnitude} from 0 to 30"
            )
        if not 0 <= random_erasing <= 1:
            raise DataError(f"random_erasing={random_erasing} must be from 0 to 1")
        self.image_size = shapes.size if root is None else image_size
        self.scale, self.flip, self.color_jitter = scale, flip, color_jitter
        self.strong = strong_augmentation(auto_augment, ra_operations, ra_magnitude, random_erasing)
        self.crop, self.val_fraction, self.split_seed = crop, val_fraction, split_seed
        self.check, self.faults, self.shapes = check, faults, shapes
        self.classes = list(SHAPES) if self.root is None else find_classes(self.root)

    @property
    def class_names(self) -> list[str]:
        return self.classes

    def load(self, splits: list[str]) -> dict[str, Dataset]:
        """Find and check the files of the splits; `DataError` reports the faulty ones."""
        if self.root is None:
            lengths = {split: self.shapes.train if split == "train" else self.shapes.val for split in splits}
            strong = v2.Compose(self.strong) if self.strong else None
            return {
                split: SingleShapes(n, self.shapes.size, split, self.seed, strong if split == "train" else None)
                for split, n in lengths.items()
            }

        there = find_folders(self.root)
        held_out = "val" not in there
        folders = {split: there.get("train" if held_out and split == "val" else split) for split in splits}
        for split, folder in folders.items():
            if folder is None:
                hint = "; `validate` measures on the validation images" if split == "test" else ""
                raise DataError(f"{self.root}: has no folder {split}{hint}")
        faults = {folder: Faults(folder, self.root, objects=None) for folder in folders.values()}
        items = {folder: find_items(folder, self.classes, found) for folder, found in faults.items()}
        if self.check:
            items = {folder: check_items(items[folder], found) for folder, found in faults.items()}
        tell(faults.values(), self.faults, count(sum(map(len, items.values())), "image"))
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
        if split == "train":
            transform = training_transform(self.image_size, self.scale, self.flip, self.color_jitter, self.strong)
            return ImageFolderDataset(items, transform, self.image_size, self.seed, skip)
        return ImageFolderDataset(items, evaluation_transform(self.image_size, self.crop), self.image_size, skip=skip)


def find_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits that there are; a folder of classes alone is for training."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    there = {split: root / split for split in SPLITS if (root / split).is_dir()}
    return there or {"train": root}


def find_classes(root: Path) -> list[str]:
    """Names of the classes: the folders in `train`, or in whichever split there is, sorted."""
    folder = next(iter(find_folders(root).values()))
    names = [path.name for path in _subfolders(folder)]
    if not names:
        raise DataError(f"{folder}: expected a folder of images per class, or {root}/train and {root}/val with those")
    return names


def find_items(folder: Path, classes: list[str], faults: Faults) -> list[Item]:
    """The image files in the class folders of a split, however deep, with the indices of their classes."""
    for file in sorted(folder.iterdir()):
        if _is_image(file):
            faults.add("image outside the class folders", faults.name(file))
    items: list[Item] = []
    for path in _subfolders(folder):
        files = sorted(file for file in path.rglob("*") if _is_image(file))
        if path.name not in classes:
            faults.add("class that is not among those to train", f"{faults.name(path)}, {count(len(files), 'image')}")
            continue
        if not files:
            faults.add("class without an image", faults.name(path))
        label = classes.index(path.name)
        items += [(file, label) for file in files]
    faults.images = len(items)
    return items


def check_items(items: list[Item], faults: Faults) -> list[Item]:
    """Read every image once; returns those that can be read."""
    problems = each_in_threads(_problem, items, "checking images")
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
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _problem(item: Item) -> str | None:
    try:
        read_image(item[0])
    except UNREADABLE as error:
        return str(error)
    return None
