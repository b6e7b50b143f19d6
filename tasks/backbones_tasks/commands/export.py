"""`backbones export SOURCE`: a model as one file, for onnxruntime or torch.export, checked against PyTorch."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import backbones
from backbones import Backbone, build_backbone, hub, saving
from backbones.cli.output import print_hint, print_table
from backbones.errors import InputError

from ..files import is_checkpoint
from ..models.export import EXAMPLE, SUFFIXES, TOLERANCE, export_model
from ..models.pretrained import from_pretrained
from ..options import TRAINING, key_values, require


def command(argv: Sequence[str]) -> int:
    """`backbones export SOURCE --format onnx | torch-export`."""
    args = _parser().parse_args(list(argv))
    suffix = SUFFIXES[args.format]
    out = args.out or Path(f"{_default_name(args.source)}{suffix}")
    if out.suffix != suffix:
        raise InputError(f"--out={out}: a file of --format {args.format} ends in {suffix}")
    model = load_source(args.source, pretrained=args.pretrained, options=key_values(args.option))
    if isinstance(model, Backbone) and not hasattr(model, "load_report"):
        print_hint(f"{model.canonical_name} has random weights; --pretrained loads published ones")
    exported = export_model(
        model,
        out,
        format=args.format,
        normalise=not args.normalised,
        size=tuple(args.size),
        fixed_size=args.fixed_size,
        opset=args.opset,
        tolerance=args.tolerance,
    )
    told = exported.metadata
    images = "images that are normalised already" if args.normalised else "images in [0, 1]"
    print(f"{told['task']} on {told['backbone']}: {images} -> {', '.join(told['outputs'])}")
    rows = [(" x ".join(map(str, d.images)), f"{d.worst:.1e}", f"{d.largest:.3g}") for d in exported.differences]
    print_table(("images", "difference to PyTorch", "largest output"), rows)
    sides = " x ".join(map(str, told["least_sides"]))
    which = f"of {sides} alone" if args.fixed_size else f"of any size from {sides} on"
    parts = [part for part in (exported.file, exported.file.with_name(f"{exported.file.name}.data")) if part.is_file()]
    megabytes = sum(part.stat().st_size for part in parts) / 1e6
    print(f"{out}: {megabytes:.1f} MB in {exported.seconds:.0f} s, for batches of any length and images {which}")
    return 0


def load_source(source: str, *, pretrained: bool | str = False, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A model to export, in eval mode.

    Args:
        source: a checkpoint of `backbones fit`, a folder of `save_pretrained`, or a backbone's name
        pretrained, options: of a backbone by name, see `build_backbone`

    Raises:
        InputError, WeightsError, UnknownBackbone, MissingDependency: as what loads the source
    """
    path = Path(source).expanduser()
    is_saved = (path / saving.CONFIG).is_file()
    is_trained = is_checkpoint(path) or path.suffix == ".ckpt"
    if (is_saved or is_trained) and (pretrained or options):
        raise InputError(f"{source} has weights and options of its own; leave out --pretrained and --option")
    if is_saved:
        config, _ = hub.read_folder(path)
        return (from_pretrained if "task" in config else backbones.from_pretrained)(path).eval()
    if is_trained:
        require("export of a checkpoint", "train", *TRAINING)
        from ..training.tasks import load_model  # plain backbones need nothing for training

        return load_model(path)
    if (path / "checkpoints").is_dir():
        raise InputError(
            f"{source} is a run; name one of its checkpoints, such as {path / 'checkpoints' / 'best.ckpt'}"
        )
    torch.manual_seed(0)
    return build_backbone(source, pretrained=pretrained, **(options or {})).eval()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="backbones export",
        description="Write a model as one file for onnxruntime or torch.export, for images of any size, and compare it "
        "with PyTorch at three sizes. A file that computes something else is an error and is not left behind. Images "
        "are normalised inside unless --normalised is given. Names of classes, mean, std, strides and the backbone's "
        "id stand in the file's metadata.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="checkpoint of `backbones fit` (segmentation, classification), folder of save_pretrained, or a backbone",
    )
    parser.add_argument("--format", choices=list(SUFFIXES), default="onnx", help="default: onnx")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"ends in {' or '.join(SUFFIXES.values())}")
    parser.add_argument(
        "--normalised",
        action="store_true",
        help="take images that are normalised already, instead of images in [0, 1]",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), default=EXAMPLE, help="of the example that is traced"
    )
    parser.add_argument("--fixed-size", action="store_true", help="for images of --size alone; batches stay dynamic")
    parser.add_argument("--opset", type=int, help="of ONNX; default: torch's")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference to PyTorch, relative to the largest output (default: %(default)s)",
    )
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const=True,
        default=False,
        metavar="TAG|PATH",
        help="of a backbone by name: weights; alone, the first published ones; left out, random ones",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of a backbone by name, see build_backbone"
    )
    return parser


def _default_name(source: str) -> str:
    """What a file is called: after the backbone, the folder, or the run and the checkpoint."""
    path = Path(source)
    if path.suffix == ".ckpt":
        return f"{path.absolute().parent.parent.name}-{path.stem}"
    return path.absolute().name if path.is_dir() else source.replace("/", "-")
