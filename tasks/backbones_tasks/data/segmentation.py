"""Images and masks for training: from folders, or drawn on the fly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .folders import Classes, DataError, Pair, check_pairs, read_classes, read_pair_mask
from .images import UNREADABLE, each_in_threads
from .layouts import find_layout, find_pairs
from .loading import DataModule, jitter, seeded
from .reading import Bands, Range, Reading, to_unit
from .shapes import CLASSES as SHAPE_CLASSES
from .shapes import draw_scene
from .strong import Policy, Strong


@dataclass
class ShapesOptions:
    """The data set drawn on the fly.

    size: side of the pictures in pixels. train: pictures per epoch, new ones in every epoch. val: pictures to
    validate on, always the same; `test` draws as many others.
    """

    size: int = 96
    train: int = 800
    val: int = 100


class FolderDataset(Dataset):
    """Pairs from disk as (image, mask): (C, H, W) float32 in [0, 1] and (H, W) int64 class indices.

    With `augment`, indices are the (epoch, index) pairs of `EpochSampler`.
    """

    def __init__(
        self,
        pairs: list[Pair],
        classes: Classes,
        augment: v2.Transform | None = None,
        seed: int = 0,
        reading: Reading = Reading(),  # noqa: B008  (never changed)
    ):
        self.pairs, self.classes, self.augment, self.seed, self.reading = pairs, classes, augment, seed, reading
        # unchecked images have no known size: each gets a batch to itself
        self.sizes = [pair.size or (index, -1) for index, pair in enumerate(pairs)]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def files(self) -> list[Path]:
        return [pair.image for pair in self.pairs]

    def name(self, index: int) -> str:
        """What a sample is called, for people."""
        return str(self.pairs[index].image)

    def mask(self, index: int) -> np.ndarray:
        """The class indices (H, W) of a pair, as they are on disk."""
        pair = self.pairs[index]
        try:
            indices = self.classes.indices(read_pair_mask(pair, self.classes))
        except UNREADABLE as error:
            raise DataError(f"{pair.mask}: cannot be read: {error}") from error
        if (indices < 0).any():
            raise DataError(f"{pair.mask}: no rule covers the class values of {(indices < 0).mean():.2%} of its pixels")
        return indices

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pair = self.pairs[index]
        try:
            image = tv_tensors.Image(self.reading.tensor(pair.image))
        except UNREADABLE as error:
            raise DataError(f"{pair.image}: cannot be read: {error}") from error
        mask = tv_tensors.Mask(torch.from_numpy(self.mask(index)))
        if image.shape[-2:] != mask.shape[-2:]:
            raise DataError(f"{pair.mask}: is {tuple(mask.shape)}, its image {tuple(image.shape[-2:])} (height, width)")
        if self.augment is not None:
            with seeded(self.seed, epoch, index):
                image, mask = self.augment(image, mask)
        return to_unit(image), mask.as_subclass(torch.Tensor).long()


class ShapesDataset(Dataset):
    """Scenes of `shapes.draw_scene` as (image, mask), like `FolderDataset`; each split has seeds of its own."""

    def __init__(self, length: int, size: int, split: str, seed: int = 0, augment: v2.Transform | None = None):
        self.augment = augment
        self.length, self.size, self.seed = length, size, (seed, ("train", "val", "test").index(split))
        self.sizes = [(size, size)] * length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """What a sample is called, for people."""
        return f"drawn shapes {index}"

    def mask(self, index: int) -> np.ndarray:
        """The class indices (H, W) of a scene of the first epoch."""
        return draw_scene((*self.seed, 0, index), self.size).mask

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(key, tuple):
            key = (0, key)
        scene = draw_scene((*self.seed, *key), self.size)
        image = tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(scene.mask))
        if self.augment is not None:
            with seeded(*self.seed, *key):
                image, mask = self.augment(image, mask)
        return to_unit(image), mask.as_subclass(torch.Tensor).long()


class RandomScale(v2.Transform):
    """Resize by a factor drawn log-uniformly from `scale`."""

    def __init__(self, scale: tuple[float, float]):
        super().__init__()
        self.scale = scale

    def make_params(self, flat_inputs: list) -> dict:
        low, high = np.log(self.scale)
        factor = float(np.exp(low + (high - low) * torch.rand(()).item()))
        return {"size": [max(1, round(side * factor)) for side in v2.functional.get_size(flat_inputs[0])]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.resize, inpt, size=params["size"], antialias=True)


def augmentation(
    crop_size: int | tuple[int, int],
    scale: tuple[float, float],
    flip: float,
    color_jitter: float,
    ignore_index: int,
    reading: Reading = Reading(),  # noqa: B008  (never changed)
    strong: Strong = Strong(),  # noqa: B008  (never changed)
) -> v2.Transform:
    """Random scale, crop (padded where the image is smaller), horizontal flip, colour jitter, and `strong`."""
    steps: list[v2.Transform] = [
        RandomScale(scale),
        v2.RandomCrop(
            crop_size, pad_if_needed=True, fill={tv_tensors.Image: reading.fill, tv_tensors.Mask: ignore_index}
        ),
        v2.RandomHorizontalFlip(flip),
    ]
    return v2.Compose([*steps, *jitter(color_jitter, reading.channels), *strong.steps(reading.fill, ignore_index)])


class SegmentationData(DataModule):
    """Images and masks from a folder, or drawn shapes where none is given.

    Args:
        root: a folder with `images/train`, `labels/train`, `images/val`, `labels/val` and, for testing,
            `images/test`, `labels/test`; or with `images` and `masks` alone. Masks are PNGs of class values or of
            colours. `classes.json` in it says what they mean: "classes" are names; "values" the mask value of each, or
            a list of several, by default 0, 1, 2, ...; or "colours", [red, green, blue] of each; "ignore_index" the
            value, values or colours that neither train nor count. Or the folder of ADE20K (ADEChallengeData2016),
            Cityscapes (leftImg8bit, gtFine) or Pascal VOC (VOC2012) as published, whose classes are known
        layout: which of these it is; what its folders tell unless given
        classes: names of the mask values 0, 1, 2, ..., in place of `classes.json` or of what was published
        ignore_index: a mask value, or several, that neither train nor count
        batch_size: images per step and device
        crop_size: side in pixels of the random training crops, or their height and width
        scale: range of the random resize before the crop
        flip: probability of a horizontal flip
        color_jitter: strength of the random brightness, contrast and saturation; a quarter of it for hue; 0 is off
        auto_augment: "randaugment" draws `ra_operations` of fourteen changes of geometry and colour, each at
            `ra_magnitude`; "trivialaugment" one, at a magnitude drawn as well; masks follow. Of shapes, too
        ra_operations: of RandAugment, for each image
        ra_magnitude: of RandAugment, from 0 to 30
        random_erasing: probability that a random rectangle is painted over, whose pixels then do not count
        val_fraction: share of the images held out where there is no `images/val`
        split_seed: decides which ones
        num_workers: processes that prepare batches; by default none for shapes, else one per core but at most 8
        check: read every file before training starts and name the faulty ones
        shapes: the data set that is drawn where no root is given
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
        layout: Literal["folders", "ade20k", "cityscapes", "voc"] | None = None,
        classes: list[str] | None = None,
        ignore_index: int | list[int] | None = None,
        batch_size: int = 8,
        crop_size: int | tuple[int, int] = 320,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        color_jitter: float = 0.3,
        auto_augment: Policy | None = None,
        ra_operations: int = 2,
        ra_magnitude: int = 9,
        random_erasing: float = 0.0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int | None = None,
        check: bool = True,
        shapes: ShapesOptions = ShapesOptions(),  # noqa: B008  (never changed)
        range: Range | None = None,
        bands: Bands | None = None,
        nodata: float | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
    ):
        super().__init__(root, batch_size, num_workers, seed, range, bands, nodata, mean, std)
        self.check, self.shapes = check, shapes
        self.crop_size, self.scale, self.flip, self.color_jitter = crop_size, scale, flip, color_jitter
        photographs = range is None and bands is None
        self.strong = Strong(auto_augment, ra_operations, ra_magnitude, random_erasing, photographs)
        self.val_fraction, self.split_seed = val_fraction, split_seed
        if self.root is None:
            self.classes = Classes.make(SHAPE_CLASSES)
        else:
            self.layout = find_layout(self.root, layout)
            published = self.layout.classes(ignore_index)
            self.classes = read_classes(self.layout.root, classes, ignore_index, published)

    @property
    def class_names(self) -> list[str]:
        return list(self.classes.names)

    @property
    def ignore_index(self) -> int:
        return self.classes.ignore_index

    def count_pixels(self, split: str) -> torch.Tensor:
        """How many pixels of a split are of each class; of a single one, how many are not and are of it."""
        dataset, outcomes = self.datasets[split], max(2, self.num_classes)

        def count(index: int) -> np.ndarray:
            return np.bincount(dataset.mask(index).ravel(), minlength=outcomes)[:outcomes]

        counts = each_in_threads(count, range(len(dataset)), "counting pixels")
        return torch.from_numpy(sum(counts, np.zeros(outcomes, dtype=np.int64)))

    def load(self, splits: list[str]) -> dict[str, Dataset]:
        """Find, pair and check the files of the splits; `DataError` names the faulty ones."""
        if self.root is None:
            lengths = {split: self.shapes.train if split == "train" else self.shapes.val for split in splits}
            strong = self.strong.steps(Reading().fill, self.ignore_index)
            augment = v2.Compose(strong) if strong else None
            return {
                split: ShapesDataset(n, self.shapes.size, split, self.seed, augment if split == "train" else None)
                for split, n in lengths.items()
            }

        found, problems = {}, []
        for split in splits:
            found[split], more = find_pairs(self.layout, split, self.val_fraction, self.split_seed)
            problems += [problem for problem in more if problem not in problems]
        every = [pair for split in splits for pair in found[split]]
        reading = self.resolve_reading([pair.image for pair in found.get("train") or every])
        if self.check:
            checked = check_pairs(every, problems, self.classes, self.layout.root, reading)
            checked = dict(zip(every, checked, strict=True))
            found = {split: [checked[pair] for pair in pairs] for split, pairs in found.items()}
        reading = self.measure_reading([pair.image for pair in found.get("train") or every])
        augment = augmentation(
            self.crop_size, self.scale, self.flip, self.color_jitter, self.ignore_index, reading, self.strong
        )
        return {
            split: FolderDataset(pairs, self.classes, augment if split == "train" else None, self.seed, reading)
            for split, pairs in found.items()
        }
