"""`backbones show attention`: what the heads of a block attend to, and the roll-out of all blocks."""

import argparse
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from backbones.cli.output import print_hint
from backbones.errors import InputError

from .attention_weights import AttentionLayer, Grid, attention_layers, attention_weights, by_offset, roll_out, unmasked
from .panels import draw_map, draw_photo, grid_of_panels, set_heading, shape_of
from .photo import Photo, add_image_arguments, image_size, read_photo
from .subject import Subject

SEVERAL = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
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


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Figure:
    (subject,), (photo,) = subjects, photos
    images = subject.images(photo)
    layers = attention_layers(subject.model, images)
    block = _block(subject, layers, args.block)
    layer = layers[block]
    heads = list(range(layer.heads)) if args.head is None else args.head
    if any(not 0 <= head < layer.heads for head in heads):
        raise InputError(f"--head {' '.join(map(str, heads))}: {layer.name} has heads 0 to {layer.heads - 1}")
    title = f"{subject.title}: attention of {layer.name}, {block + 1} of {len(layers)} ({layer})"
    if layer.grids:
        return _draw_on_image(subject, photo, images, layers, block, heads, args.query, title)
    if layer.window and args.query:
        raise InputError(
            f"--query: {layer.name} of {subject.name} attends within windows, whose place in the image cannot be "
            "told from outside; without --query, the mean weight by offset is shown"
        )
    if layer.window:
        return _draw_by_offset(subject, images, layer, block, heads, title)
    raise InputError(
        f"{layer.name} of {subject.name} attends in {layer}, which are no cells of a grid over the image; "
        f"{_others(layers)}"
    )


def _block(subject: Subject, layers: Sequence[AttentionLayer], block: int) -> int:
    if not layers:
        raise InputError(
            f"{subject.name} has no attention between cells; ViT, DeiT, Swin, PVTv2, Twins, CoAtNet and MaxViT do, "
            "and `backbones show receptive-field` shows what a cell depends on in any backbone"
        )
    if not -len(layers) <= block < len(layers):
        raise InputError(f"--block={block}: {subject.name} has {len(layers)} attention layers, 0 to {len(layers) - 1}")
    return block % len(layers)


def _others(layers: Sequence[AttentionLayer]) -> str:
    can = [str(i) for i, layer in enumerate(layers) if layer.grids or layer.window]
    return f"--block can be {', '.join(can)}" if can else "none of its layers can be shown; `receptive-field` can"


def _draw_on_image(
    subject: Subject,
    photo: Photo,
    images: Tensor,
    layers: Sequence[AttentionLayer],
    block: int,
    heads: Sequence[int],
    query: Sequence[float] | None,
    title: str,
) -> Figure:
    queries, keys = layers[block].grids
    rolled = all(layer.is_global and layer.grids == layers[0].grids for layer in layers)
    if not rolled:
        print_hint("no roll-out: it needs layers that all attend among all cells of one grid")
    point = photo.place(*query) if query else None

    def keep(index: int, weights: Tensor) -> tuple[Tensor | None, Tensor | None]:
        mine = weights[0] if index == block else None
        return mine, weights[0].mean(0) if rolled else None

    kept = attention_weights(subject.model, images, keep)
    weights = kept[block][0]
    panels = [(f"head {head}", weights[head]) for head in heads]
    if len(heads) > 1:
        panels.append(
            ("mean of these heads" if len(heads) < len(weights) else "mean of the heads", weights[heads].mean(0))
        )
    if rolled:
        panels.append((f"roll-out of all {len(layers)} blocks", roll_out([mean for _, mean in kept])))

    figure, axes = grid_of_panels(*shape_of(len(panels) + 1, most=6), photo.size[0] / photo.size[1])
    draw_photo(axes.flat[0], photo, f"query: {_query_name(queries, point)}")
    _mark(axes.flat[0], point)
    for axis, (name, matrix) in zip(axes.flat[1:], panels, strict=False):
        row = _row(matrix, queries, point)[keys.prefix :]
        cells = row.unflatten(0, (keys.height, keys.width)).cpu().numpy()
        # Told in units of equal attention, so that nearly equal attention is not mistaken for a finding.
        peak = cells.max() * matrix.shape[-1]
        high = np.quantile(cells, 0.995)
        draw_map(axis, cells, keys.stride, photo.size, f"{name}\npeak {peak:.3g} x uniform", cmap="inferno", vmax=high)
        _mark(axis, point)
    set_heading(figure, title)
    return figure


def _row(matrix: Tensor, queries: Grid, point: tuple[float, float] | None) -> Tensor:
    """Weights over the keys of what asks: a pixel's cell, the class token or all cells."""
    if point:
        return matrix[queries.token(*point)]
    return matrix[0] if queries.prefix else matrix.mean(0)


def _query_name(queries: Grid, point: tuple[float, float] | None) -> str:
    if point:
        return "the cell marked"
    return "class token" if queries.prefix else "mean over all cells"


def _mark(axis: Axes, point: tuple[float, float] | None) -> None:
    if point:
        axis.plot(*point, marker="+", markersize=10, markeredgewidth=2, color="cyan")


def _draw_by_offset(
    subject: Subject, images: Tensor, layer: AttentionLayer, block: int, heads: Sequence[int], title: str
) -> Figure:
    def keep(index: int, weights: Tensor) -> tuple[np.ndarray, int] | None:
        if index != block:
            return None
        chosen = unmasked(weights)
        return by_offset(chosen).cpu().numpy(), len(chosen)

    offsets, windows = attention_weights(subject.model, images, keep)[block]
    figure, axes = grid_of_panels(*shape_of(len(heads), most=6), 1.0, width=1.9)
    reach = layer.window - 0.5
    for axis, head in zip(axes.flat, heads, strict=False):
        peak = offsets[head].max() * layer.keys
        axis.imshow(offsets[head], extent=(-reach, reach, reach, -reach), cmap="inferno", interpolation="nearest")
        axis.plot(0, 0, marker="+", markersize=8, color="cyan")
        axis.set_title(f"head {head}\npeak {peak:.3g} x uniform", fontsize=8)
    set_heading(
        figure,
        f"{title}\nmean weight by offset from the query (+), in places of the window; {windows} are not cut by a mask",
        size=9,
    )
    return figure
