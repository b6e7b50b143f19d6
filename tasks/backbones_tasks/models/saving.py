"""What saves a model for a task: into a folder, onto the Hugging Face Hub, with a card."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from backbones import backbone_info, saving
from backbones.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["push_to_hub", "save_pretrained"]

_PIPELINES = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "detection": "object-detection",
    "panoptic": "image-segmentation",
}
_LISTED = 20  # classes in a card


class TaskModel(Protocol):
    """What saving asks of a model for a task; `HoldsBackbone` has it."""

    task: str
    build_options: dict[str, Any]
    unsaved_options: list[str]
    metadata: dict[str, Any]

    @property
    def inner_backbone(self) -> Any: ...

    def saved_options(self) -> dict[str, Any]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def save_pretrained(model: TaskModel, folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
    """Write a model for a task into a folder that `from_pretrained` builds it from again.

    The folder then holds `config.json` (task, architecture, options, and which backbone of which plugin),
    `model.safetensors`, and a model card `README.md`; a card that is there already is kept.

    Args:
        model: from `build_segmenter`, `build_classifier`, `build_detector` or `build_multitask`. What its `metadata`
            has (`class_names`, `data`, `metrics`, `training`) is saved and told in the card.
        folder: made if need be.
        name: what the card says to load; the folder's name unless given.

    Raises:
        InputError: the model, or its backbone, was built of what JSON cannot hold.
    """
    return saving.write_folder(model, folder, _config(model), lambda name: model_card(model, name), name)


def push_to_hub(model: TaskModel, repo_id: str, *, commit_message: str = "Add model", **options: Any) -> "CommitInfo":
    """Upload what `save_pretrained` writes to a repository of the hub, which is made if need be.

    Args:
        model: see `save_pretrained`.
        repo_id: `NAME`, or `ORGANISATION/NAME`. A model card that the repository has already is kept.
        commit_message: as `huggingface_hub` takes it.
        **options: `private`, `token`, `revision` and `create_pr`; see `backbones.hub.push_to_hub`.

    Returns:
        The commit, with its `commit_url`.

    Raises:
        InputError: see `save_pretrained`; nothing has been uploaded then.
    """
    _config(model)  # says what cannot be saved before a repository is made
    return saving.push_folder(
        lambda folder, name: save_pretrained(model, folder, name=name),
        repo_id,
        commit_message=commit_message,
        **options,
    )


def model_card(model: TaskModel, name: str) -> str:
    """The README.md of a saved model: front matter for the hub, then what a reader needs to use it.

    Args:
        model: see `save_pretrained`.
        name: the repository or folder that it is loaded from.
    """
    backbone, told = model.inner_backbone, model.metadata
    info, options = backbone_info(backbone.canonical_name), model.saved_options()
    title = name.rpartition("/")[2]
    classes, metrics = told.get("class_names"), told.get("metrics", {})
    rows = {
        "task": model.task,
        "architecture": options.get("architecture"),
        "backbone": f"`{info.canonical_name}` of {_distribution(info.distribution, info.version)}",
        "classes": _listing(classes) if classes else options.get("num_classes"),
        "data": told.get("data"),
        "metrics on the validation images": ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items()),
        "training": told.get("training"),
        "images": ", ".join(f"{option} {value}" for option, value in told.get("input", {}).items()),
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "weights": f"backbone {saving.origin(backbone)}",
        "licence of the backbone's code": info.license or "not stated",
        "options": f"`{json.dumps({k: v for k, v in options.items() if k not in ('architecture', 'num_classes')})}`",
        "options of the backbone": f"`{json.dumps(saving.backbone_config(backbone)['options'])}`",
    }
    table = "".join(f"| {label} | {_cell(value)} |\n" for label, value in rows.items() if value not in (None, ""))
    return f"""---
{_front_matter(model, title).to_yaml()}
---

# {title}

A model for {model.task} on `{info.canonical_name}` ({saving.family(info)}), made with dense-backbones.

```bash
{saving.installation(info)}
```

```python
{_example(model, name)}
```

| | |
| --- | --- |
{table}"""


def _config(model: TaskModel) -> dict[str, Any]:
    """What it takes to build the model again, as JSON holds it."""
    if not hasattr(model, "build_options"):
        raise InputError(
            f"a {type(model).__name__} that no builder made cannot be built again from a folder; make it with "
            "build_segmenter, build_classifier or build_detector"
        )
    if model.unsaved_options:
        raise InputError(
            f"the model for {model.task} was built with {', '.join(model.unsaved_options)}, which {saving.CONFIG} "
            "cannot hold: only numbers, strings, lists and dicts of them. Save model.state_dict() instead"
        )
    config = {
        "task": model.task,
        "options": model.saved_options(),
        "backbone": saving.backbone_config(model.inner_backbone),
        "metadata": model.metadata,
    }
    try:
        json.dumps(config)
    except TypeError as error:
        raise InputError(f"the metadata of the model cannot be saved: {error}") from None
    return config


def _front_matter(model: TaskModel, title: str) -> ModelCardData:
    told = model.metadata
    results = [
        EvalResult(
            task_type=_PIPELINES.get(model.task, "other"),
            dataset_type=told.get("data", "unknown"),
            dataset_name=told.get("data", "unknown"),
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in told.get("metrics", {}).items()
    ]
    results = {"eval_results": results, "model_name": title} if results else {}
    card = saving.front_matter(model.inner_backbone, pipeline_tag=_PIPELINES.get(model.task), **results)
    card.tags = [*(tag for tag in card.tags if tag != "backbone"), model.task]
    return card


def _example(model: TaskModel, name: str) -> str:
    """Code that loads the model and runs it."""
    mean, std = ([round(float(v), 6) for v in model.inner_backbone.pretrained_cfg[k]] for k in ("mean", "std"))
    lines = ["from backbones_tasks import from_pretrained"]
    load = f"model = from_pretrained({name!r}).eval()"
    results = {
        "detection": "# for each image: boxes (N, 4) as x0 y0 x1 y1, labels, scores, and masks if it has them",
        "panoptic": "# for each image: segments (H, W), where i + 1 is the i-th, and its labels, scores and things",
    }
    if model.task in ("multitask", *results):
        call = ["results = model(images)  # images: a list of float tensors (C, H, W), RGB in 0..1"]
        call += [results[model.task]] if model.task in results else []
    else:
        lines.append("from torchvision.transforms.v2.functional import normalize")
        shape = "(B, classes, H, W)" if model.task == "segmentation" else "(B, classes)"
        call = [
            "# images: float tensors (B, C, H, W), RGB in 0..1, of any size",
            f"logits = model(normalize(images, {mean}, {std}))  # {shape}",
        ]
    if model.metadata.get("class_names"):
        call.append('names = model.metadata["class_names"]')
    return "\n".join([*lines, "", load, *call])


def _listing(names: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    if isinstance(names, Mapping):
        return "; ".join(f"{head}: {_listing(theirs)}" for head, theirs in names.items())
    more = f" and {len(names) - _LISTED} more, see {saving.CONFIG}" if len(names) > _LISTED else ""
    return f"{len(names)}: {', '.join(names[:_LISTED])}{more}"


def _distribution(distribution: str, number: str) -> str:
    return f"{distribution} {number}" if distribution else "a specification of its own"


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ")
