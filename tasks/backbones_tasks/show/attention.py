"""`backbones show attention`: what the heads of a layer attend to, and the roll-out of all layers."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from backbones.cli.output import print_hint
from backbones.errors import InputError

from .attention_weights import (
    Attended,
    AttentionLayer,
    Unseen,
    attention_layers,
    by_offset,
    distances,
    roll_out,
    watch,
)
from .grid import Grid
from .panels import (
    TITLE,
    Picture,
    add_ground_arguments,
    draw_map,
    draw_outline,
    draw_photo,
    grid_of_panels,
    ground,
    set_heading,
    shape_of,
)
from .photo import Photo, add_image_arguments, image_size, read_photo
from .subject import Subject

SEVERAL = False
NEAR = 0.25  # of the image's sides: what can be attended to within less is shown enlarged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_ground_arguments(parser)
    parser.add_argument(
        "--block", type=int, default=-1, metavar="N", help="attention layer, counted from 0 or from the end; the last"
    )
    parser.add_argument("--head", type=int, nargs="+", metavar="N", help="heads of it; default: all")
    parser.add_argument(
        "--query",
        type=float,
        nargs=2,
        metavar=("X", "Y"),
        help="pixel of the file whose attention is shown; default: the class token, or the mean over all cells",
    )


def photos(args: argparse.Namespace) -> list[Photo]:
    return [read_photo(args.image, image_size(args))]


@dataclass(frozen=True)
class Shown:
    """What a layer's panels show, on the CPU.

    Args:
        maps: (heads, rows, columns): weights by key, of one query or their mean, or by offset from query to key.
        inside: (rows, columns): the keys that could be attended to.
        asks: what asks, in words.
        query: the cell that asks, as row and column.
    """

    maps: Tensor
    inside: Tensor
    asks: str
    query: tuple[int, int] | None = None


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Picture:
    (subject,), (photo,) = subjects, photos
    images = subject.images(photo)
    try:
        layers = attention_layers(subject.model, images)
    except Unseen as error:
        raise InputError(_unseen(subject, str(error))) from error
    block = _block(subject, layers, args.block)
    layer = layers[block]
    heads = list(range(layer.heads)) if args.head is None else args.head
    if any(not 0 <= head < layer.heads for head in heads):
        raise InputError(f"--head {' '.join(map(str, heads))}: {layer.name} has heads 0 to {layer.heads - 1}")
    if layer.asked is None:
        raise InputError(f"{layer.name} of {subject.name} attends in {layer}; {_others(layers)}")
    if args.query and layer.asking is None:
        raise InputError(f"--query: what asks in {layer.name} of {subject.name} is no cell of the image; leave it out")
    point = photo.place(*args.query) if args.query else None
    rolled = all(each.is_global and each.asking.grid == layer.asking.grid for each in layers)
    if not rolled:
        print_hint("no roll-out: it needs layers that all attend among all cells of one grid")

    def keep(index: int, seen: Attended) -> tuple[list[float] | None, Shown | None, Tensor | None]:
        shown = _shown(seen, point) if index == block else None
        return distances(seen), shown, seen.weights[0].mean(0) if rolled else None

    kept = watch(subject.model, images, keep)
    shown = kept[block][1]
    panels = {f"head {head}": shown.maps[head] for head in heads}
    if len(heads) > 1:
        every = len(heads) == layer.heads
        panels["mean of the heads" if every else "mean of these heads"] = shown.maps[heads].mean(0)
    if rolled:
        flow = Attended(layer, roll_out([mean for *_, mean in kept])[None, None], None)
        panels[f"roll-out of all {len(layers)} layers"] = _shown(flow, point).maps[0]
    numbers = {
        "layers": [_numbers(each, far) for each, (far, *_) in zip(layers, kept, strict=True)],
        "block": block,
        "query": shown.asks if shown.query is None else {"row": shown.query[0], "column": shown.query[1]},
        "panels": [
            # In units of equal attention, so that nearly equal attention is not mistaken for a finding.
            {"title": title, **_range(cells[shown.inside] * layer.keys), "weights": cells.tolist()}
            for title, cells in panels.items()
        ],
    }
    return _draw(subject, photo, layer, shown, point, numbers, args)


def _range(shares: Tensor) -> dict[str, float]:
    return {"least": float(shares.min()), "peak": float(shares.max())}


def _unseen(subject: Subject, lost: str) -> str:
    text = (
        f"{subject.name} has no attention that can be seen: that is a softmax times values, in "
        "scaled_dot_product_attention or written out, not in a kernel of one's own; `backbones show receptive-field` "
        "shows what a cell depends on in any backbone"
    )
    return f"{text} (not followed: {lost})" if lost else text


def _block(subject: Subject, layers: Sequence[AttentionLayer], block: int) -> int:
    if not -len(layers) <= block < len(layers):
        raise InputError(f"--block={block}: {subject.name} has {len(layers)} attention layers, 0 to {len(layers) - 1}")
    return block % len(layers)


def _others(layers: Sequence[AttentionLayer]) -> str:
    can = [str(i) for i, layer in enumerate(layers) if layer.asked is not None]
    return f"--block can be {', '.join(can)}" if can else "none of its layers can be shown; `receptive-field` can"


def _shown(seen: Attended, point: tuple[float, float] | None) -> Shown:
    """What the panels of a layer show: a pixel's cell, the class token, or all cells ask."""
    layer, asked = seen.layer, seen.layer.asked
    grid = asked.grid
    if point:
        group, token = _token(layer, point)
        maps = grid.spread(seen.weights[group, :, token], asked.of[group])
        inside = grid.spread(torch.ones_like(asked.of[group], dtype=torch.float), asked.of[group]) > 0
        cell = int(layer.asking.of[group, token])
        row = divmod(cell, layer.asking.grid.width)
        return Shown(maps.cpu(), inside.cpu(), "the cell marked", row)
    if layer.prefix:
        return _of_all(seen.weights[:, :, :1], layer, "class token")
    if layer.window:
        maps = by_offset(seen)
        return Shown(maps.cpu(), torch.ones_like(maps[0], dtype=torch.bool).cpu(), "mean over all cells, by offset")
    return _of_all(seen.weights, layer, "no cell of the image" if layer.asking is None else "mean over all cells")


