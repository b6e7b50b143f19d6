"""Pictures of classified images: labels beside the truth, and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def save_labelled(
    path: str | Path,
    images: Sequence[np.ndarray],
    truths: Sequence[str],
    predictions: Sequence[str],
    columns: int = 6,
) -> None:
    """A grid of images under the class that each is, in green if that is predicted; else the prediction, in red.

    Args:
        path: of the PNG.
        images: (H, W, 3) uint8.
        truths: names of the classes.
        predictions: names of the classes.
        columns: images per row.
    """
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.2 * rows), layout="constrained")
    for axis in (axes := figure.subplots(rows, columns, squeeze=False)).flat:
        axis.set_axis_off()
    for axis, image, truth, prediction in zip(axes.flat, images, truths, predictions, strict=False):
        axis.imshow(image, interpolation="nearest")
        right = truth == prediction
        title, colour = (truth, "#1a7f37") if right else (f"{truth}\nnot {prediction}", "#b42318")
        axis.set_title(title, color=colour, size=8)
    figure.savefig(path, dpi=120)


def save_confusion(path: str | Path, matrix: np.ndarray, class_names: Sequence[str]) -> None:
    """A confusion matrix as a PNG: shares of each true class in colour, and counts where there is room.

    Args:
        path: of the PNG.
        matrix: (classes, classes) counts; rows are the truth.
        class_names: in the order of the indices.
    """
    from matplotlib.figure import Figure

    classes = len(class_names)
    side = min(16.0, 3.0 + 0.45 * classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    axis.set(xlabel="prediction", ylabel="truth")
    if classes <= 60:
        axis.set_xticks(range(classes), class_names, rotation=90)
        axis.set_yticks(range(classes), class_names)
    if classes <= 25:
        for row, column in zip(*matrix.nonzero(), strict=True):
            ink = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color=ink, size=8)
    figure.savefig(path, dpi=120)
