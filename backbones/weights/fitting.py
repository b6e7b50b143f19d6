"""From a checkpoint to a model: each tensor fitted and judged, and only then written."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from ..errors import WeightsError
from .layouts import KeyLayout, Recognised, recognise
from .misfits import Misfits, is_new
from .reading import state_dicts
from .report import LoadReport

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["is_new", "load_weights", "require_sound"]

_log = logging.getLogger("backbones")

#: Share of a backbone's parameters below which a checkpoint does not fit, whatever is asked for.
MINIMUM_SHARE = 0.9

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_weights(
    model: "Backbone", source: str | os.PathLike[str] | Mapping[str, Tensor], strict: bool = True
) -> LoadReport:
    """Loads a checkpoint of any known key layout and says what became of each tensor.

    The layout, the prefix (`backbone.`, `module.`, ...) and, of several state dicts, the one are those under which
    most fits, averaged weights first. Tables are resized, the first convolution is adapted to `in_chans`. Parts that
    are new by nature (a head for other classes, a pyramid) may stay as they are, and what the model is built without
    (a classifier, stages beyond `out_indices`, a decoder) may be left over. The report is also left in
    `model.load_report`.

    Args:
        model: the backbone.
        source: a .safetensors, .pth or .bin file, or a state dict.
        strict: False leaves out what else does not fit, down to 90 % of the parameters and tensors, with a warning.

    Raises:
        WeightsError: the file cannot be read; some of its weights would be ignored, some of the model's would stay as
            they are; numbers are not finite or of a kind that is no weight. Nothing has been changed then.
    """
    report = LoadReport(source="state dict" if isinstance(source, Mapping) else str(source))
    name = getattr(model, "canonical_name", type(model).__name__)
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise WeightsError(f"{name} is on the meta device and holds nothing; build it on a real one first")
    content = source if isinstance(source, Mapping) else model.read_weights(Path(source))
    try:
        found = _choose(model, content, own, report)
        fitting = _fit_all(model, found, own, report)
    except WeightsError as error:
        raise error if str(error).startswith(report.source) else WeightsError(f"{report.source}: {error}") from None
    required = {n: p.numel() for n, p in model.named_parameters() if not is_new(n, model.new_parts)}
    fits = [n for n in required if n in fitting]
    report.share = min(
        sum(required[n] for n in fits) / max(1, sum(required.values())), len(fits) / max(1, len(required))
    )
    misfits = Misfits.find(model, found, own, report)
    if report.share < MINIMUM_SHARE:
        raise WeightsError(
            f"the checkpoint does not fit {name}: under {MINIMUM_SHARE:.0%} of its parameters were found. "
            f"Check that it is of this variant.{misfits}\n{report}"
        )
    if strict and misfits:
        raise WeightsError(
            f"the checkpoint does not fit {name}. Check that it is of this variant and built with the right options, "
            f"or leave out what does not fit with load_weights(..., strict=False).{misfits}\n{report}"
        )
    model.load_state_dict(fitting, strict=False)
    model.load_report = report
    _log.log(logging.WARNING if misfits else logging.INFO, "%s", report)
    return report


def _choose(model: "Backbone", content: Mapping[str, Any], own: Mapping[str, Tensor], report: LoadReport) -> Recognised:
    """Of the state dicts in a checkpoint the one that fits best, as recognised."""
    layouts = (KeyLayout(model.own_layout), *model.key_layouts)
    best = None
    for candidate in state_dicts(content, report.source):
        if best is not None and 2 * len(candidate.tensors) < best[1].matched[0]:
            continue  # it cannot fit better
        found = recognise(candidate.tensors, own, layouts)
        if best is None or found.matched > best[1].matched:
            best = (candidate, found)
        elif found.matched == best[1].matched and candidate.rank == best[0].rank and 2 * found.matched[0] > len(own):
            raise WeightsError(
                f"it holds two sets of weights that fit, {best[0].path!r} and {candidate.path!r}; pass the state dict "
                "of the one that is meant"
            )
    assert best is not None  # `state_dicts` yields one, or raises
    _, found = best
    report.layout, report.prefix = found.layout, found.prefix
    report.unexpected = {key: tuple(value.shape) for key, value in found.around.items()}
    return found


def _fit_all(model: "Backbone", found: Recognised, own: Mapping[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """What can be written into the model as it is, and in the report what cannot."""
    fitting = {}
    for name, value in found.state.items():
        if name not in own:
            report.unexpected[name] = tuple(value.shape)
            continue
        _require_numbers(name, value, own[name])
        value = value.detach()
        try:
            fitted = _fit(model, name, value.to(own[name].dtype), own[name], found.state)
        except WeightsError as error:
            report.notes[name] = str(error)
            fitted = value
        if fitted.shape != own[name].shape:
            report.mismatched[name] = (tuple(value.shape), tuple(own[name].shape))
            continue
        _require_finite(name, fitted)
        fitting[name] = fitted
        report.loaded[name] = tuple(fitted.shape)
        if fitted.shape != value.shape:
            report.resized[name] = (tuple(value.shape), tuple(fitted.shape))
    new = (name.rpartition(".")[0] for name in report.mismatched if is_new(name, model.new_parts))
    owners = set(filter(None, new))  # whose other tensors, such as the bias of a wider head, are of another layer, too
    for name in [name for name in fitting if name.rpartition(".")[0] in owners]:
        shape = tuple(fitting.pop(name).shape)
        report.mismatched[name] = (report.loaded.pop(name), shape)
    report.missing = {
        name: tuple(value.shape)
        for name, value in own.items()
        if name not in fitting and name not in report.mismatched and not name.endswith("num_batches_tracked")
    }
    return fitting


def require_sound(name: str, value: Tensor, own: Tensor) -> None:
    """Raise WeightsError unless a tensor can be copied into the model's as it is, and is finite there."""
    _require_numbers(name, value, own)
    _require_finite(name, value.detach().to(own.dtype))


