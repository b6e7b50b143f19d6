"""Checkpoints: read, recognised, converted, resized, reported."""

import argparse
import itertools
import logging
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor

from .errors import WeightsError
from .specs import BackboneSpec, Weights

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["KeyLayout", "LoadReport", "load_pretrained", "load_weights", "read_checkpoint"]

_log = logging.getLogger("backbones")

#: Share of a backbone's parameters below which a checkpoint does not fit.
MINIMUM_SHARE = 0.9

# Where releases keep the state dict, averaged weights first, as timm looks for them.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state", "module", "teacher")

# What repositories on the hub call their weights, unless a source names the file.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KeyLayout:
    """How one source names parameters: regular expressions that turn its names into ours, in turn.

    Names that turn into "" are left out: buffers that the model computes, such as tables of indices.
    """

    name: str
    renames: tuple[tuple[str, str], ...] = ()

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under our names."""
        converted = {}
        for key, value in state.items():
            for pattern, replacement in self.renames:
                key = re.sub(pattern, replacement, key)
            if key:
                converted[key] = value
        return converted


@dataclass
class LoadReport:
    """What became of each tensor of a checkpoint and of the model, with shapes."""

    source: str
    layout: str = "own"
    prefix: str = ""
    loaded: dict[str, Shape] = field(default_factory=dict)
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    missing: dict[str, Shape] = field(default_factory=dict)
    unexpected: dict[str, Shape] = field(default_factory=dict)
    share: float = 0.0

    def __str__(self) -> str:
        under = f" under {self.prefix!r}" if self.prefix else ""
        lines = [
            f"{self.source}: {self.share:.1%} of the backbone's parameters loaded, {self.layout} layout{under}",
            f"  loaded {len(self.loaded)}",
        ]
        for title in ("resized", "mismatched", "missing", "unexpected"):
            found = getattr(self, title)
            lines.append(f"  {title} {len(found)}")
            lines += [f"    {key} {_arrow(shape)}" for key, shape in list(found.items())[:20]]
            if len(found) > 20:
                lines.append(f"    ... and {len(found) - 20} more")
        return "\n".join(lines)


def load_pretrained(model: "Backbone", spec: BackboneSpec, pretrained: bool | str | os.PathLike) -> LoadReport:
    """Loads the weights that `build_backbone(pretrained=...)` asked for.

    Args:
        model: the backbone, just built.
        spec: its spec, which lists published weights.
        pretrained: True, or torchvision's word "DEFAULT", for the spec's first weights, one of its tags, or a path
            to a file or to a folder of `save_pretrained`.
    """
    tags = {row.tag: row for row in spec.weights}
    if pretrained is True or pretrained == "DEFAULT":
        if not spec.weights:
            raise WeightsError(f"{spec.name} has no published weights; pass pretrained=PATH to a checkpoint")
        row = spec.weights[0]
    elif str(pretrained) in tags:
        row = tags[str(pretrained)]
    elif Path(pretrained).expanduser().is_file():
        return load_weights(model, pretrained)
    elif (saved := Path(pretrained).expanduser() / "model.safetensors").is_file():  # a folder of save_pretrained
        return load_weights(model, saved)
    else:
        raise WeightsError(
            f"{spec.name}: pretrained={str(pretrained)!r} is neither a file nor one of its weights "
            f"({', '.join(tags) or 'it has none'})"
        )
    report = load_weights(model, _fetch(row, spec.name))
    model.pretrained_cfg.update(
        tag=row.tag,
        source=row.source,
        license=row.license,
        input_size=row.input_size,
        mean=row.mean,
        std=row.std,
        interpolation=row.interpolation,
    )
    return report


def load_weights(model: "Backbone", source: str | os.PathLike | Mapping[str, Tensor]) -> LoadReport:
    """Loads a checkpoint of any known key layout and says what became of each tensor.

    The layout and the prefix (`backbone.`, `module.`, ...) are those under which most names fit. Tables
    are resized, the first convolution is adapted to `in_chans`, and parts that are new by nature (a head for
    other classes, a pyramid) may stay as they are. The report is also left in `model.load_report`.

    Args:
        model: the backbone.
        source: a .safetensors, .pth or .bin file, or a state dict.

    Raises:
        WeightsError: the file cannot be read, or under 90 % of the parameters or tensors of the backbone fit;
            nothing has been loaded then.
    """
    report = LoadReport(source="state dict" if isinstance(source, Mapping) else str(source))
    checkpoint = _state_dict(source if isinstance(source, Mapping) else model.read_weights(Path(source)), report.source)
    own = model.state_dict()
    layouts = (KeyLayout(model.own_layout), *model.key_layouts)
    state, report.layout, report.prefix = _recognise(checkpoint, own, layouts)
    report.unexpected = {k: tuple(v.shape) for k, v in checkpoint.items() if not k.startswith(report.prefix)}

    fitting = {}
    for name, value in state.items():
        if name not in own:
            report.unexpected[name] = tuple(value.shape)
            continue
        try:
            fitted = _fit(model, name, value, own[name], state)
        except WeightsError as error:
            raise WeightsError(f"{report.source}: {error}") from None
        if fitted.shape != own[name].shape:
            report.mismatched[name] = (tuple(value.shape), tuple(own[name].shape))
            continue
        fitting[name] = fitted
        report.loaded[name] = tuple(fitted.shape)
        if fitted.shape != value.shape:
            report.resized[name] = (tuple(value.shape), tuple(fitted.shape))
    report.missing = {
        name: tuple(value.shape)
        for name, value in own.items()
        if name not in fitting and name not in report.mismatched and not name.endswith("num_batches_tracked")
    }

    required = {n: p.numel() for n, p in model.named_parameters() if not is_new(n, model.new_parts)}
    fits = [n for n in required if n in fitting]
    report.share = min(
        sum(required[n] for n in fits) / max(1, sum(required.values())), len(fits) / max(1, len(required))
    )
    if report.share < MINIMUM_SHARE:
        name = getattr(model, "canonical_name", type(model).__name__)
        raise WeightsError(
            f"the checkpoint does not fit {name}: under {MINIMUM_SHARE:.0%} of its parameters were found. "
            f"Check that it is of this variant.\n{report}"
        )
    model.load_state_dict(fitting, strict=False)
    model.load_report = report
    left_out = [n for n in [*report.missing, *report.mismatched] if not is_new(n, model.new_parts)]
    _log.log(logging.WARNING if left_out else logging.INFO, "%s", report)
    return report


def read_checkpoint(path: str | os.PathLike) -> Mapping:
    """The content of a .safetensors or torch file, read without running any code in it.

    Raises:
        WeightsError: the file is missing, truncated, no checkpoint, or holds more than plain data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Namespaces of command-line arguments are plain data, and several releases hold one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own ways to fail, from zipfile's to pickle's
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a checkpoint: {_reason(error)}. "
            "If it was downloaded, download it again; if it holds more than tensors, save its state dict alone with "
            "torch.save"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a state dict or a dict that has one")
    return content


