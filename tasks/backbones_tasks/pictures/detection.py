"""Pictures of objects: boxes, masks, labels and scores on their images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .colours import Colour, palette


@dataclass(frozen=True, eq=False)
class Objects:
    """What is in an image, or was found in it.

    boxes: (N, 4) x0, y0, x1, y1 in pixels. labels: (N,) from 1. scores: (N,), of what was found.
    masks: (N, H, W) bool, where there are any.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None


def draw_objects(image: np.ndarray, objects: Objects, class_names: Sequence[str]) -> Image.Image:
    """An image (H, W, 3) uint8 with boxes, tinted masks, names (by label) and scores; the surest lie on top."""
    colours = palette(len(class_names))
    picture = Image.fromarray(_tinted(image, objects, colours))
    draw = ImageDraw.Draw(picture)
    shorter = min(picture.size)
    width = max(1, round(shorter / 250))
    font = ImageFont.load_default(size=max(10, shorter / 35))
    for i in _rising(objects):
        label = int(objects.labels[i])
        colour, box = colours[label], objects.boxes[i].tolist()
        draw.rectangle(box, outline=colour, width=width)
        text = class_names[label]
        if objects.scores is not None:
            text += f" {objects.scores[i]:.2f}"
        # above the box, or inside where there is no room
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        height = bottom - top + 2 * width
        x = max(0, min(box[0], picture.width - (right - left) - 2 * width))
        y = box[1] - height if box[1] >= height else box[1]
        draw.rectangle((x, y, x + right - left + 2 * width, y + height), fill=colour)
        draw.text((x + width - left, y + width - top), text, fill=_readable_on(colour), font=font)
    return picture


def save_objects(
    path: str | Path,
    images: Sequence[np.ndarray],
    truths: Sequence[Objects],
    predictions: Sequence[Objects],
    class_names: Sequence[str],
) -> None:
    """Truth and prediction side by side, two images per row, with the names of the classes that occur.

    Args:
        path: of the PNG.
        images: (H, W, 3) uint8.
        truths, predictions: one per image.
        class_names: names by label; the first is the background
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    colours = palette(len(class_names))
    shares = [tuple(np.array(colour) / 255) for colour in colours]
    rows = -(-len(images) // 2)
    aspect = max(image.shape[0] / image.shape[1] for image in images)
    figure = Figure(figsize=(12, 3 * aspect * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], ("truth", "prediction") * 2, strict=True):
        axis.set_title(title)
    for i, (image, *columns) in enumerate(zip(images, truths, predictions, strict=True)):
        for axis, objects in zip(axes[i // 2][2 * (i % 2) :], columns, strict=False):
            axis.imshow(_tinted(image, objects, colours), interpolation="nearest")
            axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
            for j in _rising(objects):
                (x0, y0, x1, y1), colour = objects.boxes[j] - 0.5, shares[int(objects.labels[j])]
                axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
                if objects.scores is not None:
                    text = f"{objects.scores[j]:.2f}"
                    back = {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
                    ink = np.array(_readable_on(colours[int(objects.labels[j])])) / 255
                    room = "bottom" if y0 > 0.05 * image.shape[0] else "top"  # above the box where it fits
                    axis.text(x0, y0, text, fontsize=5, color=ink, bbox=back, va=room, clip_on=True)
    seen = sorted({int(label) for objects in (*truths, *predictions) for label in objects.labels})
    patches = [Patch(color=shares[label], label=class_names[label]) for label in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, max(1, len(patches))), frameon=False)
    figure.savefig(path, dpi=120)


def _rising(objects: Objects) -> np.ndarray:
    """Indices of the objects, the surest last."""
    return np.arange(len(objects.boxes)) if objects.scores is None else np.argsort(objects.scores, kind="stable")


def _tinted(image: np.ndarray, objects: Objects, colours: Sequence[Colour], alpha: float = 0.45) -> np.ndarray:
    if objects.masks is None:
        return image
    tinted = image.copy()
    for i in _rising(objects):
        mask = objects.masks[i]
        tinted[mask] = (image[mask] * (1 - alpha) + np.array(colours[int(objects.labels[i])]) * alpha).round()
    return tinted


def _readable_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)
