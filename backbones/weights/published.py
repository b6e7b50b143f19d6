"""The weights that a spec lists: which of them is meant, and where they lie."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from ..errors import WeightsError
from ..specs import BackboneSpec, Weights
from .fitting import load_weights
from .report import LoadReport

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["load_pretrained"]

# What repositories on the hub call their weights, unless a source names the file.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_pretrained(
    model: "Backbone", spec: BackboneSpec, pretrained: Literal[True] | str | os.PathLike[str]
) -> LoadReport:
    """Loads the weights that `build_backbone(pretrained=...)` asked for.

    Args:
        model: the backbone, just built.
        spec: its spec, which lists published weights.
        pretrained: True, or torchvision's word "DEFAULT", for the spec's first weights, one of its tags, or a path
            to a file or to a folder of `save_pretrained`.
    """
    if not isinstance(pretrained, (bool, str, os.PathLike)) or not str(pretrained):
        raise WeightsError(
            f"{spec.name}: pretrained={pretrained!r} names no weights; give True, a tag, a path, or False for none"
        )
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
