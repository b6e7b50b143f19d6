"""`backbones show shift`: how features change when the image moves by a few pixels, backbones side by side.

A window slides over the photograph, so that no border comes into it. The features of the middle of the window are
compared with those of the first window at the same place of the photograph, interpolated between its cells.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from backbones.errors import InputError

from .panels import TITLE, ChannelColours, Picture, draw_map, rows_of_panels, set_heading
from .photo import Photo, add_image_arguments, image_size, read_photo
from .subject import Subject

SEVERAL = True
WORST = 1.5  # change that the colours tell from more: unrelated features differ by the root of 2
MARGIN = 0.25  # of each side: left out, because what is beyond the border comes into it


@dataclass(frozen=True)
class Change:
    """What a shift did to the features.

    Args:
        relative: norm of the change over the norm of the features, their mean over the cells taken off.
        cosine: mean over the cells of the cosine similarity, the same mean taken off.
        cells: (h, w): norm of the change of each cell, over the root mean square norm of a cell.
    """

    relative: float
    cosine: float
    cells: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "--level", type=int, metavar="N", help="index of the map, as in out_indices; default: stride 16"
    )


def photos(args: argparse.Namespace) -> list[Photo]:
    return [read_photo(args.image, image_size(args))]


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Picture:
    (photo,) = photos
    positions = [subject.position(args.level, stride=16) for subject in subjects]
    strides = [subject.model.strides[position] for subject, position in zip(subjects, positions, strict=True)]
    window, furthest = _window(photo, strides, [s for subject in subjects for s in subject.model.strides])
    step = max(1, max(strides) // 16)
    headings = [f"{subject.title}: stride {stride}" for subject, stride in zip(subjects, strides, strict=True)]
    figure, top, axes = rows_of_panels(headings, 5, window[0] / window[1], width=2.1, top=2.9)
    image_axis, *curves = top.subplots(1, 4)
    _draw_windows(image_axis, photo, window, max(strides))
    numbers = []
    for subject, position, stride, row in zip(subjects, positions, strides, axes, strict=True):
        levels = [i for i, s in enumerate(subject.model.strides) if s <= furthest]
        shifts = {i: _shifts(subject.model.strides[i], step if i == position else None) for i in levels}
        maps = shifted_maps(subject, photo, window, sorted(set().union(*shifts.values())))
        changes = {
            i: {s: change(maps[0][i], maps[s][i], s / subject.model.strides[i]) for s in shifts[i]} for i in levels
        }
        numbers.append({"levels": [_numbers(subject, i, changes[i]) for i in levels]})
        _draw_curves(curves, subject.name, numbers[-1]["levels"], levels.index(position))
        own = {shift: maps[shift][position] for shift in shifts[position]}
        _draw_maps(row, stride, window, own, changes[position])
    _finish_curves(curves)
    set_heading(
        figure, "Features when the image is shifted; their change is told for the middle (white frame), realigned"
    )
    return Picture(figure, numbers, {"window": list(window)})


def _shifts(stride: int, step: int | None) -> list[int]:
    """Half a cell and a whole one; with a step, all between."""
    return sorted({0, stride // 2, stride, *(range(0, stride, step) if step else ())})


def _numbers(subject: Subject, position: int, changes: Mapping[int, Change]) -> dict[str, Any]:
    return {
        "level": subject.model.out_indices[position],
        "stride": subject.model.strides[position],
        "changes": [
            {"shift": shift, "relative": each.relative, "cosine": each.cosine} for shift, each in changes.items()
        ],
    }


def shifted_maps(
    subject: Subject, photo: Photo, window: tuple[int, int], shifts: Sequence[int]
) -> dict[int, list[Tensor]]:
    """By shift, the maps (C, h, w) of the window of a photo that lies so many pixels to the right of the first."""
    height, width = window
    return {
        shift: subject.maps(Photo(np.ascontiguousarray(photo.pixels[:height, shift : shift + width])))
        for shift in shifts
    }


def change(first: Tensor, shifted: Tensor, cells: float) -> Change:
    """How features differ from those of the same place before.

    Args:
        first: (C, h, w) of the first window.
        shifted: (C, h, w) of a window to the right of it.
        cells: how far, in cells of the maps; up to 1.
    """
    whole = math.floor(cells)
    share = cells - whole
    rows, columns = (_middle(side) for side in first.shape[1:])
    expected = [first[:, rows, columns.start + step : columns.stop + step] for step in (whole, whole + (share > 0))]
    expected = torch.lerp(expected[0], expected[1], share)
    found = shifted[:, rows, columns]
    mean = expected.mean((1, 2), keepdim=True)
    difference = (found - expected).norm(dim=0)
    size = (expected - mean).norm(dim=0).square().mean().sqrt().clamp(min=1e-12)
    cosine = torch.cosine_similarity(found - mean, expected - mean, dim=0)
    return Change(
        relative=float(difference.square().mean().sqrt() / size),
        cosine=float(cosine.mean()),
        cells=difference / size,
    )


def _middle(side: int) -> slice:
    """Cells away from the borders, from which the neighbour to the right can be reached."""
    margin = min(math.ceil(side * MARGIN), (side - 1) // 2)
    return slice(margin, side - margin)


def _window(photo: Photo, shown: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, int], int]:
    """Height and width of the window, whole cells of every map, so that none is padded; and the coarsest stride."""
    unit = math.lcm(32, *strides)
    height, width = photo.size
    for furthest in sorted({stride for stride in strides if stride >= max(shown)}, reverse=True):
        window = height // unit * unit, (width - furthest) // unit * unit
        if min(window) >= 4 * furthest:
            return window, furthest
    needed = -(-4 * max(shown) // unit) * unit
    raise InputError(
        f"the image of {height} x {width} is too small for shifts at stride {max(shown)}; "
        f"--size {needed + unit} or more will do"
    )


def _draw_curves(curves: Sequence[Axes], name: str, levels: Sequence[dict[str, Any]], shown: int) -> None:
    """Of the level shown, change by shift; of all levels, change by half a cell, which is the worst as a rule."""
    relative, cosine, by_level = curves
    changes = levels[shown]["changes"]
    for axis, key in ((relative, "relative"), (cosine, "cosine")):
        axis.plot([c["shift"] for c in changes], [c[key] for c in changes], marker="o", markersize=3, label=name)
    half = [next(c for c in level["changes"] if c["shift"] == level["stride"] // 2) for level in levels]
    by_level.plot([str(level["stride"]) for level in levels], [c["relative"] for c in half], marker="o", markersize=3)


def _finish_curves(curves: Sequence[Axes]) -> None:
    titles = (
        "relative change of\nrealigned features",
        "cosine similarity of\nrealigned features",
        ("relative change by half a cell"),
    )
    for axis, title in zip(curves, titles, strict=True):
        axis.set_xlabel("shift (pixels)", fontsize=8)
        axis.set_title(title, fontsize=TITLE)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    curves[2].set_xlabel("stride", fontsize=8)
    curves[0].set_ylim(bottom=0)
    curves[2].set_ylim(bottom=0)
    curves[0].legend(fontsize=8)


def _draw_windows(axis: Axes, photo: Photo, window: tuple[int, int], furthest: int) -> None:
    draw_map(axis, photo.pixels, 1, photo.size, f"the window, and shifted by {furthest} px")
    axis.set_axis_off()
    for left, style in ((0, "-"), (furthest, "--")):
        frame = Rectangle((left, 0), window[1], window[0], fill=False, edgecolor="cyan", linestyle=style, linewidth=1.5)
        axis.add_patch(frame)


def _draw_maps(
    row: Sequence[Axes], stride: int, window: tuple[int, int], maps: dict[int, Tensor], changes: dict[int, Change]
) -> None:
    half = min(maps, key=lambda shift: abs(shift - stride / 2))
    colours = ChannelColours(maps[0])
    titles = {0: "not shifted", half: f"shifted by {half} px", stride: f"shifted by {stride} px"}
    for axis, (shift, title) in zip(row, titles.items(), strict=False):
        draw_map(axis, colours(maps[shift]), stride, window, title)
    top, left = (_middle(side).start * stride for side in maps[0].shape[1:])
    for axis, shift in zip(row[3:], (half, stride), strict=True):
        drawn = axis.imshow(
            changes[shift].cells.cpu().numpy(), cmap="magma", vmin=0, vmax=WORST, interpolation="nearest"
        )
        axis.set_title(f"change by {shift} px: {changes[shift].relative:.2g}", fontsize=TITLE)
    row[0].add_patch(
        Rectangle((left, top), window[1] - 2 * left, window[0] - 2 * top, fill=False, edgecolor="white", linewidth=1)
    )
    bar = row[4].figure.colorbar(drawn, ax=row[4], shrink=0.8, extend="max")
    bar.ax.tick_params(labelsize=7)
