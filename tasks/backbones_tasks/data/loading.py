"""What the data of every task share: order, seeds, batches and loaders."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from .faults import tell_shared
from .folders import DataError
from .images import UNREADABLE, decode
from .reading import Bands, Range, Reading, doubts, statistics


def mix(*numbers: int) -> int:
    """One seed from several numbers; neighbours give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def held_out(number: int, fraction: float, *seed: int) -> tuple[list[int], list[int]]:
    """Which of `number` items are for training and which, a `fraction` but never none or all, for validation."""
    order = np.random.default_rng(seed).permutation(number)
    count = min(max(1, round(fraction * number)), number - 1)
    return sorted(order[count:]), sorted(order[:count])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Transforms draw from torch's global generator: within, from a seed of their own, and it is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix(*numbers))
        yield


class BandJitter(v2.Transform):
    """Random brightness and contrast of an image of any number of bands, the same for all of them."""

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs: list) -> dict:
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        return {name: low + (high - low) * torch.rand(()).item() for name in ("brightness", "contrast")}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        values = inpt.as_subclass(torch.Tensor).float() * params["brightness"]
        mean = values.mean()
        values = mean + (values - mean) * params["contrast"]
        white = 1.0 if inpt.is_floating_point() else 255.0
        return tv_tensors.wrap(values.clamp(0, white).to(inpt.dtype), like=inpt)


def jitter(strength: float, channels: int = 3) -> list[v2.Transform]:
    """Random brightness, contrast and saturation, and a quarter of it for hue; nothing at 0."""
    if not strength:
        return []
    if channels != 3:
        return [BandJitter(strength)]
    return [v2.ColorJitter(strength, strength, strength, hue=min(0.5, strength / 4))]


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) pairs in an order that the seed and the epoch alone decide, dealt out over the ranks.

    Carrying the epoch to the data set makes augmentation a function of (seed, epoch, index): the same for any number
    of workers, and the same after a resume.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length, self.seed, self.rank, self.world_size, self.epoch = length, seed, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this as each epoch begins, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        order = np.resize(order, len(self) * self.world_size)  # repeats a few, so that all ranks get equally many
        return ((self.epoch, int(i)) for i in order[self.rank :: self.world_size])


