"""Whom a picture is of: a backbone in eval mode and what it is to be called, built from the command line."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones import Backbone, build_backbone
from backbones.errors import InputError

from ..options import key_values
from .photo import Photo


@dataclass(frozen=True)
class Subject:
    """A backbone, with its name and where its weights are from, as titles have them."""

    name: str
    model: Backbone
    weights: str

    @property
    def title(self) -> str:
        return f"{self.name}, {self.weights}"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def images(self, photo: Photo) -> Tensor:
        """A photo (1, 3, H, W) as the backbone's weights were trained on."""
        pixels = torch.from_numpy(photo.pixels).to(self.device).permute(2, 0, 1)[None].float() / 255
        return (pixels - self._statistic("mean")) / self._statistic("std")

    def _statistic(self, name: str) -> Tensor:
        return torch.tensor(self.model.pretrained_cfg[name], device=self.device).view(1, -1, 1, 1)

    @torch.no_grad()
    def maps(self, photo: Photo) -> list[Tensor]:
        """Its maps (C, h, w) of a photo."""
        return [m[0].float() for m in self.model(self.images(photo))]

    def position(self, level: int | None, stride: int = 0) -> int:
        """Where, among its maps, the one of an index is; without an index, the one nearest to a stride.

        Raises:
            InputError: there is no such map.
        """
        if level is None:
            return min(range(len(self.model.strides)), key=lambda i: abs(self.model.strides[i] - stride))
        if level not in self.model.out_indices:
            levels = ", ".join(
                f"{i} (stride {s})" for i, s in zip(self.model.out_indices, self.model.strides, strict=True)
            )
            raise InputError(f"--level={level}: {self.name} has the levels {levels}")
        return self.model.out_indices.index(level)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it was built, or its weights trained, for."""
        options = dict(self.model.spec.defaults) | self.model.build_options
        given = options.get("img_size")
        if given is None:
            return tuple(self.model.pretrained_cfg["input_size"][1:])
        return (given, given) if isinstance(given, int) else tuple(given)


def build_subjects(args: argparse.Namespace) -> list[Subject]:
    """The backbones that the command line names, in eval mode."""
    names = [args.name, *getattr(args, "backbone", [])]
    options = key_values(args.option)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = _weights(args.pretrained, len(names))
    return [_build(name, source, options, args.seed, device) for name, source in zip(names, weights, strict=True)]


def file_name(name: str) -> str:
    """A backbone's name as a part of a file's."""
    return name.replace("/", "-")


def _weights(given: list[str] | None, count: int) -> Sequence[bool | str]:
    if not given:
        return [given is not None] * count
    if len(given) != count:
        raise InputError(f"--pretrained has {len(given)} weights for {count} backbones; give one for each, or none")
    return given


def _build(name: str, weights: bool | str, options: Mapping[str, Any], seed: int, device: str) -> Subject:
    torch.manual_seed(seed)
    model = build_backbone(name, pretrained=weights, **options)
    if not model.features_only:
        raise InputError(f"{name}: pictures are of feature maps; leave out features_only=False")
    if model.in_chans != len(model.pretrained_cfg["mean"]):
        raise InputError(f"{name}: pictures are made of RGB images; leave out in_chans={model.in_chans}")
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device={device}: {str(error).splitlines()[0]}") from error
    if not weights:
        told = f"random weights (seed {seed})"
    elif weights is True or not Path(weights).expanduser().exists():
        told = f"weights {model.pretrained_cfg['tag']}"
    else:
        told = f"weights {Path(weights).name}"
    return Subject(name, model.eval().requires_grad_(False), told)
