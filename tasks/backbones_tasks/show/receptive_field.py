"""`backbones show receptive-field`: how much each pixel sways the centre cell of each level.

The effective receptive field (Luo et al., https://arxiv.org/abs/1701.04128): the size of the gradient of the centre
cell by each pixel, over images, photographs or noise.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Circle
from torch import Tensor

from backbones import Backbone
from backbones.errors import InputError

from .panels import (
    TITLE,
    Ground,
    Picture,
    add_ground_arguments,
    draw_borders,
    draw_map,
    grid_of_panels,
    ground,
    rows_of_panels,
    set_heading,
    shape_of,
)
from .photo import Photo, add_image_arguments, image_size, read_photo
from .subject import Subject

SEVERAL = True
SHARES = (0.5, 0.9)
Levels = list[tuple[int, Tensor]]  # strides, which may be equal, and fields
FLOOR = -4.0  # log10 of the smallest gradient, relative to the largest, that the colours tell from none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser, nargs="*", what="photographs; without any, images of noise")
    add_ground_arguments(parser)
    parser.add_argument("--level", type=int, metavar="N", help="index of the map, as in out_indices; default: all")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="gradients to average; default 8")


def photos(args: argparse.Namespace) -> list[Photo]:
    if args.samples < max(1, len(args.image)):
        raise InputError(f"--samples={args.samples} must be at least 1, and one for each image")
    if args.overlay is not None and not args.image:
        raise InputError("--overlay: images of noise are nothing to draw over; give a photograph")
    size = image_size(args)
    if len(args.image) > 1 and len(size) == 1:
        size = (size[0], size[0])  # gradients are averaged pixel by pixel
    return [read_photo(path, size) for path in args.image]


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Picture:
    size = photos[0].size if photos else (args.size[0], args.size[-1])
    fields = [_fields(subject, photos, size, args) for subject in subjects]
    numbers = [
        [
            {"stride": stride, "radius": {f"{share:g}": radius(field, stride, share) for share in SHARES}}
            for stride, field in levels
        ]
        for levels in fields
    ]
    under = ground(photos[0] if photos else Photo(np.zeros((*size, 3), dtype=np.uint8)), args)
    draw_all = _draw_rows if args.level is None else _draw_side_by_side
    figure = draw_all(subjects, fields, numbers, under)
    what = f"{len(photos)} photographs" if len(photos) > 1 else "a photograph" if photos else "images of noise"
    set_heading(
        figure,
        f"Effective receptive field of the centre cell on {what}, {size[1]} x {size[0]}; "
        f"circles hold {' and '.join(f'{share:.0%}' for share in SHARES)} of the gradient",
    )
    return Picture(figure, [{"levels": levels} for levels in numbers], {"samples": args.samples, "size": list(size)})


def _fields(subject: Subject, photos: Sequence[Photo], size: tuple[int, int], args: argparse.Namespace) -> Levels:
    """Receptive fields of the level that is asked for, or of all."""
    strides = subject.model.strides
    levels = range(len(strides)) if args.level is None else [subject.position(args.level)]
    generator = torch.Generator().manual_seed(args.seed)
    images = [subject.images(photo) for photo in photos]
    images = images or [torch.randn(1, 3, *size, generator=generator) for _ in range(args.samples)]
    samples = [images[i % len(images)].to(subject.device) for i in range(args.samples)]
    fields = receptive_fields(subject.model, samples, levels, generator)
    return [(strides[level], field) for level, field in zip(levels, fields, strict=True)]


def _draw_rows(subjects: Sequence[Subject], fields: Sequence[Levels], numbers: Any, under: Ground) -> Figure:
    height, width = under.photo.size
    figure, _, rows = rows_of_panels([s.title for s in subjects], max(map(len, fields)), height / width)
    for row, levels, told in zip(rows, fields, numbers, strict=True):
        for axis, (stride, field), level in zip(row, levels, told, strict=False):
            drawn = _draw_field(axis, field, stride, level, under)
        _add_bar(drawn, list(row))
    return figure


def _draw_side_by_side(subjects: Sequence[Subject], fields: Sequence[Levels], numbers: Any, under: Ground) -> Figure:
    height, width = under.photo.size
    figure, axes = grid_of_panels(*shape_of(len(subjects), most=4), height / width, header=0.62)
    for axis, subject, ((stride, field),), (level,) in zip(axes.flat, subjects, fields, numbers, strict=False):
        drawn = _draw_field(axis, field, stride, level, under)
        axis.set_title(f"{subject.name}\n{subject.weights}\n{axis.get_title()}", fontsize=TITLE)
    _add_bar(drawn, list(axes.flat))
    return figure


def receptive_fields(
    model: Backbone, images: Iterable[Tensor], levels: Iterable[int], generator: torch.Generator
) -> list[Tensor]:
    """Size of the gradient of the centre cell of some levels by each pixel.

    The cell's channels are projected on a random direction, another one for each image, so that the mean square of
    the gradients estimates the squares summed over all channels. (A plain sum over the channels would not do: where a
    LayerNorm has just made it constant, its gradient is zero.)

    Args:
        model: in eval mode.
        images: (1, C, H, W) each, of one size.
        levels: positions in the list of maps that the model returns.
        generator: draws the directions, on the CPU.

    Returns:
        (H, W) of each level: the root of the mean square over the images, the squares summed over their channels.
    """
    levels = list(levels)
    squares: list[Tensor | float] = [0.0] * len(levels)
    count = 0
    for image in images:
        image = image.detach().clone().requires_grad_()
        with torch.enable_grad():
            maps = model(image)
            for i, level in enumerate(levels):
                cell = maps[level][0, :, maps[level].shape[2] // 2, maps[level].shape[3] // 2]
                direction = torch.randn(len(cell), generator=generator).to(cell)
                (gradient,) = torch.autograd.grad(cell @ direction, image, retain_graph=level != levels[-1])
                squares[i] = squares[i] + gradient[0].float().square().sum(0)
        count += 1
    return [(square / count).sqrt().cpu() for square in squares]


def centre(field: Tensor, stride: int) -> tuple[float, float]:
    """Middle, as (y, x) in pixels, of the cell whose gradient it is."""
    y, x = ((math.ceil(side / stride) // 2 + 0.5) * stride for side in field.shape)
    return y, x


def radius(field: Tensor, stride: int, share: float) -> float:
    """Pixels around the cell's middle that hold a share of the gradient: the radius of the circle."""
    y, x = centre(field, stride)
    rows = torch.arange(field.shape[0])[:, None] + 0.5 - y
    columns = torch.arange(field.shape[1]) + 0.5 - x
    distances, order = (rows.square() + columns.square()).sqrt().flatten().sort()
    held = field.flatten()[order].double().cumsum(0)
    return float(distances[min(int((held < share * held[-1]).sum()), len(held) - 1)])


