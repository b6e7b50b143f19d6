"""`backbones show pyramid`: the levels of the pyramid beside the image, a row for each backbone."""

import argparse
from collections.abc import Sequence

from torch import Tensor

from .panels import (
    ChannelColours,
    Picture,
    add_ground_arguments,
    draw_map,
    draw_photo,
    ground,
    rows_of_panels,
    set_heading,
)
from .photo import Photo, add_image_arguments, image_size, read_photo
from .subject import Subject

SEVERAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_ground_arguments(parser)


def photos(args: argparse.Namespace) -> list[Photo]:
    return [read_photo(args.image, image_size(args))]


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Picture:
    (photo,) = photos
    rows = [(subject, subject.maps(photo)) for subject in subjects]
    columns = 1 + max(len(maps) for _, maps in rows)
    headings = [subject.title for subject in subjects]
    figure, _, axes = rows_of_panels(headings, columns, photo.size[0] / photo.size[1])
    numbers = []
    for row, (subject, maps) in zip(axes, rows, strict=True):
        strides = subject.model.strides
        cells = f", cells of {strides[-1]}" if args.grid else ""
        title = f"image: {photo.size[0]} x {photo.size[1]}\n3 channels{cells}"
        draw_photo(row[0], photo, title, strides[-1] if args.grid else None)
        levels = []
        for axis, features, index, stride in zip(row[1:], maps, subject.model.out_indices, strides, strict=False):
            colours = ChannelColours(features)
            level = {"level": index, "stride": stride, **_numbers(features), "share_shown": colours.share}
            title = "stride {stride}: {height} x {width}, rms {rms:.3g}\n{channels} channels ({share_shown:.0%} shown)"
            draw_map(axis, colours(features), stride, photo.size, title.format(**level), ground(photo, args))
            levels.append(level)
        numbers.append({"levels": levels})
    set_heading(figure, "Levels of the pyramid; the colours are the first three principal components")
    return Picture(figure, numbers, {})


def _numbers(features: Tensor) -> dict[str, float]:
    """Shape of a map (C, h, w), and mean, standard deviation and root mean square of its values."""
    channels, height, width = features.shape
    return {
        "channels": channels,
        "height": height,
        "width": width,
        "mean": float(features.mean()),
        "std": float(features.std(correction=0)),
        "rms": float(features.square().mean().sqrt()),
    }
