"""The weights that a spec lists: which of them is meant, and where they lie."""

import os
import re
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

import timm
import torch

from ..errors import WeightsError
from ..specs import BackboneSpec, Weights
from .fitting import load_weights
from .report import LoadReport

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["describe", "find_weights", "load_pretrained"]

#: Keys of `pretrained_cfg` that depend on the weights; the others on what is built.
PREPROCESSING = (
    *("input_size", "test_input_size", "min_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode"),
    *("mean", "std", "pool_size", "test_pool_size", "label_offset", "enum"),
)

# What repositories on the hub call their weights, unless a source names the file.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def find_weights(spec: BackboneSpec, asked: object) -> Weights | Path | None:
    """The weights that `build_backbone(pretrained=...)` asks for: a row of the spec, or a file.

    Args:
        spec: lists what is published.
        asked: True for the spec's first weights; one of its tags; torchvision's "DEFAULT", or a member of its enum
            or that member's name; a path to a file or to a folder of `save_pretrained`; None or False for none.

    Raises:
        WeightsError: there are no such weights.
    """
    if asked is None or asked is False:
        return None
    if not isinstance(asked, (bool, str, os.PathLike, Enum)) or not str(asked):
        raise WeightsError(
            f"{spec.name}: pretrained={asked!r} names no weights; give True, a tag, a path, or False for none"
        )
    if asked is True and not spec.weights:
        raise WeightsError(f"{spec.name} has no published weights; pass pretrained=PATH to a checkpoint")
    if asked is True:
        return spec.weights[0]
    if row := _find_row(spec, str(asked)):
        return row
    if isinstance(asked, (str, os.PathLike)) and not isinstance(asked, Enum):
        path = Path(asked).expanduser()
        for file in (path, path / "model.safetensors"):  # or a folder of save_pretrained
            if file.is_file():
                return file
    known = ", ".join(row.tag for row in spec.weights) or "it has none"
    enum, dot, _ = str(asked).rpartition("_Weights.")
    if dot and not any(row.enum.startswith(f"{enum}{dot}") for row in spec.weights):
        raise WeightsError(f"{spec.name}: weights {asked} are those of another model; it has {known}")
    raise WeightsError(f"{spec.name}: pretrained={str(asked)!r} is neither a file nor one of its weights ({known})")


def _find_row(spec: BackboneSpec, asked: str) -> Weights | None:
    """The published weights of a tag, or of a member of torchvision's enum."""
    torchvision = [row for row in spec.weights if row.enum]
    enum, dot, tag = asked.rpartition(".")
    if tag == "DEFAULT":  # torchvision's first, unless a backbone has none of torchvision's
        rows = torchvision or spec.weights
        return rows[0] if rows and (not dot or rows[0].enum.startswith(f"{enum}.")) else None
    return next((row for row in spec.weights if asked in (row.tag, row.enum)), None)


def load_pretrained(model: "Backbone", spec: BackboneSpec, pretrained: object) -> LoadReport:
    """Loads the weights that `build_backbone(pretrained=...)` asked for, and makes the model's preprocessing theirs.

    Args:
        model: the backbone, just built.
        spec: its spec, which lists published weights.
        pretrained: as `find_weights` takes it, but for None and False; or what it returned.
    """
    found = pretrained if isinstance(pretrained, Weights) else find_weights(spec, pretrained)
    assert found is not None  # the caller's fault
    if isinstance(found, Path):
        report = load_weights(model, found)
        describe(model, spec, next((row for row in spec.weights if row.layout == report.layout), None))
        return report
    report = load_weights(model, _fetch(found, spec.name))
    describe(model, spec, found)
    model.pretrained_cfg.update(tag=found.tag, source=found.source, license=found.license)
    return report


