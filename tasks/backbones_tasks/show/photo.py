"""The image of a picture, resized."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from backbones.errors import InputError

from ..data.images import UNREADABLE
from ..data.reading import read_image


@dataclass(frozen=True)
class Photo:
    """An image as the backbones see it.

    Args:
        pixels: (H, W, 3) uint8.
        scale: its pixels per pixel of the file, down and across.
        offset: how many of its pixels were cut off at the top and at the left.
    """

    pixels: np.ndarray
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[int, int] = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the file, counted from the top left as (x, y), is.

        Raises:
            InputError: it is outside.
        """
        placed = x * self.scale[1] - self.offset[1], y * self.scale[0] - self.offset[0]
        if not (0 <= placed[0] < self.size[1] and 0 <= placed[1] < self.size[0]):
            left, top = (o / s for o, s in zip(self.offset[::-1], self.scale[::-1], strict=True))
            width, height = (n / s for n, s in zip(self.size[::-1], self.scale[::-1], strict=True))
            raise InputError(
                f"the point {x:g} {y:g} is outside the image, which shows x from {left:g} to {left + width:g} "
                f"and y from {top:g} to {top + height:g} of the file"
            )
        return placed


def add_image_arguments(parser: argparse.ArgumentParser, nargs: str | None = None, what: str = "a photograph") -> None:
    """IMAGE, as many as `nargs` says, and `--size`."""
    parser.add_argument("image", metavar="IMAGE", nargs=nargs, help=what)
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[448],  # whole windows of 7, 8, 14 or 16 cells at strides 4 to 32, and patches of 14, 16 or 32
        metavar="PX",
        help="shorter side of the image, or height and width, cut out of its middle; default 448",
    )


def image_size(args: argparse.Namespace) -> tuple[int, ...]:
    """What `--size` says: a shorter side, or a height and a width."""
    if len(args.size) > 2 or min(args.size) < 1:
        raise InputError("--size takes one or two positive numbers of pixels")
    return tuple(args.size)


def read_photo(path: str | Path, size: tuple[int, ...]) -> Photo:
    """An image file, upright, resized to a shorter side of `size`, or cut to a height and a width.

    Raises:
        InputError: it is missing or no image.
    """
    try:
        image = read_image(path)
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as an image: {error}") from error
    width, height = image.size
    if len(size) == 1:
        scale = size[0] / min(height, width)
        full = cut = tuple(max(1, round(side * scale)) for side in (height, width))
    else:
        cut = size
        scale = max(size[0] / height, size[1] / width)
        full = tuple(max(c, round(side * scale)) for c, side in zip(cut, (height, width), strict=True))
    pixels = np.array(image.resize(full[::-1], Image.Resampling.BICUBIC))
    top, left = ((f - c) // 2 for f, c in zip(full, cut, strict=True))
    return Photo(
        pixels=np.ascontiguousarray(pixels[top : top + cut[0], left : left + cut[1]]),
        scale=(full[0] / height, full[1] / width),
        offset=(top, left),
    )
