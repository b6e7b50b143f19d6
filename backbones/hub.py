"""Backbones out of folders and from the Hugging Face Hub, as `saving` wrote them."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import InputError, MissingDependency, UnknownBackbone, WeightsError
from .locks import importing
from .registry import backbone_info, build_backbone
from .saving import CONFIG, FORMAT, LIBRARY, WEIGHTS, push_to_hub, save_pretrained
from .weights import load_weights

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_EXPECTED = f"expected a {CONFIG} that save_pretrained wrote"
# Beyond any width, depth, side or number of classes; and parameters that harm nobody.
_MOST, _SMALL = 10_000_000, 50_000_000
#: What `backbone_config` has at least.
BACKBONE_FIELDS = {"backbone": str, "options": dict, "distribution": str, "distribution_version": str}


def from_pretrained(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None, **options: Any
) -> "Backbone":
    """Build a backbone that `save_pretrained` or `push_to_hub` saved, with its weights.

    Args:
        source: a folder, or a repository of the hub, `ORGANISATION/NAME`.
        revision: branch, tag or commit of the repository.
        token: for private repositories; by default the one that `hf auth login` has stored.
        **options: replace those that the model was saved with, such as `out_indices` or `drop_path_rate`. With
            `in_chans`, `num_classes` or `features_only` changed, what fits is loaded and `load_report` has the rest.

    Returns:
        The model, in training mode, as from `build_backbone`.

    Raises:
        MissingDependency: the plugin that the backbone comes from is not installed.
        WeightsError: the folder or repository cannot be had, holds no backbone, or weights of another.
    """
    if "pretrained" in options:
        raise InputError(f"{source} has weights of its own; leave pretrained={options['pretrained']!r} out")
    config, weights = read_folder(source, revision=revision, token=token)
    if isinstance(config.get("task"), str):
        raise InputError(
            f"{source} holds a model for {config['task']}, not a backbone alone; load it with "
            "backbones_tasks.from_pretrained"
        )
    require_fields(config, BACKBONE_FIELDS, source)
    saved = config["options"]
    with explained(config, source):
        _require_own_options(config, source)
        told = {"pretrained_cfg": config.get("pretrained_cfg")}
        wanted = saved | told | options
        require_size(weights, saved, lambda: build_backbone(config["backbone"], **wanted), source)
        model = build_backbone(config["backbone"], **wanted)
    report = load_weights(model, weights)
    changed = [k for k, v in options.items() if k not in saved or as_saved(v) != saved[k]]
    if not changed and (report.missing or report.mismatched or report.unexpected or report.resized):
        raise WeightsError(f"{source}: {WEIGHTS} does not hold the weights of the {CONFIG} beside it.\n{report}")
    return model


def _require_own_options(config: Mapping[str, Any], source: str | os.PathLike[str]) -> None:
    """Raise WeightsError for options that say which model it is, and what it reads: the backbone's name does that."""
    info = backbone_info(config["backbone"])
    for name, value in info.defaults.items():
        given = config["options"].get(name, value)
        if isinstance(value, str) and name not in info.options and given != value:
            raise WeightsError(f"{source}: {name}={given!r} in {CONFIG} is not that of {config['backbone']!r}")


# What saved models of every kind share


def require_size(weights: Path, options: Any, build: Callable[[], object], source: str | os.PathLike[str]) -> None:
    """Raise WeightsError where a configuration describes a model far beyond its weights, before memory is taken.

    Args:
        weights: the .safetensors file beside the configuration.
        options: what the configuration says.
        build: builds the model.
        source: for the message.
    """
    for number in _numbers_in(options):
        if not -_MOST <= number <= _MOST:  # not NaN either
            raise WeightsError(f"{source}: {number} in {CONFIG} is no size that a model can have")
    try:
        with safe_open(weights, "pt") as file:
            held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except Exception:  # what is wrong with it is said where it is read
        return
    allowed, counted = 10 * held + _SMALL, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal counted
        counted += parameter.numel()
        if counted > allowed:
            raise WeightsError(
                f"{source}: its {CONFIG} describes a model of over {counted:,} parameters, and its weights are {held:,}"
            )

    with importing, torch.device("meta"):  # no other thread builds meanwhile
        handle = register_module_parameter_registration_hook(count)
        try:
            build()
        except WeightsError:
            raise
        except Exception:  # some architectures cannot be built so; others are wrong, as building them for real will say
            pass
        finally:
            handle.remove()


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers_in(each)
    elif isinstance(value, (int, float)):
        yield value


