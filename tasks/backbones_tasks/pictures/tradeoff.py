"""A picture of several models: scores over latencies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


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


def _place_names(figure: Any, axis: Any, names: Any, xs: Any, ys: Any, areas: Any) -> None:
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
