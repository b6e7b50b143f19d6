"""Pictures of what a model learnt: overlays, index masks, predictions beside the truth, curves."""

import colorsys
import csv
from collections.abc import Sequence
from pathlib import Path

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


def save_tradeoff(
    path: str | Path,
    names: Sequence[str],
    latencies: Sequence[float],
    scores: Sequence[float],
    params: Sequence[float],
    score: str,
    caption: str = "",
) -> None:
    """Scores over latencies as a PNG: a circle for each model, as large as it has parameters, its name beside it.

    A line joins those that no other model beats in both.

    Args:
        path: of the PNG.
        names: of the models.
        latencies: in ms.
        scores: more is better.
        params: in millions.
        score: what the scores are.
        caption: a line below.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axis = figure.subplots()
    largest = max(params)
    areas = [1200 * count / largest for count in params]
    colours = [colormaps["tab10" if len(names) <= 10 else "tab20"](i % 20) for i in range(len(names))]
    circles = axis.scatter(latencies, scores, areas, colours, alpha=0.9, edgecolors="white", linewidths=1.0, zorder=3)
    best = _unbeaten(latencies, scores)
    if len(best) > 1:
        axis.plot([latencies[i] for i in best], [scores[i] for i in best], "--", color="#9aa4b2", lw=1.2, zorder=2)
    if max(latencies) > 5 * min(latencies):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(ScalarFormatter() if max(latencies) < 50 * min(latencies) else NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.tick_params(axis="x", which="both", length=3.5, pad=4)
    axis.margins(x=0.16, y=0.2)
    axis.grid(alpha=0.25, which="both")
    axis.set(xlabel="latency (ms)", ylabel=score)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = circles.legend_elements(
        prop="sizes", num=3, color="#9aa4b2", alpha=0.75, func=lambda area: area * largest / 1200, fmt="{x:g} M"
    )
    axis.legend(
        handles,
        labels,
        title="parameters",
        loc="upper left",
        bbox_to_anchor=(1, 1),
        frameon=False,
        labelspacing=2.2,
        borderpad=1.2,
    )
    if caption:
        figure.supxlabel(caption, size=8, color="#5b6472")
    _place_names(figure, axis, names, latencies, scores, areas)
    figure.savefig(path, dpi=150)


def _unbeaten(latencies: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices, fastest first, of the models that none both as fast and as good beats."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (latencies[i], -scores[i])):
        if not kept or scores[i] > scores[kept[-1]]:
            kept.append(i)
    return kept


def _place_names(figure, axis, names, xs, ys, areas) -> None:
    """Write each name beside its circle, where it covers no other name or circle, if there is such a place."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout decides where circles are
    pixels = figure.dpi / 72
    centres = axis.transData.transform(list(zip(xs, ys, strict=True)))
    radii = [(area / np.pi) ** 0.5 * pixels for area in areas]
    frame = axis.get_window_extent()
    taken = [Bbox([[x - r, y - r], [x + r, y + r]]) for (x, y), r in zip(centres, radii, strict=True)]
    sides = [(1, 0, "left"), (-1, 0, "right"), (0, 1, "center"), (0, -1, "center")]
    sides += [(0.75, 0.75, "left"), (0.75, -0.75, "left"), (-0.75, 0.75, "right"), (-0.75, -0.75, "right")]
    for i in np.argsort(ys)[::-1]:
        clashes = []
        for dx, dy, align in sides:
            gap = radii[i] / pixels + 3
            text = axis.annotate(
                names[i],
                (xs[i], ys[i]),
                (dx * gap, dy * gap),
                textcoords="offset points",
                ha=align,
                va={0: "center", 1: "bottom", -1: "top"}[round(dy)],
                size=9,
                zorder=4,
                path_effects=[withStroke(linewidth=3, foreground="white")],  # the line may pass below it
            )
            box = text.get_window_extent()
            others = [other for j, other in enumerate(taken) if j != i]
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            clash = sum(box.overlaps(other) for other in others) + 2 * (not inside)
            clashes.append((clash, len(clashes), text, box))
        _, _, text, box = min(clashes, key=lambda row: row[:2])
        for _, _, other, _ in clashes:
            if other is not text:
                other.remove()
        taken.append(box)


def save_curves(path: str | Path, metrics_csv: str | Path, scores: Sequence[str]) -> None:
    """Losses and scores over the epochs of a run's metrics.csv, as a PNG.

    Args:
        path: of the PNG.
        metrics_csv: of the run; cells may be empty.
        scores: columns with values from 0 to 1.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with open(metrics_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, columns in zip(axes, (("train_loss", "val_loss"), scores), strict=True):
        for column in columns:
            points = [(int(row["epoch"]) + 1, float(row[column])) for row in rows if row.get(column)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=column)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    axes[1].set_ylim(0, 1)
    figure.savefig(path, dpi=120)
