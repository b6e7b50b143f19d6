"""A picture of a training: losses and scores over the epochs."""

import csv
from collections.abc import Sequence
from pathlib import Path


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
