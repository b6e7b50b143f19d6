"""torchvision's classification data sets by name, where they lie on disk: `cifar10:DIR`."""

import re
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

from ..options import nearest
from .folders import DataError

_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_SPLITS = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {**_SPLITS, "val": {"split": "val"}}
_WHOLE: dict[str, dict[str, Any]] = {"train": {}}
#: By name, torchvision's class, and what it is told for the splits that there are.
PUBLISHED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "caltech101": ("Caltech101", _WHOLE),
    "caltech256": ("Caltech256", _WHOLE),
    "cifar10": ("CIFAR10", _TRAIN),
    "cifar100": ("CIFAR100", _TRAIN),
    "country211": ("Country211", {**_SPLITS, "val": {"split": "valid"}}),
    "dtd": ("DTD", _THREE),
    "eurosat": ("EuroSAT", _WHOLE),
    "fashionmnist": ("FashionMNIST", _TRAIN),
    "fgvcaircraft": ("FGVCAircraft", _THREE),
    "flowers102": ("Flowers102", _THREE),
    "food101": ("Food101", _SPLITS),
    "gtsrb": ("GTSRB", _SPLITS),
    "imagenet": ("ImageNet", {"train": {"split": "train"}, "val": {"split": "val"}}),
    "imagenette": ("Imagenette", {"train": {"split": "train"}, "val": {"split": "val"}}),
    "kmnist": ("KMNIST", _TRAIN),
    "mnist": ("MNIST", _TRAIN),
    "oxfordiiitpet": ("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "pcam": ("PCAM", _THREE),
    "renderedsst2": ("RenderedSST2", _THREE),
    "stanfordcars": ("StanfordCars", _SPLITS),
    "stl10": ("STL10", _SPLITS),
    "sun397": ("SUN397", _WHOLE),
    "svhn": ("SVHN", _SPLITS),
    "usps": ("USPS", _TRAIN),
}


class Published:
    """One of torchvision's data sets in a folder; nothing is downloaded.

    Args:
        name: as in `PUBLISHED`
        root: the folder that torchvision calls its root

    Raises:
        DataError: there is no such data set, or not there
    """

    def __init__(self, name: str, root: Path):
        word = re.sub(r"[\W_]", "", name.lower())
        if word not in PUBLISHED:
            raise DataError(f"{name}:{root}: unknown data set {name!r}; {nearest(word, PUBLISHED)}")
        self.name, self.root = word, root
        self.kind, self.options = PUBLISHED[word]
        self._opened: dict[str, Dataset] = {}
        dataset = self.open("train")
        labels = self.labels("train")
        names = list(getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or ())
        names = [each if isinstance(each, str) else ", ".join(each) for each in names]
        names += [str(label) for label in range(len(names), max(labels) + 1)]
        #: of the classes by label; those that share a name are told by their number
        self.classes = [f"{each} {i}" if names.count(each) > 1 else each for i, each in enumerate(names)]

    def open(self, split: str) -> Dataset:
        """torchvision's data set of a split that there is."""
        if split not in self._opened:
            try:
                self._opened[split] = getattr(datasets, self.kind)(self.root, **self.options[split])
            except (RuntimeError, OSError, ImportError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                get = f"from torchvision.datasets import {self.kind}; {self.kind}({str(self.root)!r}, download=True)"
                raise DataError(
                    f"{self.root}: torchvision finds no {self.kind} for {split} there: {reason} By hand: {get}"
                ) from error
        return self._opened[split]

    def labels(self, split: str) -> list[int]:
        """Of each image of a split."""
        dataset = self.open(split)
        for name in ("targets", "labels", "_labels", "y"):
            found = getattr(dataset, name, None)
            if found is not None and len(found) == len(dataset):
                return [int(label) for label in found]
        if hasattr(dataset, "_samples"):
            return [int(label) for _, label in dataset._samples]
        return [int(dataset[i][1]) for i in range(len(dataset))]

    def image(self, split: str, index: int) -> torch.Tensor:
        """An image (3, H, W) of 8 bits."""
        return pil_to_tensor(self.open(split)[index][0].convert("RGB"))


def find_published(root: str) -> Published | None:
    """What `NAME:DIR` stands for; None for a folder."""
    name, colon, folder = root.partition(":")
    if not colon or not re.fullmatch(r"\w[\w-]+", name) or Path(root).expanduser().exists():
        return None  # a letter by itself is a drive of Windows
    return Published(name, Path(folder).expanduser())
