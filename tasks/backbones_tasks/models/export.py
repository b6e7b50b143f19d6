"""`backbones export SOURCE`: a model as one file, for onnxruntime or torch.export, checked against PyTorch."""

import contextlib
import copy
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backbones import Backbone, for_inference, saving
from backbones.errors import BackboneError, InputError, MissingDependency
from backbones.layers.padding import is_exporting

from ..models.classifier import Classifier
from ..models.segmenter import Segmenter
from ..options import require

__all__ = ["ExportError", "Exported", "export_model"]

#: What a file is called, by format.
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
#: Batches and sizes at which what was written is compared with the model.
CHECKED = ((1, 256, 256), (2, 333, 500), (1, 512, 384))
#: Sides of the example that is traced. No stride divides them, so that what pads is traced as well.
EXAMPLE = (299, 427)
#: Largest difference to the model, relative to its largest output.
TOLERANCE = 1e-4


def _or_fix_size(fixed_size: bool, when: str = "") -> str:
    """The end of an error: what to do where the model was to be exported for images of any size."""
    return "" if fixed_size else f"; {when}--fixed-size and --size H W export it for one size"


class ExportError(BackboneError):
    """A model cannot be exported, or what was exported does not compute what the model does."""


@dataclass(frozen=True)
class Difference:
    """How far the outputs of an exported model are from the model's, for images of one shape."""

    images: tuple[int, ...]
    worst: float
    largest: float


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        file: an .onnx or .pt2 file; weights of over 2 GB lie beside an .onnx file, in one of its name and `.data`
        metadata: as it stands in the file
        differences: one for each shape that was checked
        seconds: that it took, checks aside
    """

    file: Path
    metadata: dict[str, Any]
    differences: list[Difference]
    seconds: float


class Deployable(nn.Module):
    """A model as it is deployed: images (B, C, H, W) in [0, 1] in, its outputs out.

    Args:
        model: a backbone, a segmenter or a classifier, on the CPU, in float32 and in eval mode
        normalise: False to take images that are normalised already
    """

    def __init__(self, model: nn.Module, normalise: bool = True):
        super().__init__()
        self.model = model
        backbone = inner_backbone(self.model)
        self.name: str = getattr(backbone, "canonical_name", type(backbone).__name__)
        config = getattr(backbone, "pretrained_cfg", None) or {}
        self.statistics = {name: list(config.get(name, ())) for name in ("mean", "std")}
        self.channels: int = getattr(backbone, "in_chans", len(self.statistics["mean"]) or 3)
        self.normalise = normalise
        if not normalise:
            return
        for name, values in self.statistics.items():
            if len(values) != self.channels:
                raise InputError(
                    f"{self.name} takes {self.channels} channels, and its statistics are of {len(values)}: export it "
                    "for images that are normalised already, by --normalised"
                )
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        return self.model((images - self.mean) / self.std if self.normalise else images)


def inner_backbone(model: nn.Module) -> nn.Module:
    """The backbone in a model, or the model if it is one."""
    inner: Any = model if isinstance(model, Backbone) else model.inner_backbone
    return inner


def export_model(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    format: str = "onnx",
    normalise: bool = True,
    size: tuple[int, int] = EXAMPLE,
    fixed_size: bool = False,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a model as a file that runs without this library, and compare what it computes with the model.

    The file takes float images (B, C, H, W) of any batch, height and width under the name `images`, and returns
    `logits`, or `map0`, `map1`, ... of a backbone.

    Args:
        model: a backbone, or what `build_segmenter` and `build_classifier` return
        file: to be written, and replaced; it stays as it was where anything fails
        format: "onnx", or "torch-export" for a program that `torch.export.load` reads
        normalise: whether images are normalised inside, which makes them RGB in [0, 1]; if not, the caller does it, by
            the mean and std in the metadata
        size: height and width of the example that is traced
        fixed_size: export for images of this size alone; the batch stays dynamic
        opset: of ONNX; by default what torch chooses
        tolerance: largest difference that is accepted, relative to the model's largest output

    Raises:
        ExportError: torch cannot export the model, or what it exported differs from it
        InputError: a model or an option that cannot work
        MissingDependency: the format needs a package that is not there, or a newer torch
    """
    if format not in SUFFIXES:
        raise InputError(f"format={format!r} is unknown; choose from {', '.join(SUFFIXES)}")
    if format == "onnx":
        require("export to ONNX", "export", "onnx", "onnxscript", "onnxruntime")
        if Version(torch.__version__) < Version("2.7"):
            raise MissingDependency(
                f"export to ONNX needs torch 2.7, and {torch.__version__} is installed; "
                "run `pip install 'torch>=2.7'`, or take --format torch-export"
            )
    file = Path(file).expanduser().absolute()
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}")
    check_exportable(model)
    began = time.perf_counter()
    model = copy.deepcopy(model).cpu().float().eval()
    plain, deployable = Deployable(model, normalise), Deployable(for_inference(model), normalise)
    shapes = [(batch, *size) for batch in (1, 2, 3)] if fixed_size else CHECKED
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        example = torch.rand(2, deployable.channels, *size)
        deployable(example)  # a size that the model refuses is refused in its own words
        program = _trace(deployable, example, fixed_size)
        names = _output_names(model)
        metadata = describe(deployable, names, _least_sides(program, size, fixed_size))
        with TemporaryDirectory(prefix=".export-", dir=file.parent) as folder:
            unfinished = Path(folder) / file.name
            if format == "onnx":
                _save_onnx(program, unfinished, names, metadata, opset, _or_fix_size(fixed_size))
            else:
                torch.export.save(program, unfinished, extra_files={"metadata.json": json.dumps(metadata)})
            seconds = time.perf_counter() - began
            run = _RUNNERS[format](unfinished)
            try:
                differences = [_compare(plain, run, shape, tolerance) for shape in shapes]
            except ExportError as error:
                remedy = _or_fix_size(fixed_size, "if the model does something else for some sizes, ")
                raise ExportError(f"{file.name} was not written: {error}{remedy}") from error
            for each in Path(folder).iterdir():  # the weights of a large ONNX file lie beside it
                os.replace(each, file.with_name(each.name))
    return Exported(file, metadata, differences, seconds)