def read_folder(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> tuple[dict[str, Any], Path]:
    """The configuration of a saved model and the path of its weights, downloaded if need be and allowed.

    Raises:
        WeightsError: they cannot be had, are not ours, or are of a newer format.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        path, weights = folder / CONFIG, folder / WEIGHTS
    else:
        path, weights = _fetch(str(source), revision, token)
    if not path.is_file():
        raise WeightsError(f"{source}: {_EXPECTED}, and there is none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{source}: {_EXPECTED}, and this one is no JSON ({error})") from None
    require_fields(config, {}, source)
    written = config.get("format", 1)
    if type(written) is not int or written > FORMAT:
        raise WeightsError(
            f"{source}: its {CONFIG} is of format {written!r}, and {LIBRARY} {version(LIBRARY)} reads formats up to "
            f"{FORMAT}; run `pip install --upgrade {LIBRARY}`"
        )
    return config, weights


def require_fields(config: Any, fields: Mapping[str, type], source: str | os.PathLike[str]) -> None:
    """Raise WeightsError unless a configuration is an object with these fields of these types."""
    if not isinstance(config, Mapping):
        raise WeightsError(f"{source}: {_EXPECTED}, and this one is no JSON object")
    for name, kind in fields.items():
        if not isinstance(config.get(name), kind):
            raise WeightsError(f"{source}: {_EXPECTED}, and this one has no {name!r}")


@contextmanager
def explained(config: Mapping[str, Any], source: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of building a saved backbone that say what to install; `config` is that of `backbone_config`."""
    try:
        yield
    except UnknownBackbone as error:
        distribution = config["distribution"]
        if not distribution:
            raise UnknownBackbone(
                f"{source} is {config['backbone']!r}, which was registered by hand; call backbones.register with its "
                "spec first"
            ) from error
        try:
            version(distribution)
        except (PackageNotFoundError, ValueError):
            if not _DISTRIBUTION.fullmatch(distribution):  # a stranger wrote it: it must not get into a command line
                raise WeightsError(f"{source}: {distribution!r} in {CONFIG} is no name of a distribution") from error
            raise MissingDependency(
                f"{source} is {config['backbone']!r} of the distribution {distribution!r} (it was saved with version "
                f"{config['distribution_version']!r}), which is not installed; if you trust it, run "
                f"`pip install {distribution}`"
            ) from error
        raise


def as_saved(value: Any) -> Any:
    """Sequences as JSON gives them back."""
    return [as_saved(v) for v in value] if isinstance(value, (list, tuple, range)) else value


def _fetch(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, Path]:
    """Local files of a repository, downloaded if need be and allowed."""
    try:
        config, weights = (hf_hub_download(repo_id, n, revision=revision, token=token) for n in (CONFIG, WEIGHTS))
    except HFValidationError:
        raise WeightsError(f"{repo_id}: no such folder, and no name of a repository on the hub either") from None
    except LocalEntryNotFoundError as error:  # offline, or no network, and not in the cache
        raise WeightsError(
            f"{repo_id}: no such folder, and the repository of this name is not in the local cache and could not be "
            f"downloaded ({str(error).splitlines()[0]}). Where there is a network, run `hf download {repo_id} "
            "--local-dir FOLDER`, and pass that folder"
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(
            f"{repo_id} on the hub was not written by push_to_hub: it lacks {CONFIG} or {WEIGHTS}"
        ) from error
    except Exception as error:  # no such repository, no access, a broken connection
        raise WeightsError(f"{repo_id}: no such folder, and the hub says: {error}") from error
    return Path(config), Path(weights)