def _require_numbers(name: str, value: Tensor, own: Tensor) -> None:
    """Raise WeightsError unless a tensor holds numbers of a kind that can be copied into the model's."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        raise WeightsError(f"{name} is on the meta device and holds no numbers; save the checkpoint from a real one")
    if value.layout != torch.strided or value.is_quantized:
        kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise WeightsError(f"{name} is a {kind} tensor; save it as a dense tensor of floating-point numbers")
    if own.is_floating_point() and value.dtype not in _FLOATS:
        raise WeightsError(f"{name} is {kind}, which are no weights; save the checkpoint in floating-point numbers")
    if value.is_complex():
        raise WeightsError(f"{name} is {kind}, and the model's is {str(own.dtype).removeprefix('torch.')}")


def _require_finite(name: str, value: Tensor) -> None:
    if not value.is_floating_point() or not value.numel():
        return
    low, high = value.aminmax()  # one pass, and NaN is handed on
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(value)).sum())
        raise WeightsError(
            f"{count} of the {value.numel()} numbers of {name} are NaN or infinite, in {str(value.dtype)[6:]}; the "
            "training that wrote it has failed, or the file is damaged"
        )


def _fit(model: "Backbone", name: str, value: Tensor, own: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A checkpoint's tensor in the shape that the model has, where there is a right way to get there."""
    if value.shape == own.shape:
        return value
    if own.ndim == 4 and value.ndim == 2 and len(value) == len(own):  # old patch projections: (D, C * P * P)
        channels = value.shape[1] // own[0, 0].numel()
        if channels * own[0, 0].numel() == value.shape[1]:
            value = value.reshape(len(own), channels, *own.shape[2:])
    if own.ndim == 2 and value.ndim == 4 and value.shape[2:] == (1, 1):  # a linear layer, written as a convolution
        value = value.flatten(1)
    is_first_conv = own.ndim == value.ndim == 4 and own.shape[1] == model.in_chans and value.shape[1] == 3
    if is_first_conv and own.shape[2:] == value.shape[2:] and len(own) == len(value):
        return adapt_input_conv(model.in_chans, value)
    try:
        return model.adapt_table(name, value, state)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError):  # it is no such table
        return value
