"""`backbones show features`: single channels of one level."""

import argparse
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from backbones.errors import InputError

from .panels import draw_map, draw_photo, grid_of_panels, set_heading, shape_of
from .photo import Photo, add_image_arguments, image_size, read_photo
from .subject import Subject

SEVERAL = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument("--level", type=int, metavar="N", help="index of the map, as in out_indices; default: stride 8")
    parser.add_argument("--channels", type=int, nargs="+", metavar="N", help="default: the 15 that vary most")


def photos(args: argparse.Namespace) -> list[Photo]:
    return [read_photo(args.image, image_size(args))]


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Figure:
    (subject,), (photo,) = subjects, photos
    position = subject.position(args.level, stride=8)
    stride = subject.model.strides[position]
    features = subject.maps(photo)[position]
    chosen = _channels(features, args.channels)
    shape = shape_of(len(chosen) + 1, most=max(4, math.ceil(math.sqrt(len(chosen) + 1))))
    figure, axes = grid_of_panels(*shape, photo.size[0] / photo.size[1], width=2.0, header=0.25)
    draw_photo(axes.flat[0], photo)
    for axis, channel in zip(axes.flat[1:], chosen, strict=False):
        cells = features[channel].cpu().numpy()
        low, high = np.quantile(cells, (0.01, 0.99))
        draw_map(axis, cells, stride, photo.size, f"channel {channel}", cmap="viridis", vmin=low, vmax=high)
    height, width = features.shape[1:]
    set_heading(
        figure, f"{subject.title}: {len(chosen)} of {len(features)} channels at stride {stride} ({height} x {width})"
    )
    return figure


def _channels(features: Tensor, given: Sequence[int] | None) -> list[int]:
    if given is None:
        return sorted(features.flatten(1).var(1, correction=0).topk(min(15, len(features))).indices.tolist())
    wrong = [channel for channel in given if not 0 <= channel < len(features)]
    if wrong:
        raise InputError(f"--channels: there is no {wrong[0]}; the level has channels 0 to {len(features) - 1}")
    return list(given)
