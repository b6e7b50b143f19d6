"""Models written into folders and onto the Hugging Face Hub; what builds them again is in `hub`."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCardData
from safetensors.torch import save_file
from torch import nn

from .errors import InputError
from .plain import plain
from .specs import BackboneInfo

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["push_to_hub", "save_pretrained"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LIBRARY = "dense-backbones"
#: What this version writes into folders; it reads older ones as well.
FORMAT = 1

# Licences that the hub has an identifier for, of those that our specs name; others are shown by their name.
_HUB_LICENSES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit"}


def save_pretrained(model: "Backbone", folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
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
) -> CommitInfo:
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


def model_card(model: "Backbone", name: str) -> str:
    """The README.md of a saved model: front matter for the hub, then what a reader needs to use it.

    Args:
        model: a backbone, or a classifier, from `build_backbone`.
        name: the repository or folder that it is loaded from.
    """
    info, cfg = model.spec, model.pretrained_cfg
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
    folder: str | os.PathLike[str],
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
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody but its owner read what it writes
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
) -> CommitInfo:
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


def backbone_config(model: "Backbone") -> dict[str, Any]:
    """What it takes to build a backbone again, as JSON holds it; `InputError` where JSON cannot."""
    name = getattr(model, "canonical_name", None)
    if name is None or not hasattr(model, "build_options"):
        raise InputError(
            f"a {type(model).__name__} that was not built by name cannot be built again from a folder; make it with "
            "build_backbone, after backbones.register(spec) if no plugin has it"
        )
    return {
        "backbone": name,
        "options": _options(model),
        "distribution": model.spec.distribution,
        "distribution_version": model.spec.version,
        "channels": model.out_channels,
        "strides": model.strides,
        "pretrained_cfg": _preprocessing(model),
    }


# What cards of every kind share


def front_matter(backbone: "Backbone", **fields: Any) -> ModelCardData:
    """What the hub reads on top of a card: the licence and origin of the backbone's weights, and `fields`."""
    source = backbone.pretrained_cfg.get("source", "")
    license_name = backbone.pretrained_cfg.get("license") or "" if source else ""
    known = license_name.lower() in _HUB_LICENSES
    repository = re.match(r"hf-hub:([^/]+/[^/@]+)", source)
    return ModelCardData(
        library_name=LIBRARY,
        license=license_name.lower() if known else "other" if license_name else None,
        license_name=license_name if license_name and not known else None,
        base_model=repository[1] if repository else None,
        tags=[LIBRARY, "backbone", backbone.spec.family.lower().replace(" ", "-"), "pytorch"],
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


def _numbers(values: Any) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
