"""Coloured shapes on textured ground, drawn from a seed, with exact masks and boxes."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star")
CLASSES = ("background", *SHAPES)


@dataclass(frozen=True)
class Scene:
    """A picture and the whole truth about it.

    image: (H, W, 3) uint8. mask: (H, W) uint8, the index in `CLASSES` of what is visible at the pixel's centre.
    masks: (N, H, W) bool, the visible part of each shape. labels: (N,) indices in `CLASSES`.
    boxes: (N, 4) float32, the tight (x0, y0, x1, y1) of each visible part in pixels, x1 and y1 exclusive.
    """

    image: np.ndarray
    mask: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def draw_scene(seed: int | tuple[int, ...], size: int = 96, shapes: int | None = None) -> Scene:
    """Draw two to four overlapping shapes on a `size` x `size` picture; equal seeds give equal scenes.

    The outline decides the class. Each class also has a hue, from which single shapes stray a little: a strong cue,
    so that a network can learn from nothing within minutes. With `shapes`, there are as many.
    """
    rng = np.random.default_rng(seed)
    image = _background(rng, size)
    masks, labels = [], []
    for _ in range(rng.integers(2, 5) if shapes is None else shapes):
        label = int(rng.integers(1, len(CLASSES)))
        radius = size * rng.uniform(0.17, 0.32)
        centre = rng.uniform(0.5 * radius, size - 0.5 * radius, 2)
        # only the window that the shape can reach is computed: four times faster than the whole picture
        x, y = np.maximum(centre - 1.2 * radius - 1, 0).astype(int)
        x1, y1 = np.minimum(centre + 1.2 * radius + 2, size).astype(int)
        points = _pixel_centres(size)[y:y1, x:x1]
        distance = _distance(CLASSES[label], points - centre.astype(np.float32), radius, rng.uniform(0, 2 * np.pi))
        covered = np.clip(0.5 - distance, 0, 1)[..., None]  # share of the pixel inside: a smooth edge
        image[y:y1, x:x1] += covered * (_paint(rng, label, points) - image[y:y1, x:x1])
        inside = np.zeros((size, size), dtype=bool)
        inside[y:y1, x:x1] = distance <= 0
        masks = [visible & ~inside for visible in masks] + [inside]
        labels.append(label)
    visible = [i for i, mask in enumerate(masks) if mask.any()]
    masks, labels = np.stack(masks)[visible], np.array(labels)[visible]
    noise = rng.uniform(2, 8) * rng.standard_normal(image.shape, dtype=np.float32)
    return Scene(
        image=np.clip(image + noise, 0, 255).astype(np.uint8),
        mask=np.einsum("nhw,n->hw", masks, labels).astype(np.uint8),
        masks=masks,
        labels=labels,
        boxes=np.array([_box(mask) for mask in masks], dtype=np.float32),
    )


@cache
def _pixel_centres(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] + 0.5
    return np.stack([x, y], axis=-1).astype(np.float32)  # (H, W, 2)


def _distance(shape: str, points: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Signed distance in pixels of `points` (H, W, 2) to the outline, negative inside."""
    if shape == "circle":
        return np.hypot(points[..., 0], points[..., 1]) - 0.85 * radius  # about the area of the others
    corners = {"triangle": 3, "square": 4, "star": 10}[shape]
    angles = angle + np.arange(corners) * 2 * np.pi / corners
    radii = radius * (np.where(np.arange(corners) % 2, 0.5, 1.1) if shape == "star" else 1.0)
    vertices = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1).astype(np.float32)

    # https://iquilezles.org/articles/distfunctions2d (polygon): the nearest edge, and the parity of crossings
    nearest, inside = np.inf, False
    for a, b in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        edge, offset = b - a, points - a
        along = np.clip(offset @ edge / (edge @ edge), 0, 1)
        nearest = np.minimum(nearest, ((offset - along[..., None] * edge) ** 2).sum(-1))
        below = (points[..., 1] >= a[1], points[..., 1] < b[1], edge[0] * offset[..., 1] > edge[1] * offset[..., 0])
        inside = inside ^ ((below[0] & below[1] & below[2]) | ~(below[0] | below[1] | below[2]))
    return np.sqrt(nearest) * np.where(inside, -1, 1)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth greyish blotches under faint stripes, (H, W, 3) float in 0..255."""
    cells = rng.integers(2, 9)
    blotches = rng.uniform(0, 255) + rng.normal(0, 15, 3) + rng.normal(0, rng.uniform(5, 25), (cells, cells, 3))
    small = Image.fromarray(np.clip(blotches, 0, 255).astype(np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) + _stripes(
        rng, _pixel_centres(size)
    )


def _paint(rng: np.random.Generator, label: int, points: np.ndarray) -> np.ndarray:
    """A colour around the class's hue under stripes, at `points` (H, W, 2): (H, W, 3)."""
    hue = ((label - 1) / len(SHAPES) + rng.normal(0, 0.04)) % 1
    saturation, value = rng.uniform(0.35, 1), rng.uniform(0.4, 1)
    # HSV to RGB, https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    k = (np.array([5, 3, 1]) + hue * 6) % 6
    colour = value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
    return 255 * colour.astype(np.float32) + _stripes(rng, points)


def _stripes(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    direction = (rng.normal(size=2) * rng.uniform(0.1, 0.6)).astype(np.float32)
    return np.float32(rng.uniform(0, 25)) * np.sin(points @ direction)[..., None]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    y, x = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return x[0], y[0], x[-1] + 1, y[-1] + 1
