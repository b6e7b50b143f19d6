"""Colours of classes, and masks in them."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]


IGNORED: Colour = (0, 0, 0)


def palette(num_classes: int) -> list[Colour]:
    """Colours that neighbours in the list can be told apart by; the first, often the background, is dark."""
    colours: list[Colour] = [(44, 50, 62)]
    for i in range(1, num_classes):
        hue = i * 0.618034 % 1  # the golden ratio spreads hues evenly, however many there are
        rgb = colorsys.hsv_to_rgb(hue, (0.85, 0.55)[i // 8 % 2], (0.95, 0.7)[i // 4 % 2])
        colours.append(tuple(round(255 * c) for c in rgb))
    return colours[:num_classes]


def colourise(mask: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """Class indices (H, W) as colours (H, W, 3) uint8; indices without a colour are black."""
    table = np.array([*colours, IGNORED], dtype=np.uint8)
    known = (mask >= 0) & (mask < len(colours))
    return table[np.where(known, mask, len(colours))]


def overlay(image: np.ndarray, mask: np.ndarray, colours: Sequence[Colour], alpha: float = 0.5) -> np.ndarray:
    """An image (H, W, 3) uint8 tinted by the colours of its mask (H, W)."""
    tinted = np.empty_like(image)
    for top in range(0, len(image), 256):  # as floating-point numbers, a large image would be much larger
        rows = slice(top, top + 256)
        tinted[rows] = (image[rows] * (1 - alpha) + colourise(mask[rows], colours) * alpha).round()
    return tinted


def index_png(mask: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """A mask (H, W) as a palette image whose pixel values are the class indices; over 256 classes, as 16 bits."""
    if mask.max(initial=0) > 255:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask.astype(np.uint8)).convert("P")
    image.putpalette([channel for colour in colours[:256] for channel in colour])
    return image
