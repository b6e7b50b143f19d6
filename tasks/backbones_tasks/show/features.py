"""`backbones show features`: single channels of one level, or of what any module returns."""

import argparse
import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.cli.output import print_hint
from backbones.errors import InputError

from .grid import Grid, as_map
from .panels import (
    Picture,
    add_ground_arguments,
    draw_map,
    draw_photo,
    grid_of_panels,
    ground,
    set_heading,
    shape_of,
)
from .photo import Photo, add_image_arguments, image_size, read_photo
from .places import Places, modules_running, tensors_in, told
from .subject import Subject

SEVERAL = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_ground_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--level", type=int, metavar="N", help="index of the map, as in out_indices; default: stride 8")
    which.add_argument(
        "--module",
        metavar="NAME",
        help="what this module returns instead, such as stages.2.blocks.1: NCHW, NHWC, tokens or windows",
    )
    parser.add_argument("--channels", type=int, nargs="+", metavar="N", help="default: the 15 that vary most")


def photos(args: argparse.Namespace) -> list[Photo]:
    return [read_photo(args.image, image_size(args))]


def draw(subjects: Sequence[Subject], photos: Sequence[Photo], args: argparse.Namespace) -> Picture:
    (subject,), (photo,) = subjects, photos
    if args.module is None:
        position = subject.position(args.level, stride=8)
        stride = subject.model.strides[position]
        features = subject.maps(photo)[position]
        grid = Grid(*features.shape[1:], (stride, stride))
        of = {"level": subject.model.out_indices[position]}
        where = ""
    else:
        grid, features, shape = module_map(subject, photo, args.module)
        of = {"module": args.module, "shape": shape}
        where = f" of {args.module}"
    chosen = _channels(features, args.channels)
    shown = [{"channel": channel, **_numbers(features[channel])} for channel in chosen]
    shape = shape_of(len(chosen) + 1, most=max(4, math.ceil(math.sqrt(len(chosen) + 1))))
    figure, axes = grid_of_panels(*shape, photo.size[0] / photo.size[1], width=2.0, header=0.25)
    draw_photo(axes.flat[0], photo, cells=grid.stride if args.grid else None)
    for axis, channel, numbers in zip(axes.flat[1:], chosen, shown, strict=False):
        title = "{channel}: {low:.3g} to {high:.3g}".format(**numbers)
        style = {"cmap": "viridis", "vmin": numbers["low"], "vmax": numbers["high"], "ground": ground(photo, args)}
        draw_map(axis, features[channel].cpu().numpy(), grid.stride, photo.size, title, **style)
    stride = " x ".join(f"{side:.4g}" for side in dict.fromkeys(grid.stride))
    heading = f"{len(chosen)} of {len(features)} channels{where} at stride {stride} ({grid.height} x {grid.width})"
    set_heading(figure, f"{subject.title}: {heading}; colours are from the 1st to the 99th percentile of each")
    cells = {"stride": list(grid.stride), "height": grid.height, "width": grid.width, "channels": len(features)}
    return Picture(figure, [{**of, **cells, "shown": shown}], {})


def module_map(subject: Subject, photo: Photo, name: str) -> tuple[Grid, Tensor, list[int]]:
    """What a module returns, as a map over the photograph.

    Returns:
        The cells; the map (C, h, w), NaN where there is no value; and the shape that the module returned.

    Raises:
        InputError: there is no such module, it does not run, or what it returns is no map.
    """
    modules = dict(subject.model.named_modules())
    if name not in modules or not name:
        near = difflib.get_close_matches(name, modules, n=3)
        parts = list(dict.fromkeys(n.split(".")[0] for n in modules if n))
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(parts)} and what is in these"
        raise InputError(f"--module={name}: {subject.name} has no module of this name; {hint}")
    returned: list[Tensor | None] = []

    def see(module: Any, inputs: Any, output: Any) -> None:
        values = list(output.values()) if isinstance(output, dict) else output
        returned.append(next((x for x in tensors_in(values) if x.is_floating_point()), None))

    images = subject.images(photo)
    handle = modules[name].register_forward_hook(see)
    try:
        with modules_running(subject.model) as running, torch.enable_grad(), Places(images, running) as places:
            subject.model(images)
    finally:
        handle.remove()
    if not returned:
        raise InputError(f"--module={name}: {subject.name} does not run it when it makes maps")
    if len(returned) > 1:
        print_hint(f"{name} runs {len(returned)} times; the first is shown")
    values = returned[0]
    where = None if values is None else places.of(values)
    found = None if where is None else as_map(values.detach(), where, photo.size)
    if found is None:
        what = "no tensor" if values is None else f"a tensor of shape {tuple(values.shape)}"
        lost = f" (not followed: {told(places.lost)})" if values is not None and where is None and places.lost else ""
        raise InputError(f"--module={name}: it returns {what}, whose values are of no cells of the image{lost}")
    return (*found, list(values.shape))


def _channels(features: Tensor, given: Sequence[int] | None) -> list[int]:
    if given is None:
        varied = features.flatten(1).nan_to_num().var(1, correction=0)
        return sorted(varied.topk(min(15, len(features))).indices.tolist())
    wrong = [channel for channel in given if not 0 <= channel < len(features)]
    if wrong:
        raise InputError(f"--channels: there is no {wrong[0]}; the level has channels 0 to {len(features) - 1}")
    return list(given)


def _numbers(cells: Tensor) -> dict[str, float]:
    """Of a channel (h, w): mean, standard deviation, and 1st and 99th percentile, which the colours span."""
    known = cells[~cells.isnan()].double().cpu().numpy()
    low, high = np.quantile(known, (0.01, 0.99))
    return {"mean": float(known.mean()), "std": float(known.std()), "low": float(low), "high": float(high)}
