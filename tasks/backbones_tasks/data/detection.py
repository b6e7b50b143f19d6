"""Images, boxes and masks for training detectors: from COCO's or Pascal VOC's formats, or drawn on the fly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from . import rle
from .coco import CocoFiles, CocoFolder
from .faults import Faults, Policy, count, tell
from .folders import DataError
from .images import UNREADABLE
from .loading import AspectRatioBatches, DataModule, EpochSampler, held_out, seeded
from .objects import Target, detection_augmentation, paste, sanitize, strong_steps, with_areas
from .reading import Bands, Range, Reading, to_unit
from .samples import Sample, check_images, ground_truth
from .segmentation import ShapesOptions
from .shapes import CLASSES as SHAPE_CLASSES
from .shapes import Scene, draw_scene
from .strong import Policy as StrongPolicy
from .strong import Strong
from .voc import FlatFolder, VocFolder
from .yolo import YoloFolder

Categories = Mapping[int, tuple[int, str]]


class ObjectsDataset(Dataset):
    """Images with objects as (image, target): (C, H, W) float32 in [0, 1] and what torchvision's detectors train on.

    A target has boxes (N, 4) float32 as (x0, y0, x1, y1), labels (N,) from 1, image_id, area (N,), iscrowd (N,), and
    masks (N, H, W) uint8 if there are some. With `augment`, indices are the (epoch, index) pairs of `EpochSampler`.

    Args:
        seeds: of the augmentation, with the epoch and the index
    """

    #: of images and targets, drawn anew in each epoch
    augment: v2.Transform | None = None
    #: probability that objects of another image, augmented likewise, are pasted
    copy_paste = 0.0
    #: whether masks are handed out, or are there for pasting alone
    with_masks = True

    def __init__(self, *seeds: int):
        self.seeds = seeds

    def read(self, epoch: int, index: int) -> tuple[tv_tensors.Image, Target]:
        """An image of 8 bits, or in [0, 1], and its target, as they are."""
        raise NotImplementedError

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, Target]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self.read(epoch, index)
        if self.augment is not None:
            with seeded(*self.seeds, epoch, index):
                image, target = self.augment(image, target)
                if self.copy_paste and torch.rand(()) < self.copy_paste:
                    other = int(torch.randint(len(self), ()))
                    image, target = paste(image, target, *self.augment(*self.read(epoch, other)))
            target = with_areas(target)
        if not self.with_masks:
            target.pop("masks", None)
        return to_unit(image), _plain(target)


class DetectionDataset(ObjectsDataset):
    """Samples of annotated images; crowds are in `coco()` alone."""

    def __init__(
        self,
        samples: list[Sample],
        categories: Categories,
        augment: v2.Transform | None = None,
        seed: int = 0,
        reading: Reading = Reading(),  # noqa: B008  (never changed)
    ):
        super().__init__(seed)
        self.samples, self.categories, self.augment = samples, categories, augment
        self.reading = reading
        self.sizes = [sample.size for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """What a sample is called, for people."""
        return str(self.samples[index].file)

    def read(self, epoch: int, index: int) -> tuple[tv_tensors.Image, Target]:
        sample = self.samples[index]
        return tv_tensors.Image(_read(sample, self.reading)), sample.target()

    @property
    def files(self) -> list[Path]:
        return [sample.file for sample in self.samples]

    def coco(self) -> dict[str, Any]:
        """The truth about all images in COCO's format, crowds included, for `CocoEvaluation`."""
        return ground_truth(self.samples, self.categories)


class DetectionShapes(ObjectsDataset):
    """Scenes of `shapes.draw_scene`; each split has seeds of its own."""

    def __init__(self, length: int, size: int, split: str, masks: bool = False, seed: int = 0):
        super().__init__(seed, ("train", "val", "test").index(split))
        self.length, self.size, self.masks = length, size, masks
        self.categories = {label: (label, name) for label, name in enumerate(SHAPE_CLASSES) if label}
        self.sizes = [(size, size)] * length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """What a sample is called, for people."""
        return f"drawn shapes {index}"

    def read(self, epoch: int, index: int) -> tuple[tv_tensors.Image, Target]:
        scene = self._scene(epoch, index)
        image = tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1))
        return image, self._sample(scene, index).target()

    def coco(self) -> dict[str, Any]:
        """The truth about all images as they are drawn for validation, in COCO's format."""
        return ground_truth((self._sample(self._scene(0, i), i) for i in range(len(self))), self.categories)

    def _scene(self, epoch: int, index: int) -> Scene:
        return draw_scene((*self.seeds, epoch, index), self.size)

    def _sample(self, scene: Scene, index: int) -> Sample:
        corners = scene.boxes.astype(np.float64)
        return Sample(
            file=None,
            image_id=index + 1,
            size=(self.size, self.size),
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            labels=scene.labels.astype(np.int64),
            areas=scene.masks.sum((1, 2)).astype(np.float64),
            crowd=np.zeros(len(scene.labels), dtype=bool),
            masks=rle.encode_array(scene.masks) if self.masks else None,
        )