def _add_bar(drawn: AxesImage, axes: list[Axes]) -> None:
    bar = axes[0].figure.colorbar(drawn, ax=axes, shrink=0.9, aspect=15, extend="min")
    bar.set_label("log10 of gradient / largest", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _draw_field(axis: Axes, field: Tensor, stride: int, level: dict[str, Any], under: Ground) -> AxesImage:
    radii = level["radius"]
    logarithm = (field / field.max().clamp(min=1e-30)).clamp(min=1e-30).log10().numpy()
    if under.alpha is not None:
        logarithm = np.where(logarithm < FLOOR, np.nan, logarithm)  # the photograph is seen where there is none
    title = f"stride {stride}\n" + ", ".join(f"{float(share):.0%} in {r:.0f} px" for share, r in radii.items())
    style = {"cmap": "magma", "vmin": FLOOR, "vmax": 0}
    drawn = draw_map(axis, logarithm, 1, tuple(field.shape), title, Ground(under.photo, under.alpha, False), **style)
    if under.grid:
        draw_borders(axis, tuple(field.shape), stride)
    y, x = centre(field, stride)
    for r, line in zip(radii.values(), ("-", "--"), strict=True):
        axis.add_patch(Circle((x, y), r, fill=False, edgecolor="cyan", linewidth=1, linestyle=line))
    return drawn
