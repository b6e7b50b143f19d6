"""Pictures of what a model learnt: overlays, index masks, predictions beside the truth, curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .colours import colourise, palette


def save_predictions(
    path: str | Path,
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    class_names: Sequence[str],
    ignore_index: int = 255,
) -> None:
    """A row per image: the image, the truth and the prediction, with the names of the classes that occur.

    Args:
        path: of the PNG.
        images: (H, W, 3) uint8.
        truths, predictions: (H, W) class indices; where the truth is `ignore_index`, both are black.
        class_names: in the order of the indices.
        ignore_index: index of what is not labelled.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = palette(len(class_names))
    predictions = [np.where(t == ignore_index, ignore_index, p) for t, p in zip(truths, predictions, strict=True)]
    rows = list(zip(images, truths, predictions, strict=True))
    aspect = max(image.shape[0] / image.shape[1] for image in images)
    figure = Figure(figsize=(9, 3 * aspect * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (image, truth, prediction) in zip(axes, rows, strict=True):
        for axis, picture in zip(row, (image, colourise(truth, colours), colourise(prediction, colours)), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title)
    seen = sorted({int(i) for masks in (truths, predictions) for mask in masks for i in np.unique(mask)})
    patches = [Patch(color=np.array(colours[i]) / 255, label=class_names[i]) for i in seen if i < len(class_names)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, max(1, len(patches))), frameon=False)
    figure.savefig(path, dpi=120)
