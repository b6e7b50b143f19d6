"""What torchvision has, as data: read without torch, and compared with the installed torchvision in the tests."""

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from backbones import Weights
from backbones.specs import torchvision_weights

FOLDER = Path(__file__).parent


class Model(NamedTuple):
    """A model that is offered.

    Args:
        family: key of `FAMILIES`.
        channels: of the maps at strides 4, 8, 16 and 32.
        params: in millions, with the classifier.
        gmacs: at 224 x 224.
    """

    family: str
    channels: tuple[int, ...]
    params: float
    gmacs: float


class Family(NamedTuple):
    paper: str
    summary: str


class Refused(NamedTuple):
    """A model that is not offered, with the last map that it has, and why not."""

    family: str
    channels: int
    stride: int
    reason: str


FAMILIES = {
    "ConvNeXt": Family("https://arxiv.org/abs/2201.03545", "depth-wise 7 x 7 convolutions and channel MLPs"),
    "DenseNet": Family("https://arxiv.org/abs/1608.06993", "layers that read all earlier ones of their block"),
    "EfficientNet": Family("https://arxiv.org/abs/1905.11946", "inverted residuals, scaled in depth, width and size"),
    "EfficientNetV2": Family("https://arxiv.org/abs/2104.00298", "fused and plain inverted residuals"),
    "GoogLeNet": Family("https://arxiv.org/abs/1409.4842", "parallel convolutions of several kernels"),
    "MNASNet": Family("https://arxiv.org/abs/1807.11626", "inverted residuals found by search on a phone"),
    "MobileNetV2": Family("https://arxiv.org/abs/1801.04381", "inverted residuals with linear bottlenecks"),
    "MobileNetV3": Family("https://arxiv.org/abs/1905.02244", "inverted residuals with squeeze and excitation"),
    "RegNet": Family("https://arxiv.org/abs/2003.13678", "bottlenecks whose widths grow linearly"),
    "ResNeXt": Family("https://arxiv.org/abs/1611.05431", "bottlenecks with grouped convolutions"),
    "ResNet": Family("https://arxiv.org/abs/1512.03385", "residual convolutions, the stride in the 3 x 3"),
    "ShuffleNetV2": Family("https://arxiv.org/abs/1807.11164", "split, transformed and shuffled channels"),
    "Swin": Family("https://arxiv.org/abs/2103.14030", "attention in shifted windows"),
    "SwinV2": Family("https://arxiv.org/abs/2111.09883", "cosine attention in shifted windows, norms after"),
    "VGG": Family("https://arxiv.org/abs/1409.1556", "plain 3 x 3 convolutions between poolings"),
    "Wide ResNet": Family("https://arxiv.org/abs/1605.07146", "bottlenecks of twice the inner width"),
}

_SMALLER_MAPS = "its unpadded convolutions and poolings give maps smaller than ceil(H / stride)"

REFUSED = {
    "alexnet": Refused("AlexNet", 256, 32, _SMALLER_MAPS),
    "inception_v3": Refused("Inception-v3", 2048, 32, _SMALLER_MAPS),
    "squeezenet1_0": Refused("SqueezeNet", 512, 16, _SMALLER_MAPS),
    "squeezenet1_1": Refused("SqueezeNet", 512, 16, _SMALLER_MAPS),
}

#: Models that take images of one size in torchvision, and of any in the plugin that is named, which has the name too.
ELSEWHERE = {**dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"), "vit"), "maxvit_t": "maxvit"}


def _rows(file: str) -> Iterator[dict[str, str]]:
    with open(FOLDER / file, newline="", encoding="utf-8") as lines:
        yield from csv.DictReader(lines)


def _model(row: dict[str, str]) -> Model:
    channels = tuple(map(int, row["channels"].split()))
    return Model(row["family"], channels, float(row["params"]), float(row["gmacs"]))


MODELS = {row["name"]: _model(row) for row in _rows("models.csv")}


@cache
def weights(name: str) -> tuple[Weights, ...]:
    """Published weights of a model, torchvision's default first."""
    return tuple(
        torchvision_weights(
            row["enum"],
            row["file"],
            float(row["top1"]) if row["top1"] else None,
            float(row["top5"]) if row["top5"] else None,
            row["recipe"],
            int(row["side"]),
            interpolation=row["interpolation"],
            # GoogLeNet's are what torchvision's builder converts to by itself
            **{key: tuple(map(float, row[key].split())) for key in ("mean", "std")},
        )
        for row in _rows("weights.csv")
        if row["name"] == name
    )
