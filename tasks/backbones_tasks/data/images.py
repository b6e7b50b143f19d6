"""Read pictures of any kind as RGB, and masks of any kind as class values."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)

T = TypeVar("T")
R = TypeVar("R")


class UnreadableImage(OSError):
    """An image that cannot be read, for the reason that the message gives."""


def is_large(path: str | Path) -> bool:
    """Whether an image has more pixels than PIL opens without a warning, `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with _any_size(), Image.open(path) as image:
            return limit is not None and image.width * image.height > limit
    except UNREADABLE:
        return False  # whoever reads it says why it cannot be


def orientation(path: str | Path) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 is upright, and what is not told."""
    try:
        with _any_size(), Image.open(path) as image:
            return image.getexif().get(0x0112, 1)
    except UNREADABLE:
        return 1


@contextmanager
def _any_size() -> Iterator[None]:
    """Within, PIL opens files of any size, of which only the head is read."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB, turned upright by its EXIF orientation; palette, grey, 16-bit and RGBA included."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":  # PIL clips these to 255 instead of scaling them
            values = np.asarray(image, dtype=np.float32)
            scale = 65535 if values.max(initial=0) > 255 else 255
            image = Image.fromarray((values.clip(0, scale) * (255 / scale)).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask as an (H, W) integer array of class values; a palette image's values are its indices."""
    with Image.open(path) as image:
        if len(image.getbands()) > 1:
            raise ValueError(f"is a {image.mode} image; a mask has one channel, whose values are the class indices")
        return np.asarray(image).astype(np.int64)


def to_pixels(image: Tensor) -> np.ndarray:
    """An image (3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (image * 255).byte().permute(1, 2, 0).numpy()


def each_in_threads(function: Callable[[T], R], items: Sequence[T], what: str) -> list[R]:
    """What a function that reads files returns for each item; a terminal shows how far it is, called `what`."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(function, items), what, len(items), delay=3, leave=False, disable=None))