class DetectionData(DataModule):
    """Images with boxes and masks from a folder, or drawn shapes where none is given.

    Batches are a list of images and a list of targets, as torchvision's detectors take them.

    Args:
        root: a folder with annotations in COCO's format, such as `annotations/instances_train2017.json` or
            `instances_train.json`, beside folders of images such as `train2017`, `train` or `images`; or one in the
            layout of Pascal VOC, with `JPEGImages`, `Annotations` and `ImageSets/Main`; or one with YOLO's `data.yaml`,
            images and labels; or images with VOC's XML beside them, as labelImg writes it, in folders `train` and `val`
            or in one
        train: annotations and images of the training split in COCO's format, relative to root, where they are not
            found by themselves
        val: the same of the validation split
        test: the same of the test split
        classes: the classes to learn, in this order; objects of others are left out. By default all
        masks: read the masks too, for mask_rcnn
        batch_size: images per step and device
        crop_size: side in pixels of the random training crops, into which an image just fits at scale 1; None trains
            on whole images, those of similar shape together
        scale: range of the random resize before the crop; [0.1, 2.0] is what is called large-scale jitter
        flip: probability of a horizontal flip
        color_jitter: strength of the random brightness, contrast and saturation; a quarter of it for hue; 0 is off
        auto_augment: "randaugment" draws `ra_operations` of fourteen changes of geometry and colour, each at
            `ra_magnitude`; "trivialaugment" one, at a magnitude drawn as well; boxes and masks follow. Of shapes, too
        ra_operations: of RandAugment, for each image
        ra_magnitude: of RandAugment, from 0 to 30
        random_erasing: probability that a random rectangle is painted over, with what masks and boxes have there
        copy_paste: probability that some objects of another image are pasted, by their masks, which then have to be
            annotated, onto a crop
        val_fraction: share of the training images held out where there is no validation split
        split_seed: decides which ones
        num_workers: processes that prepare batches; by default none for shapes, else one per core but at most 8
        check: read every image before training starts; the annotations are always checked
        faults: what becomes of faulty images and annotations, which one report names. "clip" cuts boxes at the image's
            edge and leaves broken polygons out of objects that have others; what cannot be repaired stops everything.
            "drop" repairs, too, and leaves out what cannot be. With "fatal" any fault stops everything
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
        train: CocoFiles | None = None,
        val: CocoFiles | None = None,
        test: CocoFiles | None = None,
        classes: list[str] | None = None,
        masks: bool = False,
        batch_size: int = 4,
        crop_size: int | None = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        color_jitter: float = 0.3,
        auto_augment: StrongPolicy | None = None,
        ra_operations: int = 2,
        ra_magnitude: int = 9,
        random_erasing: float = 0.0,
        copy_paste: float = 0.0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int | None = None,
        check: bool = True,
        faults: Policy = "clip",
        shapes: ShapesOptions = ShapesOptions(),  # noqa: B008  (never changed)
        range: Range | None = None,
        bands: Bands | None = None,
        nodata: float | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
    ):
        super().__init__(root, batch_size, num_workers, seed, range, bands, nodata, mean, std)
        self.masks, self.check, self.faults, self.shapes = masks, check, faults, shapes
        self.crop_size, self.scale, self.flip, self.color_jitter = crop_size, scale, flip, color_jitter
        photographs = range is None and bands is None
        self.strong = Strong(auto_augment, ra_operations, ra_magnitude, random_erasing, photographs)
        self.copy_paste = copy_paste
        if copy_paste and crop_size is None:
            raise DataError("copy_paste pastes onto crops of one size: give crop_size")
        self.val_fraction, self.split_seed = val_fraction, split_seed
        files = {"train": train, "val": val, "test": test}
        files = {split: where for split, where in files.items() if where is not None}
        if self.root is None and (files or classes):
            raise DataError("--data.train, val, test and classes are relative to a folder: give --data.root as well")
        self.folder = None if self.root is None else _open(self.root, files, classes)

    @property
    def class_names(self) -> list[str]:
        """Names by label; the first is the background."""
        return list(SHAPE_CLASSES) if self.folder is None else [SHAPE_CLASSES[0], *self.folder.classes]

    @property
    def image_size(self) -> int | None:
        """Longer side of an image at scale 1, if training images are brought to one; drawn ones are as drawn."""
        return self.shapes.size if self.folder is None else self.crop_size

    def load(self, splits: list[str]) -> dict[str, Dataset]:
        """Find and check the images and annotations of the splits; `DataError` reports the faulty ones."""
        if self.folder is None:
            lengths = {split: self.shapes.train if split == "train" else self.shapes.val for split in splits}
            masks = self.masks or bool(self.copy_paste)
            datasets = {
                split: DetectionShapes(length, self.shapes.size, split, masks, self.seed)
                for split, length in lengths.items()
            }
            strong = strong_steps(self.strong, Reading())
            augment = v2.Compose([*strong, sanitize()]) if strong or self.copy_paste else None
            return self._augmented(datasets, augment)

        there = self.folder.splits
        held_out = "val" not in there and "test" not in splits
        for split in ["train"] if held_out else splits:
            if split not in there:
                hint = "; `validate` measures on the validation images" if split == "test" else ""
                raise DataError(f"{self.root}: has no {split} split, only {', '.join(sorted(there))}{hint}")
        found = {
            split: self.folder.read(split, self.masks or (split == "train" and bool(self.copy_paste)))
            for split in (["train"] if held_out else splits)
        }
        files = [sample.file for sample in next(iter(found.values()))[0]]
        reading = self.resolve_reading(files) if files else Reading()
        datasets, faults = {}, []
        for split, (samples, categories, problems) in found.items():
            if self.check:
                samples = check_images(samples, problems, reading)
            faults.append((problems, samples))
            datasets[split] = DetectionDataset(samples, categories, seed=self.seed)
        self._tell(faults)
        reading = self.measure_reading(next(iter(datasets.values())).files)
        if held_out:
            datasets = self._hold_out(datasets["train"])
        for split in splits:
            datasets[split].reading = reading
            _check_objects(datasets[split], split, self.root)
        augment = detection_augmentation(self.crop_size, self.scale, self.flip, self.color_jitter, reading, self.strong)
        return self._augmented({split: datasets[split] for split in splits}, augment)

    def _augmented(self, datasets: dict[str, ObjectsDataset], augment: v2.Transform | None) -> dict[str, Dataset]:
        """The data sets of the splits, of which the one for training is augmented."""
        for dataset in datasets.values():
            dataset.with_masks = self.masks
        if "train" in datasets:
            datasets["train"].augment, datasets["train"].copy_paste = augment, self.copy_paste
        return {**datasets}

    def train_dataloader(self) -> DataLoader:
        if self.crop_size is not None or self.folder is None:
            return super().train_dataloader()
        dataset = self.datasets["train"]
        sampler = EpochSampler(len(dataset), self.seed, *self.rank())
        return self.loader(dataset, batch_sampler=AspectRatioBatches(sampler, dataset.sizes, self.batch_size))

    def loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        return super().loader(dataset, collate_fn=collate, **options)

    def _tell(self, faults: list[tuple[Faults, list[Sample]]]) -> None:
        images = sum(len(samples) for _, samples in faults)
        objects = sum(len(sample.labels) for _, samples in faults for sample in samples)
        left = f"{count(images, 'image')} with {count(objects, 'object')}"
        tell((found for found, _ in faults), self.faults, left)
        for found, samples in faults:
            if not samples:
                raise DataError(f"{found.source}: no image is left")

    def _hold_out(self, dataset: DetectionDataset) -> dict[str, DetectionDataset]:
        if len(dataset) < 2:
            raise DataError(f"{self.root}: has no validation split, and too few images to hold some out")
        train, val = held_out(len(dataset), self.val_fraction, self.split_seed)
        return {
            split: DetectionDataset([dataset.samples[i] for i in indices], dataset.categories, seed=self.seed)
            for split, indices in (("train", train), ("val", val))
        }


def collate(batch: list[tuple[torch.Tensor, Target]]) -> tuple[list[torch.Tensor], list[Target]]:
    """A list of images and a list of targets."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _check_objects(dataset: DetectionDataset, split: str, root: Path) -> None:
    """Refuse a split without an object, on which there is nothing to learn, or a score would be no number."""
    if all(sample.crowd.all() for sample in dataset.samples):
        of_images = f"{count(len(dataset), 'image')} of {split}"
        raise DataError(
            f"{root}: there is no object in the {of_images}"
            + ("; another --data.split_seed holds out others" if split == "val" else "")
        )


