"""Backbones in folders and on the Hugging Face Hub, saved together with what it takes to build them again."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from .building import plain
from .errors import InputError, MissingDependency, UnknownBackbone, WeightsError
from .registry import backbone_info, build_backbone
from .specs import BackboneInfo
from .weights import load_weights

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .backbone import Backbone

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LIBRARY = "dense-backbones"
#: What this version writes into folders; it reads older ones as well.
FORMAT = 1

# Licences that the hub has an identifier for, of those that our specs name; others are shown by their name.
_HUB_LICENSES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit"}
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_EXPECTED = f"expected a {CONFIG} that save_pretrained wrote"
#: What `backbone_config` has at least.
BACKBONE_FIELDS = {"backbone": str, "options": dict, "distribution": str, "distribution_version": str}


def save_pretrained(model: "Backbone", folder: str | os.PathLike, *, name: str | None = None) -> Path:
    """Write a backbone into a folder that `from_pretrained` builds it from again.

    The folder then holds `config.json` (which backbone of which plugin, its options, its preprocessing),
    `model.safetensors`, and a model card `README.md`; a card that is there already is kept.

    Args:
        model: a backbone, or a classifier, from `build_backbone`.
        folder: made if need be.
        name: what the card says to load; the folder's name unless given.

    Raises:
        InputError: the model does not come from `build_backbone`, or has an option that JSON cannot hold.
    """
    return write_folder(model, folder, backbone_config(model), lambda name: model_card(model, name), name)


def push_to_hub(
    model: "Backbone",
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add backbone",
) -> "CommitInfo":
    """Upload what `save_pretrained` writes to a repository of the hub, which is made if need be.

    Args:
        model: a backbone, or a classifier, from `build_backbone`.
        repo_id: `NAME`, or `ORGANISATION/NAME`. A model card that the repository has already is kept.
        private, token, revision, create_pr, commit_message: as `huggingface_hub` takes them.

    Returns:
        The commit, with its `commit_url`.

    Raises:
        InputError: see `save_pretrained`; nothing has been uploaded then.
    """
    backbone_config(model)  # says what cannot be saved before a repository is made
    return push_folder(
        lambda folder, name: save_pretrained(model, folder, name=name),
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )


def from_pretrained(
    source: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None, **options: Any
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
        told = {"pretrained_cfg": config.get("pretrained_cfg")}
        model = build_backbone(config["backbone"], **(saved | told | options))
    report = load_weights(model, weights)
    changed = [k for k, v in options.items() if k not in saved or as_saved(v) != saved[k]]
    if not changed and (report.missing or report.mismatched or report.unexpected):
        raise WeightsError(f"{source}: {WEIGHTS} does not hold the weights of the {CONFIG} beside it.\n{report}")
    return model


def model_card(model: "Backbone", name: str) -> str:
    """The README.md of a saved model: front matter for the hub, then what a reader needs to use it.

    Args:
        model: a backbone, or a classifier, from `build_backbone`.
        name: the repository or folder that it is loaded from.
    """
    info, cfg = backbone_info(model.canonical_name), model.pretrained_cfg
    if model.features_only:
        pipeline_tag = "image-feature-extraction"
        shapes = ", ".join(
            f"(B, {c}, H / {s}, W / {s})" for c, s in zip(model.out_channels, model.strides, strict=True)
        )
        call = f"model = from_pretrained({name!r})\nmaps = model(images)  # {shapes}, rounded up"
        what = "returns feature maps of images of any size"
        levels = zip(model.out_indices, model.strides, model.out_channels, strict=True)
        rows = "".join(f"| {i} | {stride} | {channels} |\n" for i, stride, channels in levels)
        table = f"| index | stride | channels |\n| --- | --- | --- |\n{rows}"
    else:
        pipeline_tag = "image-classification"
        call = f"model = from_pretrained({name!r}).eval()\nlogits = model(images)  # (B, {model.num_classes})"
        what = f"is a classifier of {model.num_classes} classes"
        table = "`from_pretrained(..., features_only=True)` makes it a backbone that returns feature maps.\n"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"""---
{front_matter(model, pipeline_tag=pipeline_tag).to_yaml()}
---

# {name.rpartition("/")[2]}

`{info.canonical_name}` ({family(info)}) for dense-backbones, {what}.

```bash
{installation(info)}
```

```python
from backbones import from_pretrained

{call}
```

`images` are float tensors (B, {model.in_chans}, H, W) in RGB, scaled to 0..1 and normalised with mean
{_numbers(cfg["mean"])} and standard deviation {_numbers(cfg["std"])}; the model was made for {cfg["interpolation"]}
interpolation.

