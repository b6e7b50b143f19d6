"""`backbones show positions`: similarity of position embeddings, or relative position biases."""

import argparse
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from backbones import Backbone
from backbones.errors import InputError
from backbones.layers import LogPositionBias, RelativePositionBias

from .attention_weights import LONGEST_PREFIX
from .panels import Picture, set_heading, tile
from .photo import Photo
from .subject import Subject

SEVERAL = False
LOG_GRID = 8  # cells a side that biases computed for any offset are shown for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", nargs="?", help="taken as by the other kinds; positions are the same for any image"
    )


def photos(args: argparse.Namespace) -> list[Photo]:
    return []


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Picture:
    (subject,) = subjects
    biases = relative_biases(subject.model)
    if biases:
        return _draw_biases(subject, biases)
    for name, table in position_tables(subject.model):
        grid = _grid_of(len(table), subject.size)
        if grid:
            return _draw_similarities(subject, name, table[len(table) - grid[0] * grid[1] :], grid)
    raise InputError(
        f"{subject.name} has no table of positions that is known here; ViT and DeiT have one per cell, and Swin, "
        "CoAtNet, MaxViT and EfficientFormer one per offset"
    )


def position_tables(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Absolute position embeddings (N, C) by name: parameters and buffers (1, N, C) that are called so."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        own = name.rpartition(".")[2]
        if value.ndim == 3 and len(value) == 1 and own.startswith("pos") and value.is_floating_point():
            yield name, value[0].detach().float()


def relative_biases(model: Backbone) -> dict[str, Tensor]:
    """Biases by offset from key to query (heads, rows, columns), of each layer that has them, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (RelativePositionBias, LogPositionBias)):
            size = getattr(module, "size", (LOG_GRID, LOG_GRID))
            found[name.rpartition(".")[0]] = module.by_offset(*size).detach().float()
    for name, value in model.named_parameters():  # as Swin's authors call it, in timm and torchvision too
        side = math.isqrt(len(value)) if value.ndim else 0
        if name.endswith("relative_position_bias_table") and value.ndim == 2 and side * side == len(value):
            found[name.rpartition(".")[0]] = value.detach().float().T.unflatten(1, (side, side))
    return found


def similarities(table: Tensor) -> Tensor:
    """Cosine similarity (N, N) of position embeddings (N, C)."""
    unit = F.normalize(table, dim=1)
    return unit @ unit.T


def _grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of a table whose cells are about as many, for their number, as the image is wide and high."""
    for prefix in range(LONGEST_PREFIX + 1):
        cells = tokens - prefix
        rows = round(math.sqrt(max(0, cells) * size[0] / size[1]))
        if rows and cells % rows == 0 and abs(rows / (cells // rows) - size[0] / size[1]) < 0.5 / rows:
            return rows, cells // rows
    return None


def _draw_similarities(subject: Subject, name: str, table: Tensor, grid: tuple[int, int]) -> Picture:
    rows, columns = grid
    values = similarities(table).cpu().numpy()
    # A large grid has more maps than can be told apart: every nth one is shown.
    step = math.ceil(max(grid) / 16)
    shown_rows, shown_columns = range(step // 2, rows, step), range(step // 2, columns, step)
    maps = [values[r * columns + c].reshape(grid) for r in shown_rows for c in shown_columns]
    tiled = tile(maps, len(shown_columns), gap=max(1, max(grid) // 14))
    figure = Figure(figsize=(7.2, 6.4 * tiled.shape[0] / tiled.shape[1] + 0.7), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(tiled, cmap="viridis", vmin=min(0.0, float(np.nanmin(tiled))), vmax=1, interpolation="nearest")
    pitch = tiled.shape[0] / len(shown_rows), tiled.shape[1] / len(shown_columns)
    axis.set_xticks([(i + 0.5) * pitch[1] for i in range(len(shown_columns))], shown_columns, fontsize=7)
    axis.set_yticks([(i + 0.5) * pitch[0] for i in range(len(shown_rows))], shown_rows, fontsize=7)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set(xlabel="column of the position", ylabel="row of the position")
    bar = figure.colorbar(drawn, ax=axis, shrink=0.8, aspect=30)
    bar.set_label("cosine similarity with the position of each cell", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis.set_title(f"{subject.title}\n{name}: {rows} x {columns} positions, each with all others", fontsize=10)
    numbers = {"table": name, "rows": rows, "columns": columns, "cosine_similarity": values.tolist()}
    return Picture(figure, [numbers], {})


def _draw_biases(subject: Subject, biases: dict[str, Tensor]) -> Picture:
    limit = max(float(table.abs().max()) for table in biases.values()) or 1.0
    most = max(len(table) for table in biases.values())
    cell = min(0.8, 14 / most)
    figure = Figure(figsize=(most * cell + 2.6, len(biases) * (cell + 0.06) + 0.9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.01, hspace=0)
    axes = figure.subplots(len(biases), 1, squeeze=False)[:, 0]
    for axis, (name, table) in zip(axes, biases.items(), strict=True):
        # The other way around than stored, so that the right of the middle is a key to the right of the query.
        heads = table.flip(1, 2).cpu().numpy()
        height, width = heads.shape[1:]
        tiled = tile(list(heads), len(heads), gap=max(1, width // 8))
        drawn = axis.imshow(tiled, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        pitch = width + max(1, width // 8)
        axis.set(xlim=(-0.5, most * pitch - 0.5), yticks=[height / 2 - 0.5], xticks=[])
        axis.set_yticklabels([f"{name} ({height} x {width})"], fontsize=7)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.6, aspect=30)
    bar.set_label("added to the logits", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    set_heading(
        figure,
        f"{subject.title}\nrelative position bias by offset of the key from the query, a column for each head",
        size=9,
    )
    numbers = {name: table.flip(1, 2).tolist() for name, table in biases.items()}
    return Picture(figure, [{"bias_by_offset": numbers}], {})
