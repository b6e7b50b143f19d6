"""Models for tasks in folders and on the Hugging Face Hub; `backbones share` puts a trained one there."""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from backbones import LoadReport, backbone_info, build_backbone, hub, saving
from backbones.errors import InputError, WeightsError
from backbones.weights import read_checkpoint

from .base import HoldsBackbone
from .classifier import build_classifier
from .detector import build_detector
from .multitask import build_multitask
from .segmenter import build_segmenter

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained", "share"]

_BUILDERS = {
    "segmentation": build_segmenter,
    "classification": build_classifier,
    "detection": build_detector,
    "multitask": build_multitask,
}
_PIPELINES = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "detection": "object-detection",
}
_FIELDS = {"task": str, "options": dict, "backbone": dict}
_LISTED = 20  # classes in a card


def save_pretrained(model: HoldsBackbone, folder: str | os.PathLike, *, name: str | None = None) -> Path:
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


def push_to_hub(
    model: HoldsBackbone, repo_id: str, *, commit_message: str = "Add model", **options: Any
) -> "CommitInfo":
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


def from_pretrained(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    backbone: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Build a model for a task that `save_pretrained`, `push_to_hub` or `backbones share` saved, with its weights.

    Args:
        source: a folder, or a repository of the hub, `ORGANISATION/NAME`.
        revision: branch, tag or commit of the repository.
        token: for private repositories; by default the one that `hf auth login` has stored.
        backbone: options of the backbone that replace those that it was saved with, such as `drop_path_rate`.
        **options: replace those that the model was saved with, such as `num_classes` to fine-tune it on other data.
            What then fits is loaded, and `load_report` has the rest.

    Returns:
        The model, in training mode, as from `build_segmenter`, `build_classifier`, `build_detector` or
        `build_multitask`; its `metadata` has the names of the classes, where they are known.

    Raises:
        MissingDependency: the plugin that the backbone comes from is not installed.
        WeightsError: the folder or repository cannot be had, holds no such model, is of a newer format, or its weights
            are of another model.
    """
    config, weights = hub.read_folder(source, revision=revision, token=token)
    if "task" not in config and isinstance(config.get("backbone"), str):
        raise InputError(f"{source} holds a backbone alone; load it with backbones.from_pretrained")
    hub.require_fields(config, _FIELDS, source)
    saved = config["backbone"]
    hub.require_fields(saved, hub.BACKBONE_FIELDS, source)
    task = config["task"]
    if task not in _BUILDERS:
        raise WeightsError(f"{source} is a model for {task!r}, which dense-backbones {version(saving.LIBRARY)} has not")
    inner = {**saved["options"], **(backbone or {})}
    if "num_classes" in options and inner.get("features_only") is False:  # the classifier is the backbone's
        inner["num_classes"] = options["num_classes"]
    with hub.explained(saved, source):
        body = build_backbone(saved["backbone"], **{"pretrained_cfg": saved.get("pretrained_cfg"), **inner})
    model = _BUILDERS[task](backbone=body, **{**config["options"], **options})
    model.metadata = dict(config.get("metadata", {}))
    changed = inner != saved["options"] or any(
        name not in config["options"] or hub.as_saved(value) != config["options"][name]
        for name, value in options.items()
    )
    if changed and model.saved_options().get("num_classes") != config["options"].get("num_classes"):
        model.metadata.pop("class_names", None)
    model.load_report = _load(model, weights, str(source), exactly=not changed)
    return model


def share(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    push: str | None = None,
    private: bool | None = None,
    card_name: str | None = None,
) -> HoldsBackbone:
    """Save the trained model in a checkpoint of `backbones fit` into a folder, upload it, or both.

    The card tells the data, the metrics and the recipe, as the checkpoint and the run folder around it have them.

    Args:
        checkpoint: such as `runs/segmentation-001/checkpoints/best.ckpt`.
        out: folder to write, see `save_pretrained`.
        push: repository to upload to, see `push_to_hub`.
        private: whether the repository is, where it is made.
        card_name: what the card says to load; by default the repository's name, or else the folder's.

    Returns:
        The model.

    Raises:
        WeightsError: there is no such checkpoint, or it is not one of a run.
        InputError: neither `out` nor `push` is given, or the model was built of what a file cannot hold.
    """
    if out is None and push is None:
        raise InputError("say where to: a folder, by --out DIR, a repository of the hub, by --push ID, or both")
    model = load_model(Path(checkpoint))
    if out is not None:
        save_pretrained(model, out, name=card_name or push)
    if push is not None:
        push_to_hub(model, push, private=private)
    return model


def load_model(checkpoint: Path) -> HoldsBackbone:
    """The trained model in a checkpoint of `backbones fit`, in eval mode, with what its run tells in `metadata`."""
    from ..commands.predict import restore_task
    from ..training import runs

    content = runs.read_checkpoint(checkpoint)
    task = restore_task(content).eval()
    task.model.metadata = _facts(task, content["epoch"], checkpoint.absolute().parent.parent)
    return task.model


def model_card(model: HoldsBackbone, name: str) -> str:
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


def _config(model: HoldsBackbone) -> dict[str, Any]:
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


def _load(model: torch.nn.Module, weights: Path, source: str, exactly: bool) -> LoadReport:
    """Load what fits; an error where all has to and does not."""
    state, own = read_checkpoint(weights), model.state_dict()
    report = LoadReport(source=source)
    for name, value in state.items():
        if name not in own:
            report.unexpected[name] = tuple(value.shape)
        elif value.shape != own[name].shape:
            report.mismatched[name] = (tuple(value.shape), tuple(own[name].shape))
        else:
            report.loaded[name] = tuple(value.shape)
    report.missing = {name: tuple(value.shape) for name, value in own.items() if name not in state}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report.share = sum(size for name, size in sizes.items() if name in report.loaded) / max(1, sum(sizes.values()))
    if exactly and (report.missing or report.mismatched or report.unexpected):
        raise WeightsError(
            f"{source}: {saving.WEIGHTS} does not hold the weights of the {saving.CONFIG} beside it.\n{report}"
        )
    model.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def _facts(task: Any, epoch: int, run: Path) -> dict[str, Any]:
    """What a checkpoint of an epoch and its run tell: classes, data, metrics and recipe, no private paths."""
    from ..training.callbacks import read_metrics

    options = task.hparams
    facts: dict[str, Any] = {"class_names": task.class_names}
    if root := _data_root(run / "config.yaml"):
        facts["data"] = root
    for row in read_metrics(run / "metrics.csv"):
        if int(row["epoch"]) == epoch:
            scores = {name: float(row[name]) for name in task.scores if row.get(name)}
            facts["metrics"] = {name: score for name, score in scores.items() if math.isfinite(score)}
    recipe = [f"{epoch + 1} epoch{'s' if epoch else ''}", options["optimizer"], f"learning rate {options['lr']:g}"]
    facts["training"] = ", ".join(recipe)
    facts["input"] = {name: options[name] for name in ("image_size", "crop") if options.get(name)}
    return {name: value for name, value in facts.items() if value}


def _data_root(config: Path) -> str | None:
    """What a run was trained on, by the name of its folder."""
    import yaml

    if not config.is_file():
        return None
    data = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data") or {}
    if "root" not in data:
        return None
    return Path(data["root"]).expanduser().resolve().name if data["root"] else "coloured shapes, drawn on the fly"


def _front_matter(model: HoldsBackbone, title: str) -> ModelCardData:
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


def _example(model: HoldsBackbone, name: str) -> str:
    """Code that loads the model and runs it."""
    mean, std = ([round(float(v), 6) for v in model.inner_backbone.pretrained_cfg[k]] for k in ("mean", "std"))
    lines = ["from backbones_tasks import from_pretrained"]
    load = f"model = from_pretrained({name!r}).eval()"
    if model.task in ("detection", "multitask"):
        call = ["results = model(images)  # images: a list of float tensors (C, H, W), RGB in 0..1"]
        if model.task == "detection":
            call.append("# for each image: boxes (N, 4) as x0 y0 x1 y1, labels, scores, and masks if it has them")
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


def command(argv: Sequence[str]) -> int:
    """`backbones share CKPT --out DIR | --push ID`."""
    parser = argparse.ArgumentParser(
        prog="backbones share",
        description="Save the trained model in a checkpoint for others: config.json, model.safetensors and a model "
        "card, in a folder, on the Hugging Face Hub, or both. backbones_tasks.from_pretrained loads it again.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="of `backbones fit`, such as .../best.ckpt")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--push", metavar="ID", help="repository of the hub to upload to; made if need be")
    parser.add_argument("--private", action="store_true", default=None, help="make that repository private")
    args = parser.parse_args(list(argv))
    model = share(args.checkpoint, args.out, push=args.push, private=args.private)
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in model.metadata.get("metrics", {}).items())
    print(f"{model.task} on {model.inner_backbone.canonical_name}{': ' if metrics else ''}{metrics}")
    for where in filter(None, (args.out, args.push)):
        print(f"saved: backbones_tasks.from_pretrained({str(where)!r})")
    return 0