{table}
| | |
| --- | --- |
| parameters | {parameters:.2f} M |
| options | `{json.dumps(_options(model))}` |
| weights | {origin(model)} |
| licence of the code | {info.license or "not stated"} |
"""


# What saved models of every kind share


def write_folder(
    model: nn.Module,
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    card: Callable[[str], str],
    name: str | None = None,
) -> Path:
    """Write a model's weights, its configuration and, unless there is one already, its card.

    Args:
        model: whose weights are written.
        folder: made if need be.
        config: what it takes to build the model again, as JSON holds it.
        card: gives the card's text for the name that the model is to be loaded by.
        name: that name; the folder's unless given.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because the format takes neither channels-last nor shared memory.
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"library_name": LIBRARY, "library_version": version(LIBRARY), "format": FORMAT, **config}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not (folder / CARD).exists():
        (folder / CARD).write_text(card(name or folder.resolve().name), encoding="utf-8")
    return folder


def push_folder(
    save: Callable[[str, str], object],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add model",
) -> "CommitInfo":
    """Upload what `save(folder, name)` writes, but for a card where the repository has one; see `push_to_hub`."""
    api = HfApi(token=token, library_name=LIBRARY, library_version=version(LIBRARY))
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save(folder, repo_id)
        if api.file_exists(repo_id, CARD, revision=revision):
            (Path(folder) / CARD).unlink()
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


def read_folder(
    source: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
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


def require_fields(config: Any, fields: Mapping[str, type], source: str | os.PathLike) -> None:
    """Raise WeightsError unless a configuration is an object with these fields of these types."""
    if not isinstance(config, Mapping):
        raise WeightsError(f"{source}: {_EXPECTED}, and this one is no JSON object")
    for name, kind in fields.items():
        if not isinstance(config.get(name), kind):
            raise WeightsError(f"{source}: {_EXPECTED}, and this one has no {name!r}")


def backbone_config(model: "Backbone") -> dict[str, Any]:
    """What it takes to build a backbone again, as JSON holds it; `InputError` where JSON cannot."""
    name = getattr(model, "canonical_name", None)
    if name is None or not hasattr(model, "build_options"):
        raise InputError(
            f"a {type(model).__name__} that was not built by name cannot be built again from a folder; make it with "
            "build_backbone, after backbones.register(spec) if no plugin has it"
        )
    info = backbone_info(name)
    return {
        "backbone": name,
        "options": _options(model),
        "distribution": info.distribution,
        "distribution_version": info.version,
        "channels": model.out_channels,
        "strides": model.strides,
        "pretrained_cfg": _preprocessing(model),
    }


@contextmanager
def explained(config: Mapping[str, Any], source: str | os.PathLike) -> Iterator[None]:
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


# What cards of every kind share


def front_matter(backbone: "Backbone", **fields: Any) -> ModelCardData:
    """What the hub reads on top of a card: the licence and origin of the backbone's weights, and `fields`."""
    info = backbone_info(backbone.canonical_name)
    source = backbone.pretrained_cfg.get("source", "")
    license_name = backbone.pretrained_cfg.get("license") or "" if source else ""
    known = license_name.lower() in _HUB_LICENSES
    return ModelCardData(
        library_name=LIBRARY,
        license=license_name.lower() if known else "other" if license_name else None,
        license_name=license_name if license_name and not known else None,
        base_model=re.match(r"hf-hub:([^/]+/[^/@]+)|", source)[1],
        tags=[LIBRARY, "backbone", info.family.lower().replace(" ", "-"), "pytorch"],
        **fields,
    )


def installation(info: BackboneInfo) -> str:
    """The command that installs what a model takes."""
    return shlex.join(["pip", "install", *dict.fromkeys([LIBRARY, *filter(None, [info.distribution])])])


def family(info: BackboneInfo) -> str:
    """The family's name, with a link to its paper where there is one."""
    return f"[{info.family}]({info.paper})" if info.paper else info.family


def origin(backbone: "Backbone") -> str:
    """Which weights a backbone began with, and their licence."""
    cfg = backbone.pretrained_cfg
    if "source" in cfg:
        license_name = f" ({cfg['license']})" if cfg.get("license") else ""
        return f"built on `{cfg['tag']}` from {cfg['source'].removeprefix('hf-hub:')}{license_name}"
    if hasattr(backbone, "load_report"):
        return f"built on the checkpoint `{Path(backbone.load_report.source).name}`"
    return "built without published weights"


def _options(model: "Backbone") -> dict[str, Any]:
    """Options to build the model as it is now."""
    if model.unsaved_options:
        names = ", ".join(model.unsaved_options)
        raise InputError(
            f"{model.canonical_name} was built with {names}, which {CONFIG} cannot hold: only numbers, strings, lists "
            "and dicts of them. Build it with such values, or save model.state_dict() instead"
        )
    if model.features_only:
        return dict(model.build_options)
    return model.build_options | {"num_classes": model.num_classes, "global_pool": model.global_pool}


def _preprocessing(model: "Backbone") -> dict[str, Any]:
    try:
        return plain(model.pretrained_cfg)
    except TypeError as error:
        raise InputError(
            f"{model.canonical_name}: pretrained_cfg cannot be saved, {error}; put numbers, strings and lists there"
        ) from None


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


def _numbers(values: Any) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
