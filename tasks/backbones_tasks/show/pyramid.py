"""`backbones show pyramid`: the levels of the pyramid beside the image, a row for each backbone."""

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure

from .panels import ChannelColours, draw_map, draw_photo, rows_of_panels, set_heading
from .photo import Photo, add_image_arguments, image_size, read_photo
from .subject import Subject

SEVERAL = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)


def photos(args: argparse.Namespace) -> list[Photo]:
    return [read_photo(args.image, image_size(args))]


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Figure:
    (photo,) = photos
    rows = [(subject, subject.maps(photo)) for subject in subjects]
    columns = 1 + max(len(maps) for _, maps in rows)
    headings = [subject.title for subject in subjects]
    figure, _, axes = rows_of_panels(headings, columns, photo.size[0] / photo.size[1])
    for row, (subject, maps) in zip(axes, rows, strict=True):
        draw_photo(row[0], photo, f"image: {photo.size[0]} x {photo.size[1]}\n3 channels")
        for axis, features, stride in zip(row[1:], maps, subject.model.strides, strict=False):
            colours = ChannelColours(features)
            channels, height, width = features.shape
            title = f"stride {stride}: {height} x {width}\n{channels} channels ({colours.share:.0%} shown)"
            draw_map(axis, colours(features), stride, photo.size, title)
    set_heading(figure, "Levels of the pyramid; the colours are the first three principal components")
    return figure