def _open(
    root: Path, files: dict[str, CocoFiles], classes: list[str] | None
) -> CocoFolder | VocFolder | FlatFolder | YoloFolder:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    if not files:
        if (root / "JPEGImages").is_dir() and (root / "Annotations").is_dir():
            return VocFolder(root, classes)
        if YoloFolder.fits(root):
            return YoloFolder(root, classes)
    folder = CocoFolder(root, files, classes)
    if {"train", "val", "test"} & folder.splits:
        return folder
    if FlatFolder.fits(root):
        return FlatFolder(root, classes)
    raise DataError(
        f"{root}: expected annotations/instances_train*.json or instances_train.json in COCO's format, Pascal VOC's "
        "folders JPEGImages and Annotations, YOLO's data.yaml, or images with an XML file beside each; other places of "
        "COCO's files can be given as --data.train.annotations FILE --data.train.images FOLDER, and so for val"
    )


def _read(sample: Sample, reading: Reading) -> torch.Tensor:
    try:
        image = reading.tensor(sample.file)
    except UNREADABLE as error:
        raise DataError(f"{sample.file}: cannot be read: {error}") from error
    size = tuple(image.shape[-2:])
    if size != sample.size:
        raise DataError(f"{sample.file}: is {size[0]} x {size[1]}, listed as {sample.size} (height, width)")
    return image


def _plain(target: Target) -> Target:
    return {name: v.as_subclass(torch.Tensor) if torch.is_tensor(v) else v for name, v in target.items()}