def _of_all(weights: Tensor, layer: AttentionLayer, asks: str) -> Shown:
    mean = weights.mean(2).transpose(0, 1).flatten(1)  # (heads, groups * keys)
    of = layer.asked.of.flatten()
    inside = layer.asked.grid.spread(torch.ones_like(of, dtype=torch.float), of) > 0
    return Shown(layer.asked.grid.spread(mean, of).cpu(), inside.cpu(), asks)


def _token(layer: AttentionLayer, point: tuple[float, float]) -> tuple[int, int]:
    """Group and place in it of the token in whose cell a pixel is; of the nearest one where only some cells ask."""
    of, grid = layer.asking.of, layer.asking.grid
    found = (of == grid.cell(*point)).nonzero()
    if not len(found):
        here = torch.tensor((point[1], point[0]), device=of.device)
        far = (grid.middles(of) - here).norm(dim=-1).masked_fill(of < 0, float("inf"))
        found = torch.tensor([divmod(int(far.argmin()), of.shape[1])])
    return int(found[0, 0]), int(found[0, 1])


def _numbers(layer: AttentionLayer, far: list[float] | None) -> dict[str, Any]:
    def cells(of: Any) -> dict[str, Any] | None:
        return of and {"height": of.grid.height, "width": of.grid.width, "stride": list(of.grid.stride)}

    return {
        "name": layer.name,
        "attends": str(layer),
        "groups": layer.groups,
        "heads": layer.heads,
        "queries": layer.queries,
        "keys": layer.keys,
        "query_cells": cells(layer.asking),
        "key_cells": cells(layer.asked),
        "distance": far,
    }


