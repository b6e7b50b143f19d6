"""`backbones predict segmentation`: a checkpoint and images in, overlays and masks out."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from backbones.errors import InputError

from .images import IMAGE_SUFFIXES, UNREADABLE, read_image
from .pictures import index_png, overlay, palette
from .runs import read_checkpoint

TASKS = ("segmentation",)


def predict(argv: Sequence[str]) -> int:
    """Runs the command; returns 0, or 1 if some images could not be read."""
    parser = argparse.ArgumentParser(
        prog="backbones predict",
        description="Label every pixel of images; writes OUT/overlays and OUT/masks, whose pixels are class indices.",
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--ckpt", required=True, type=Path, help="checkpoint of a run, such as checkpoints/best.ckpt")
    parser.add_argument("--images", required=True, type=Path, help="an image, or a folder with images in any depth")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--window", type=int, default=1024, help="larger images are read in windows of this side")
    parser.add_argument("--overlap", type=float, default=0.25, help="share of a window that its neighbour covers too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.window < 32 or not 0 <= args.overlap < 1:
        raise InputError(f"--window={args.window} must be at least 32, and --overlap={args.overlap} from 0 to under 1")

    sources = _find_images(args.images)  # before the model: a wrong path should not cost its loading
    task = load_task(args.ckpt, args.device)
    colours = palette(len(task.class_names))
    for folder in ("overlays", "masks"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    unreadable = {}
    for source, name in tqdm(sources, desc="predict", unit="image", disable=not sys.stderr.isatty()):
        try:
            image = np.asarray(read_image(source))
        except UNREADABLE as error:
            unreadable[source] = error
            continue
        mask = label(task, image, args.window, args.overlap)
        for folder, picture in (
            ("overlays", Image.fromarray(overlay(image, mask, colours))),
            ("masks", index_png(mask, colours)),
        ):
            path = args.out / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    labelled = len(sources) - len(unreadable)
    print(f"{labelled} of {len(sources)} images labelled: {args.out / 'overlays'}, {args.out / 'masks'}")
    for source, error in unreadable.items():
        print(f"not read: {source}: {error}", file=sys.stderr)
    return 1 if unreadable else 0


def load_task(checkpoint: Path, device: str = "cpu"):
    """The trained task in a checkpoint, in eval mode; the checkpoint alone says how to build it.

    Raises:
        WeightsError: it is missing, truncated, or no checkpoint of a segmentation run.
    """
    from .task import SegmentationTask

    read_checkpoint(checkpoint)
    task = SegmentationTask.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    return task.to(device).eval()


@torch.inference_mode()
def label(task: torch.nn.Module, image: np.ndarray, window: int, overlap: float) -> np.ndarray:
    """Class indices (H, W) of an image (H, W, 3) uint8; images larger than `window` are read in windows."""
    device = next(task.parameters()).device
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return slide(lambda part: task(part.to(device).float() / 255), pixels, window, overlap).argmax(0).cpu().numpy()


def slide(model: Callable[[Tensor], Tensor], image: Tensor, window: int, overlap: float) -> Tensor:
    """Class probabilities (classes, H, W) of an image (1, C, H, W), averaged where windows overlap.

    Args:
        model: from part of the image to its logits (1, classes, h, w).
        image: of any size; a side no larger than `window` is taken whole.
        window: side of the windows, in pixels.
        overlap: share of a window that the next one covers too.
    """
    height, width = image.shape[-2:]
    total = weight = None
    for top, bottom in _spans(height, window, overlap):
        for left, right in _spans(width, window, overlap):
            probabilities = model(image[..., top:bottom, left:right])[0].float().softmax(0)
            if total is None:
                total = probabilities.new_zeros(len(probabilities), height, width)
                weight = probabilities.new_zeros(height, width)
            # A window knows least about its rim, so it counts least there.
            ramp = _ramp(bottom - top, probabilities)[:, None] * _ramp(right - left, probabilities)
            total[:, top:bottom, left:right] += probabilities * ramp
            weight[top:bottom, left:right] += ramp
    return total / weight


def _spans(side: int, window: int, overlap: float) -> Iterator[tuple[int, int]]:
    """Evenly spread (start, end) that cover a side, each `window` long unless the side is shorter."""
    if side <= window:
        yield 0, side
        return
    step = max(1, round(window * (1 - overlap)))
    count = -(-(side - window) // step) + 1
    for i in range(count):
        start = round(i * (side - window) / (count - 1))
        yield start, start + window


def _ramp(length: int, like: Tensor) -> Tensor:
    """Weights (length,) that rise from the ends to the middle."""
    places = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(places, places.flip(0)) / length


def _find_images(path: Path) -> list[tuple[Path, str]]:
    """Images below a path, each with a name, relative to it, for what is made of it."""
    if path.is_file():
        return [(path, path.stem)]
    if not path.is_dir():
        raise InputError(f"--images={path}: no such file or folder")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"--images={path}: no images in it; these are read: {', '.join(sorted(IMAGE_SUFFIXES))}")
    stems = Counter(p.relative_to(path).with_suffix("") for p in found)
    names = [p.relative_to(path) for p in found]
    return [
        (p, str(n.with_suffix("") if stems[n.with_suffix("")] == 1 else n)) for p, n in zip(found, names, strict=True)
    ]
