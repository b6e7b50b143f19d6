"""Read pictures of any kind as RGB, and masks of any kind as class values."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


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