def _draw(
    subject: Subject,
    photo: Photo,
    layer: AttentionLayer,
    shown: Shown,
    point: tuple[float, float] | None,
    numbers: dict[str, Any],
    args: argparse.Namespace,
) -> Picture:
    panels = numbers["panels"]
    far = [(i, each["distance"]) for i, each in enumerate(numbers["layers"]) if each["distance"]]
    count = 1 + len(panels) + bool(far)
    figure, axes = grid_of_panels(*shape_of(count, most=6), photo.size[0] / photo.size[1])
    by_cell = point is not None or layer.window is None
    asking = layer.asking or layer.asked
    frame = _frame(shown.inside, layer.asked.grid, photo.size) if by_cell else None
    draw_photo(axes.flat[0], photo, f"asks: {shown.asks}", asking.grid.stride if args.grid else None)
    if by_cell and not bool(shown.inside.all()):
        draw_outline(axes.flat[0], shown.inside.numpy(), layer.asked.grid.stride)
    _mark(axes.flat[0], point)
    for axis, panel in zip(axes.flat[1:], panels, strict=False):
        cells = np.array(panel["weights"])
        title = "{title}\n{least:.3g} to {peak:.3g} x uniform".format(**panel)
        if by_cell:
            low, high = np.quantile(cells[shown.inside.numpy()], (0, 0.995))
            if args.overlay is not None:  # the photograph is seen where nothing can be attended to
                cells = np.where(shown.inside, cells, np.nan)
            style = {"cmap": "inferno", "vmin": low, "vmax": high, "ground": ground(photo, args)}
            draw_map(axis, cells, layer.asked.grid.stride, photo.size, title, **style)
            _mark(axis, point)
            if frame:
                axis.set(xlim=frame[0], ylim=frame[1])
        else:
            _draw_by_offset(axis, cells, title)
    if far:
        axes.flat[count - 1].set_box_aspect(photo.size[0] / photo.size[1])
        _draw_distances(axes.flat[count - 1], far, numbers["block"])
    title = f"{subject.title}: attention of {layer.name}, {numbers['block'] + 1} of {len(numbers['layers'])} ({layer})"
    if not by_cell:
        title += "\nmean weight by offset of the key from the query (+), in cells of whole windows; --query shows one"
    if frame:
        title += "\nwhat can be attended to (cyan) and what is around it, enlarged; weights are zero elsewhere"
    set_heading(figure, title, size=9 if "\n" in title else 10)
    return Picture(figure, [numbers], {})


def _frame(inside: Tensor, grid: Grid, size: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Limits of x and y around cells that are near to each other: twice what they span, in the image's proportions."""
    spans = []
    for dim, stride, side in zip((1, 0), grid.stride, size, strict=True):
        lines = inside.any(dim).nonzero()[:, 0]
        first, last = int(lines[0]), int(lines[-1]) + 1
        spans.append(((first + last) / 2 * stride, (last - first) * stride / side, side))
    share = max(part for _, part, _ in spans)
    if share > NEAR:
        return None
    top, left = (min(max(0, middle - share * side), (1 - 2 * share) * side) for middle, _, side in spans)
    return (left, left + 2 * share * size[1]), (top + 2 * share * size[0], top)


def _mark(axis: Axes, point: tuple[float, float] | None) -> None:
    if point:
        axis.plot(*point, marker="+", markersize=10, markeredgewidth=2, color="cyan")


def _draw_by_offset(axis: Axes, cells: np.ndarray, title: str) -> None:
    down, right = (side / 2 for side in cells.shape)
    axis.imshow(cells, extent=(-right, right, down, -down), cmap="inferno", interpolation="nearest")
    axis.plot(0, 0, marker="+", markersize=8, color="cyan")
    axis.set_title(title, fontsize=TITLE)


def _draw_distances(axis: Axes, far: Sequence[tuple[int, list[float]]], block: int) -> None:
    axis.set_axis_on()
    for index, heads in far:
        colour = "tab:red" if index == block else "tab:blue"
        axis.scatter([index] * len(heads), heads, s=8, color=colour, alpha=0.7, linewidths=0)
    axis.set_title("mean attention distance\nof each head (px), by layer", fontsize=TITLE)
    last = far[-1][0]
    axis.set(xlim=(-0.15 * last - 1, last + 0.5), ylim=(0, 1.1 * max(max(heads) for _, heads in far)))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}" if value >= 0 else "")
    axis.yaxis.set_major_locator(MaxNLocator(6, prune="lower"))
    axis.tick_params(labelsize=7)
    axis.tick_params(axis="y", direction="in", pad=-4)  # within the panel, so that all panels stay in line
    for label in axis.get_yticklabels():
        label.set_horizontalalignment("left")
    axis.grid(alpha=0.3)