class EqualSizeBatches(Sampler[list[int]]):
    """Batches of indices whose images have one size, so that they can be validated whole; dealt out over the ranks."""

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, rank: int = 0, world_size: int = 1):
        if len(sizes) < world_size:
            raise DataError(f"{len(sizes)} images for {world_size} processes: give one per process, or use fewer")
        batch_size = min(batch_size, len(sizes) // world_size)  # so that no process is without a batch
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            by_size.setdefault(size, []).append(index)
        batches = [same[i : i + batch_size] for same in by_size.values() for i in range(0, len(same), batch_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class AspectRatioBatches(Sampler[list[tuple[int, int]]]):
    """Batches of what a sampler draws whose images are of similar shape, so that they pad little.

    Every process gets equally many batches, whatever the images are like. The few images that are left over at the
    end are batched by shape as well as can be.

    Args:
        sampler: of the (epoch, index) pairs; Lightning tells it the epoch.
        sizes: (height, width) of each image.
        batch_size: of all batches, unless there are fewer images than that.
    """

    def __init__(self, sampler: EpochSampler, sizes: Sequence[tuple[int, int]], batch_size: int):
        self.sampler, self.batch_size = sampler, min(batch_size, len(sampler))
        self.ratios = [width / height for height, width in sizes]

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        for key in self.sampler:
            group = round(2 * math.log2(self.ratios[key[1]]))  # 1:1, 4:3 with 3:2, 16:9 with 2:1, ...
            batch = waiting.setdefault(group, [])
            batch.append(key)
            if len(batch) == self.batch_size:
                yield waiting.pop(group)
        rest = [key for batch in waiting.values() for key in batch]
        rest = rest[: len(rest) // self.batch_size * self.batch_size]
        rest.sort(key=lambda key: self.ratios[key[1]])
        for i in range(0, len(rest), self.batch_size):
            yield rest[i : i + self.batch_size]


class DataModule(LightningDataModule):
    """The data sets of a task by split, and their loaders, the same for any number of workers and processes.

    A task's data derive from it, know `class_names` from the start, and say in `load` what the splits hold. A data
    set says in `sizes` the (height, width) of each image as it hands them out for validation.

    Args:
        root: the folder of the data; None for what is drawn
        batch_size: images per step and device
        num_workers: processes that prepare batches; by default none for what is drawn, else one per core but at most 8
        seed: decides the order and the augmentation
        range, bands, nodata, mean, std: how images are read, see `Reading`; `bands` may be "all"
    """

    def __init__(
        self,
        root: str | None,
        batch_size: int,
        num_workers: int | None,
        seed: int,
        range: Range | None = None,
        bands: Bands | None = None,
        nodata: float | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ):
        super().__init__()
        if root is None and (range is not None or bands is not None):
            raise DataError("--data.range and --data.bands say how files are read: give --data.root as well")
        self._told = {"range": range, "bands": bands, "nodata": nodata, "mean": mean, "std": std}
        self._reading: Reading | None = None
        if bands == "all":
            Reading(range, None, nodata)  # what can be checked before any file is seen
        elif bands is None or mean is not None:
            self._reading = Reading(**self._told)
        else:
            Reading(range, bands, nodata, mean, std)
        self.root = None if root is None else Path(root).expanduser()
        self.batch_size, self.seed = batch_size, seed
        if num_workers is None:
            num_workers = 0 if root is None else min(8, os.cpu_count() or 1)
        self.num_workers = num_workers
        self.datasets: dict[str, Dataset] = {}

    @property
    def class_names(self) -> list[str]:
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `Reading` for these images; those that depend on the images are found in them."""
        if self._reading is None:
            self.setup("fit")
        return self._reading.plain()

    def resolve_reading(self, files: Sequence[Path]) -> Reading:
        """How to read these files; where all bands are wanted, the first that can be read says how many there are."""
        if self._reading is not None or self._told["bands"] != "all":
            return self._reading or Reading(**self._told)
        for file in files:
            try:
                count = decode(file).values.shape[-1]
            except UNREADABLE:
                continue  # the check names it
            return Reading(**{**self._told, "bands": list(range(count))})
        raise DataError(f"{self.root}: no image can be read that would say how many bands there are")

    def measure_reading(self, files: Sequence[Path]) -> Reading:
        """The same, with mean and std of the files where neither the options nor the backbone's weights tell them."""
        if self._reading is None:
            reading = self.resolve_reading(files)
            if reading.channels != 3 and reading.mean is None:
                try:
                    mean, std = statistics(reading, files)
                except UNREADABLE as error:
                    raise DataError(f"{self.root}: mean and std of the images cannot be had: {error}") from error
                reading = replace(reading, mean=mean, std=std)
            self._reading = reading
        return self._reading

    @property
    def source(self) -> str:
        """Where the images come from, in words."""
        return str(self.root or "shapes drawn on the fly")

    def load(self, splits: list[str]) -> dict[str, Dataset]:
        """The data sets of "train", "val" or "test", checked; `DataError` names the faulty files."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Load the splits that a stage needs and that are not there yet.

        The command line asks before Lightning does, so that faulty data start no run.
        """
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]
        if self._reading is None:  # mean and std are those of the images to train on
            splits = list(dict.fromkeys(["train", "val", *splits]))
        splits = [split for split in splits if split not in self.datasets]
        if splits:
            self.datasets |= self.load(splits)
            if "train" in splits and self._reading is not None and self._reading.range is not None:
                doubt = doubts(self._reading, self.datasets["train"].files)
                if doubt is not None:
                    rank_zero_warn(f"{self.root}: {doubt}")
            tell_shared({split: getattr(data, "files", []) for split, data in self.datasets.items()})

    def train_dataloader(self) -> DataLoader:
        dataset = self.datasets["train"]
        sampler = EpochSampler(len(dataset), self.seed, *self.rank())
        # a last batch of one image would break batch norm, a smaller one would make the steps uneven
        return self.loader(
            dataset, batch_size=self.batch_size, sampler=sampler, drop_last=len(sampler) >= self.batch_size
        )

    def val_dataloader(self) -> DataLoader:
        return self.whole_images("val")

    def test_dataloader(self) -> DataLoader:
        return self.whole_images("test")

    def whole_images(self, split: str) -> DataLoader:
        """Every image once, in batches of one size."""
        dataset = self.datasets[split]
        return self.loader(dataset, batch_sampler=EqualSizeBatches(dataset.sizes, self.batch_size, *self.rank()))

    def rank(self) -> tuple[int, int]:
        """The number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        """A `DataLoader` with this module's workers."""
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