def _reason(error: Exception) -> str:
    """Why a file could not be read, without torch's advice to run the code in it."""
    message = str(error).strip()
    if found := re.search(r"\bGLOBAL (\S+)", message):
        return f"it holds a {found[1]}, which may run code"
    if not message or isinstance(error, (pickle.UnpicklingError, KeyError, EOFError)):
        return "it is no torch file, or a part of one"
    return re.split(r"\. |\n", message)[0]


def _state_dict(content: Mapping, source: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, taken out of the containers that releases wrap around them."""
    while True:
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise WeightsError(f"{source} holds no tensors where a state dict was looked for; its keys: {keys}")
    return state


def _recognise(
    state: dict[str, Tensor], own: Mapping[str, Tensor], layouts: tuple[KeyLayout, ...]
) -> tuple[dict[str, Tensor], str, str]:
    """The state under our names, with the layout and the prefix under which most of them fit."""
    prefixes = Counter({"": len(state)})
    for key in state:
        parts = key.split(".")
        prefixes.update(".".join(parts[:n]) + "." for n in range(1, min(len(parts), 6)))
    best = (-1, state, "own", "")
    for prefix, _ in prefixes.most_common(16):
        inner = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        # `stages_0.` is `stages.0.` in what timm's features_only=True has saved
        unfolded = {re.sub(r"^([a-z_]+)_(\d+)\.", r"\1.\2.", k): v for k, v in inner.items()}
        spellings = [inner] if unfolded.keys() == inner.keys() else [inner, unfolded]
        for layout, spelling in itertools.product(layouts, spellings):
            converted = layout.convert(spelling)
            matched = sum(name in own for name in converted)
            if matched > best[0]:
                best = (matched, converted, layout.name, prefix)
    _, converted, layout, prefix = best
    return converted, layout, prefix


def _fit(model: "Backbone", name: str, value: Tensor, own: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A checkpoint's tensor in the shape that the model has, where there is a right way to get there."""
    if value.shape == own.shape:
        return value
    if own.ndim == 4 and value.ndim == 2 and len(value) == len(own):  # old patch projections: (D, C * P * P)
        channels = value.shape[1] // own[0, 0].numel()
        if channels * own[0, 0].numel() == value.shape[1]:
            value = value.reshape(len(own), channels, *own.shape[2:])
    is_first_conv = own.ndim == value.ndim == 4 and own.shape[1] == model.in_chans and value.shape[1] == 3
    if is_first_conv and own.shape[2:] == value.shape[2:] and len(own) == len(value):
        return adapt_input_conv(model.in_chans, value)
    return model.adapt_table(name, value, state)


def is_new(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of a model's parts that published weights do not hold."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _arrow(shape: Shape | tuple[Shape, Shape]) -> str:
    if shape and isinstance(shape[0], tuple):
        return f"{_arrow(shape[0])} -> {_arrow(shape[1])}"
    return "x".join(map(str, shape)) or "scalar"


def _fetch(row: Weights, name: str) -> Path:
    """The local file of published weights, downloaded if need be and allowed."""
    if row.source.startswith("hf-hub:"):
        return _fetch_from_hub(row, name)
    if row.source.startswith("file://"):
        return Path(url2pathname(urlsplit(row.source).path))
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(row.source).path).name
    if not path.is_file():
        try:
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
                raise OSError("HF_HUB_OFFLINE is set")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(row.source, str(path))
        except OSError as error:
            raise WeightsError(
                f"{name}: weights {row.tag!r} could not be downloaded ({error}). Download {row.source} elsewhere and "
                f"put it at {path}, or pass pretrained=PATH"
            ) from error
    return path


def _fetch_from_hub(row: Weights, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path, _, revision = row.source.removeprefix("hf-hub:").partition("@")
    *folders, last = path.split("/", 2)
    repo, file = ("/".join(folders), [last]) if len(folders) == 2 else (path, [])
    unreachable = None
    for filename in file or _HUB_FILES:
        try:
            return Path(hf_hub_download(repo, filename, revision=revision or None))
        except LocalEntryNotFoundError as error:  # offline, or no network, and not in the cache
            unreachable = unreachable or error
        except EntryNotFoundError:
            continue
        except Exception as error:  # no such repository, no access, a broken connection
            raise WeightsError(f"{name}: weights {row.tag!r} could not be fetched from {repo}: {error}") from error
    if unreachable:
        raise WeightsError(
            f"{name}: weights {row.tag!r} are not in the local cache and could not be downloaded "
            f"({str(unreachable).splitlines()[0]}). Where there is a network, run `hf download {repo}`; "
            "then copy the weights here and pass pretrained=PATH, or copy the cache and set HF_HOME"
        ) from unreachable
    raise WeightsError(f"{name}: {repo} on the hub holds no {' or '.join(file or _HUB_FILES)}")