def check_exportable(model: nn.Module) -> None:
    """Raise InputError for a model that is none of those that can be exported."""
    if isinstance(model, (Backbone, Segmenter, Classifier)):
        return
    task = getattr(model, "task", type(model).__name__)
    reasons = {
        "detection": "how many objects it finds, and so the shapes within it, depend on what is in the images, which "
        "torch.export does not trace",
        "multitask": "its heads share a pass of the backbone by what torch.export does not see",
    }
    raise InputError(
        f"a model for {task} cannot be exported: {reasons.get(task, 'it has no fixed outputs')}. Run it in PyTorch, or "
        "export its backbone: model.inner_backbone.save_pretrained(DIR), then `backbones export DIR`"
    )


def describe(deployable: Deployable, outputs: Sequence[str], least: Sequence[int]) -> dict[str, Any]:
    """What stands in the file beside the network, for who deploys it."""
    model, backbone = deployable.model, inner_backbone(deployable.model)
    features = getattr(backbone, "features_only", True)
    told = {
        "library": f"{saving.LIBRARY} {version(saving.LIBRARY)}",
        "task": getattr(model, "task", "features" if features else "classification"),
        "backbone": deployable.name,
        "inputs": ["images"],
        "outputs": list(outputs),
        "strides": list(backbone.feature_info.reduction()) if features else None,
        **deployable.statistics,
        "normalised": "inside" if deployable.normalise else "outside",
        "least_sides": list(least),
    }
    if not isinstance(model, Backbone):
        known = ("class_names", "input", "data", "metrics")
        told["architecture"] = model.saved_options().get("architecture")
        told |= {name: model.metadata.get(name) for name in known}
    return {name: value for name, value in told.items() if value is not None}


def _output_names(model: nn.Module) -> list[str]:
    if isinstance(model, Backbone) and model.features_only:
        return [f"map{i}" for i in model.out_indices]
    return ["logits"]


def _trace(deployable: Deployable, example: Tensor, fixed_size: bool) -> torch.export.ExportedProgram:
    """The program of a model for any batch and, unless fixed, any height and width."""
    sides = (0,) if fixed_size else (0, 2, 3)
    dynamic = {"images": dict.fromkeys(sides, torch.export.Dim.DYNAMIC)}
    try:
        with _Portable():
            program = torch.export.export(deployable, (example,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # of many kinds, torch's own and those of the model's code under symbolic sizes
        what = f"{deployable.name}{'' if fixed_size else ' for images of any size'}"
        remedy = _or_fix_size(fixed_size)
        if is_exporting is torch.compiler.is_compiling:  # torch 2.6
            remedy = f"; it cannot where images are padded, and torch 2.7 can{remedy}"
        raise ExportError(
            f"torch {torch.__version__} cannot export the model on {what}: {_first_line(error)}{remedy}"
        ) from error
    with contextlib.suppress(ValueError):  # torch 2.6 insists on them
        program.example_inputs = None  # they would be saved, and be larger than many a model
    return program


def _least_sides(program: torch.export.ExportedProgram, size: tuple[int, int], fixed_size: bool) -> list[int]:
    """The least height and width of images that the program is right for."""
    if fixed_size:
        return list(size)
    ranges = {str(symbol): int(bounds.lower) for symbol, bounds in program.range_constraints.items()}
    return [max(1, ranges.get(str(side), 1)) for side in _images_of(program).shape[2:]]


def _images_of(program: torch.export.ExportedProgram) -> Tensor:
    """What a program takes, with torch's symbols for its sides."""
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


# ONNX


def _save_onnx(
    program: torch.export.ExportedProgram,
    file: Path,
    names: list[str],
    metadata: Mapping[str, Any],
    opset: int | None,
    remedy: str,
) -> None:
    symbols = _names_of_sides(program)
    options = {} if opset is None else {"opset_version": opset}
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of what it leaves as it is
    try:
        onnx_program = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=names, verbose=False, **options
        )
    except Exception as error:
        told = _first_line(error.__cause__ or error)  # which operator it was, below a page of advice
        raise ExportError(f"torch {torch.__version__} cannot turn the program into ONNX: {told}{remedy}") from error
    model = onnx_program.model
    for value in (*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = type(value.shape)([_named(side, symbols) for side in value.shape])
    for name, value in metadata.items():
        model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    onnx_program.save(file)


def _names_of_sides(program: torch.export.ExportedProgram) -> dict[str, str]:
    """What the symbols are called that torch has for the sides of images."""
    sides = zip(_images_of(program).shape, ("batch", None, "height", "width"), strict=True)
    return {str(side): name for side, name in sides if not isinstance(side, int)}


def _named(side: Any, symbols: Mapping[str, str]) -> Any:
    """A side of a shape in ONNX with names for torch's symbols."""
    if isinstance(side, int):
        return side
    text = getattr(side, "value", None)
    return None if text is None else re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), str(text))