def describe(model: "Backbone", spec: BackboneSpec, row: Weights | None = None) -> None:
    """Say in a model's `pretrained_cfg` which images its weights were trained on, as timm's says it.

    Args:
        model: the backbone.
        spec: its spec.
        row: which weights; the first unless given.
    """
    row = row or next(iter(spec.weights), None)
    name = row.timm_name if row else spec.timm_name
    if not (row or name):
        return
    told: dict[str, Any] = {}
    with suppress(RuntimeError):  # the installed timm does not know them
        theirs = timm.get_pretrained_cfg(name)
        told |= theirs.to_dict() if theirs else {}
    if row is not None:
        told |= {key: getattr(row, key) for key in ("input_size", "mean", "std", "interpolation")}
    if row is not None and row.enum:
        (crop,), (resize,) = (getattr(torchvision_transforms(row.enum), key) for key in ("crop_size", "resize_size"))
        told |= {"enum": row.enum, "crop_pct": crop / resize}
    told["input_size"] = (model.in_chans, *told["input_size"][1:])
    for key in PREPROCESSING:
        model.pretrained_cfg.pop(key, None)
    model.pretrained_cfg.update({key: told[key] for key in PREPROCESSING if told.get(key) is not None})


def torchvision_transforms(enum: str) -> Any:
    """torchvision's own preprocessing for a member of one of its enums of weights."""
    from torchvision.models import get_weight

    return get_weight(enum).transforms()


def leads_nowhere(row: Weights, online: bool = True) -> str:
    """Why published weights cannot be had, as far as this can be told; empty where they can.

    Args:
        row: which.
        online: ask the hub, or the server; else only files are looked for.

    Raises:
        OSError: neither answers.
    """
    if row.source.startswith("file://"):
        path = _local_path(row)
        return "" if path.is_file() else f"there is no file {path}"
    if not online or _is_offline():
        return ""
    if row.source.startswith("hf-hub:"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError

        repo, files, revision = _on_hub(row)
        try:
            found = any(HfApi().file_exists(repo, file, revision=revision) for file in files)
        except GatedRepoError:  # it is there, for those who have asked for it
            return ""
        except Exception as error:  # of whatever library the hub's client goes by
            raise OSError(f"the hub does not answer: {error}") from error
        return "" if found else f"{repo} on the hub holds no {' or '.join(files)}"
    try:
        urlopen(Request(row.source, method="HEAD"), timeout=10).close()
    except HTTPError as error:
        return f"{row.source} answers {error.code} {error.reason}" if error.code in (404, 410) else ""
    return ""


def _fetch(row: Weights, name: str) -> Path:
    """The local file of published weights, downloaded if need be and allowed."""
    if row.source.startswith("hf-hub:"):
        return _fetch_from_hub(row, name)
    if row.source.startswith("file://"):
        return _local_path(row)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(row.source).path).name
    if not path.is_file():
        try:
            if _is_offline():
                raise OSError("HF_HUB_OFFLINE is set")
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = re.search(r"-([a-f0-9]{8,})\.", path.name)  # where the name has the first digits of one
            torch.hub.download_url_to_file(row.source, str(path), hash_prefix=digest[1] if digest else None)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"{name}: weights {row.tag!r} could not be downloaded ({error}). Download {row.source} elsewhere and "
                f"put it at {path}, or pass pretrained=PATH"
            ) from error
    return path


def _fetch_from_hub(row: Weights, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, files, revision = _on_hub(row)
    unreachable = None
    for filename in files:
        try:
            return Path(hf_hub_download(repo, filename, revision=revision))
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
    raise WeightsError(f"{name}: {repo} on the hub holds no {' or '.join(files)}")


def _on_hub(row: Weights) -> tuple[str, tuple[str, ...], str | None]:
    """Repository, names of which one is the weights', and revision."""
    path, _, revision = row.source.removeprefix("hf-hub:").partition("@")
    *folders, last = path.split("/", 2)
    repo, files = ("/".join(folders), (last,)) if len(folders) == 2 else (path, _HUB_FILES)
    return repo, files, revision or None


def _local_path(row: Weights) -> Path:
    return Path(url2pathname(urlsplit(row.source).path))


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
