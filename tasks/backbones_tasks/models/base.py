"""What models of all tasks share: a backbone by name, options or module, its layers for the optimizer, saving."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from backbones import LoadReport, build_backbone
from backbones.errors import InputError
from backbones.plain import json_values
from backbones.weights import is_new

from . import saving

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

BackboneLike = str | Mapping[str, Any] | nn.Module
Model = TypeVar("Model", bound="HoldsBackbone")


class HoldsBackbone(nn.Module):
    """A model for a task, with a backbone at `backbone_path`: timm's methods for layer-wise rates, and saving."""

    backbone_path: ClassVar[str] = "backbone"

    #: What it is for, such as "segmentation".
    task: str
    #: What its builder was given beside the backbone: what a file can hold, and names of the rest.
    build_options: dict[str, Any]
    unsaved_options: list[str]
    #: What users of a saved model want to know: "class_names", "data", "metrics", ...
    metadata: dict[str, Any]
    #: What became of the weights that `from_pretrained` read.
    load_report: LoadReport

    @property
    def inner_backbone(self) -> nn.Module:
        """The backbone itself, without the pyramid that a detector puts on it."""
        return self.get_submodule(self.backbone_path)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layers, in timm's convention; everything else comes after them."""
        backbone = self.inner_backbone
        if not hasattr(backbone, "group_matcher"):
            return {"backbone": _prefixed(self.backbone_path, "")}
        matcher = backbone.group_matcher(coarse=coarse)
        return {name: _prefixed(self.backbone_path, pattern) for name, pattern in matcher.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay, beside norms and biases."""
        backbone = self.inner_backbone
        names = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
        return {f"{self.backbone_path}.{name}" for name in names}

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Those of the backbone, but for what its published weights do not hold, such as a head or a pyramid."""
        backbone = self.inner_backbone
        new = getattr(backbone, "new_parts", ())
        return [p for name, p in backbone.named_parameters() if not is_new(name, new)]

    def saved_options(self) -> dict[str, Any]:
        """What its builder has to be given, beside the backbone, to build it as it is now."""
        return self.build_options

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes weights, options and a model card into a folder, for `backbones_tasks.from_pretrained(folder)`.

        Raises:
            InputError: it, or its backbone, was built of what a file cannot hold.
        """
        return saving.save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> "CommitInfo":
        """Uploads what `save_pretrained` writes, for `backbones_tasks.from_pretrained(repo_id)`.

        Args:
            repo_id: a repository of the Hugging Face Hub; made if need be.
            **options: `private`, `token`, `revision`, `create_pr`, `commit_message`; see `backbones.hub.push_to_hub`.
        """
        return saving.push_to_hub(self, repo_id, **options)


class Detector(HoldsBackbone):
    """What `build_detector` returns: one of torchvision's classes with a backbone of ours, called as theirs."""

    backbone_path = "backbone.body"

    if TYPE_CHECKING:  # torchvision has no types

        def __call__(
            self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
        ) -> dict[str, Tensor] | list[dict[str, Tensor]]: ...


def recorded(model: Model, task: str, **options: Any) -> Model:
    """A task model that knows what its builder was given, so that it can be saved."""
    model.task, model.build_options, model.metadata = task, json_values(options), {}
    model.unsaved_options = sorted(options.keys() - model.build_options.keys())
    return model


def make_backbone(backbone: BackboneLike, owner: str, **defaults: Any) -> nn.Module:
    """The backbone of a task model.

    Args:
        backbone: a name, a dict of `build_backbone` options that includes "name", or a module with `feature_info`
        owner: whose backbone it is, for errors
        defaults: options of `build_backbone` where the dict has no others

    Raises:
        InputError: the dict lacks "name", or the module `feature_info`
    """
    if isinstance(backbone, nn.Module):
        if not hasattr(backbone, "feature_info"):
            raise InputError(
                f"{type(backbone).__name__} has no feature_info to tell its channels; backbones.wrap(module, "
                "channels=..., strides=...) gives it one"
            )
        return backbone
    options = {**defaults, **backbone_options(backbone, owner)}
    return build_backbone(options.pop("name"), **options)


def backbone_options(backbone: str | Mapping[str, Any], owner: str) -> dict[str, Any]:
    """A backbone's name or options as a dict that has "name"."""
    options = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    if "name" not in options:
        raise InputError(f'{owner}: the backbone options {sorted(options)} lack "name"')
    return options


def image_statistics(body: nn.Module, options: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the images that the backbone's weights were made for.

    Raises:
        InputError: images have other channels than the weights tell of, and the options do not
    """
    config = getattr(body, "pretrained_cfg", None) or {}
    mean, std = config.get("mean", IMAGENET_DEFAULT_MEAN), config.get("std", IMAGENET_DEFAULT_STD)
    channels = getattr(body, "in_chans", len(mean))
    given = {"image_mean", "image_std"} <= options.keys()
    if channels != len(mean) and not given:
        raise InputError(f"the backbone takes images of {channels} channels: give image_mean and image_std of as many")
    return list(mean), list(std)


def _prefixed(path: str, pattern: Any) -> Any:
    """A matcher for names that begin with `path.`, from one for names without it."""
    if pattern is None:
        return None
    if not isinstance(pattern, str):
        return [(_prefixed(path, regex), suffix) for regex, suffix in pattern]
    # timm anchors by re.match; the ^ of each alternative would not match after the prefix
    unanchored = re.sub(r"(^|[|(:])\^", r"\1", pattern)
    return rf"^{re.escape(path)}\.(?:{unanchored})"