class _Portable(TorchFunctionMode):
    """Within, functions that do not get into ONNX are others that compute the same.

    Adaptive average pooling is two matrix products: ONNX has no such operator, and torch's decomposition of it is right
    for no size but the example's. A remainder by a symbolic side is a quotient's: the translation takes numbers alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.adaptive_avg_pool2d:
            func = adaptive_avg_pool2d
        elif func in (Tensor.__mod__, Tensor.remainder, torch.remainder) and isinstance(args[1], torch.SymInt):
            return args[0] - args[0] // args[1] * args[1]
        return func(*args, **(kwargs or {}))


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """torch's function of this name, of (B, C, H, W), from operators that every runtime has."""
    if isinstance(output_size, int):
        output_size = (output_size, output_size)
    if tuple(output_size) == (1, 1):
        return input.mean((-2, -1), keepdim=True)
    sides = zip(input.shape[-2:], output_size, strict=True)
    rows, columns = (_averages(side, side if cells is None else cells, input) for side, cells in sides)
    return rows @ input @ columns.mT


def _averages(side: int, cells: int, like: Tensor) -> Tensor:
    """The matrix (cells, side) of averages: cell i is from floor(i * side / cells) to ceil((i + 1) * side / cells)."""
    cell = torch.arange(cells, device=like.device)[:, None]
    pixel = torch.arange(side, device=like.device)
    first, end = cell * side // cells, ((cell + 1) * side + cells - 1) // cells
    inside = (first <= pixel) & (pixel < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)


# Whether it computes the same

Runner = Callable[[Tensor], list[Tensor]]


def _run_onnx(file: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


def _run_program(file: Path) -> Runner:
    module = torch.export.load(file).module()
    return lambda images: _listed(module(images))


_RUNNERS: dict[str, Callable[[Path], Runner]] = {"onnx": _run_onnx, "torch-export": _run_program}


def _compare(deployable: Deployable, run: Runner, shape: tuple[int, int, int], tolerance: float) -> Difference:
    """The difference for random images of a shape; `ExportError` if it is over the tolerance."""
    batch, *sides = shape
    images = torch.rand(batch, deployable.channels, *sides, generator=torch.Generator().manual_seed(0))
    expected = _listed(deployable(images))
    try:
        found = run(images)
    except Exception as error:
        raise ExportError(f"it fails on images {tuple(images.shape)}: {_first_line(error)}") from error
    shapes = [[tuple(out.shape) for out in outs] for outs in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"it returns {shapes[0]} for images {tuple(images.shape)}, and the model {shapes[1]}")
    pairs = list(zip(found, expected, strict=True))
    worst = max((a - b).abs().max().item() for a, b in pairs)
    largest = max(b.abs().max().item() for _, b in pairs)
    if not worst <= tolerance * largest:  # nan is not
        raise ExportError(
            f"for images {tuple(images.shape)} its outputs differ by {worst:.2g} from the model's, of which the "
            f"largest is {largest:.3g}, and the tolerance is {tolerance:g} of that"
        )
    return Difference(tuple(images.shape), worst, largest)


def _listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _first_line(error: Exception) -> str:
    """What an exception says, in a line; torch's are of pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    constraint = next((line for line in lines if line.startswith("- ")), None)
    return (constraint or (lines[0] if lines else type(error).__name__)).removeprefix("- ")[:300]


# The command
