"""Any model of timm (https://github.com/huggingface/pytorch-image-models) that yields maps, as a backbone."""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import group_parameters
from torch import Tensor, nn

from backbones.arguments import check_size
from backbones.backbone import Backbone
from backbones.errors import InputError, MissingDependency
from backbones.intermediates import Indices
from backbones.layers import DROPOUTS, ceil_div, crop_to, hold_statistics, hooks_kept
from backbones.pyramid import Pyramid
from backbones.weights import KeyLayout

from . import table
from .folding import fold_norms
from .layouts import key_layouts
from .measure import create, measure
from .sources import STRIDES, Source, sources

PYRAMIDS = ("simple", "taps", "plain")

# What reads files, fetches or calls back: timm's own options for weights, which `pretrained` replaces. By the kind of
# their names, so that those of other versions are among them.
_READS_FILES = re.compile(
    r"pretrained|checkpoint_|checkpoint$|filter|(^|_)(cache|cfg|dir|files?|paths?|url|hub|overlay|weights)(_|$)"
)

_BASE_OPTIONS = set(inspect.signature(Backbone.__init__).parameters) - {"self", *DROPOUTS}


class TimmBackbone(Backbone):
    """A model of timm, its maps at strides 4, 8, 16 and 32.

    Maps that it has at these strides are handed on as they are; those that it lacks are made from the nearest.
    Its parameters keep timm's names, under `model.`.

    Args:
        model_name: timm's name, without a tag.
        img_size: side, or (height, width), of the images to build for, where the model needs to know; those of its
            published weights unless given. Smaller images are padded to it.
        pyramid: how the maps that the model lacks are made: "simple" (ViTDet: each up-sampling halves the width),
            "taps" (BEiT: each map from a block of its own, widths stay; for models of one stride) or "plain" (not
            at all).
        num_classes: of the classifier; timm's default for the model unless given.
        global_pool: of the classifier; timm's default for the model unless given.
        **options: those of `backbones.Backbone`, and any that timm's constructor takes.

    Raises:
        InputError: the model cannot keep the promise of a backbone, or does not take an option.
        MissingDependency: the installed timm does not have the model.
    """

    own_layout = "timm"
    overwrites = True

    def __init__(
        self,
        model_name: str,
        img_size: int | tuple[int, int] | None = None,
        pyramid: str = "simple",
        num_classes: int | None = None,
        global_pool: str | None = None,
        **options: Any,
    ):
        if not timm.is_model(model_name):
            raise MissingDependency(
                f"timm {timm.__version__}, which is installed, has no model {model_name!r}; timm "
                f"{table.measured_with()} has it: run `pip install --upgrade timm`"
            )
        common = {key: options.pop(key) for key in _BASE_OPTIONS & options.keys()}
        if refused := sorted(filter(_READS_FILES.search, options)):
            raise InputError(
                f"timm/{model_name} does not take {', '.join(refused)}, by which timm reads files; for weights pass "
                "pretrained=PATH"
            )
        features_only = common.get("features_only", True)
        if img_size is not None:
            options["img_size"] = to_2tuple(img_size)
        as_measured = timm.__version__ == table.measured_with() and not options and not table.is_users(model_name)
        facts = table.models().get(model_name) if as_measured else None
        try:
            facts = facts or measure(model_name, **options)
        except TypeError as error:
            if img_size is None or "'img_size'" not in str(error):
                raise
            del options["img_size"]  # its layers take any size
            facts = measure(model_name, **options)
        if pyramid not in PYRAMIDS:
            raise InputError(f"pyramid={pyramid!r} is unknown; choose from 'simple', 'taps' and 'plain'")
        if features_only and facts.refused:
            raise InputError(f"timm/{model_name} cannot be a backbone: {facts.refused}")
        if pyramid == "taps" and not facts.blocks:
            raise InputError(
                f"timm/{model_name} has maps of several strides, and no blocks of one stride for pyramid='taps'; "
                "use 'simple'"
            )
        self.output_strides = facts.output_strides
        self.sources = sources(facts.levels, facts.blocks, pyramid) if features_only else []
        channels = [source.channels for source in self.sources] or list(facts.channels) or [1]
        super().__init__(
            channels=channels,
            strides=[source.stride for source in self.sources] or STRIDES[-len(channels) :],
            num_classes=1000 if num_classes is None else num_classes,
            global_pool="avg" if global_pool is None else global_pool,
            **common,
        )
        self.model_name = model_name
        self.facts = facts
        self.size_divisor = facts.divisor

        options |= facts.options | {"in_chans": self.in_chans}
        if self.output_stride != 32:
            options["output_stride"] = self.output_stride
        if not features_only:
            given = {"num_classes": num_classes, "global_pool": global_pool, "drop_rate": self.drop_rate or None}
            options |= {key: value for key, value in given.items() if value is not None}
        self.model = self._create(options)
        self._whole = {f"model.{name}" for name in self.model.state_dict()}
        self.pretrained_cfg = dict(self.model.pretrained_cfg)
        self.num_features = self.model.num_features
        if features_only:
            self._keep_maps()
        else:
            self.num_classes = getattr(self.model, "num_classes", self.num_classes)
            if global_pool is None:
                pool = getattr(self.model, "global_pool", None)  # a word, or the module that pools
                self.global_pool = str(getattr(pool, "pool_type", pool) or self.global_pool)

    # What the model is made of

    def _create(self, options: dict[str, Any]) -> nn.Module:
        name = f"timm/{self.model_name}"
        pad_convolutions = self.facts.pad_convolutions and self.features_only
        rate = {"drop_path_rate": self.drop_path_rate}  # also where it is 0, for some of timm's defaults are not
        try:
            model = create(self.model_name, pad_convolutions, **options, **rate)
        except AssertionError as error:
            raise InputError(f"{name} cannot be built so: {error or 'timm does not say why'}") from error
        except TypeError as error:
            found = re.search(r"unexpected keyword argument(?:\(s\):)? \[?'(\w+)'", str(error))
            option = found[1] if found else ""
            if option == "drop_path_rate" and not self.drop_path_rate:
                return create(self.model_name, pad_convolutions, **options)
            if option in ("drop_path_rate", "drop_rate", "global_pool"):
                raise InputError(f"{name} has no {option}; leave it out") from error
            raise
        if self.drop_path_rate and not any(getattr(m, "drop_prob", 0) for m in model.modules()):
            raise InputError(f"{name} has no stochastic depth; leave drop_path_rate out")
        return model

    def _keep_maps(self) -> None:
        """Leaves in the model what the maps asked for need, and adds what makes those that it lacks."""
        wanted = [self.sources[i] for i in self.out_indices]
        self.taken = sorted({source.index for source in wanted})
        self.model.prune_intermediate_layers(self.taken, prune_norm=True, prune_head=True)
        for name, parameter in self.model.named_parameters():
            if name in self.facts.unused:
                parameter.requires_grad_(False)  # else distributed training waits for its gradient
        self.pyramid = nn.ModuleDict(
            {
                str(source.stride): Pyramid(
                    source.width, source.own_stride, (source.stride,), halve=source.channels != source.width
                )
                for source in wanted
                if source.stride != source.own_stride
            }
        )

    # What it does

    def pad(self, images: Tensor) -> Tensor:
        """Images as timm's model takes them."""
        height, width = images.shape[-2:]
        if self.facts.side:
            allowed = self.facts.side
            if height > allowed[0] or width > allowed[1]:
                raise InputError(
                    f"timm/{self.model_name} is built for images of up to {allowed[0]} x {allowed[1]}, got "
                    f"{height} x {width}; build it with img_size=({height}, {width}) or more"
                )
            images = F.pad(images, (0, allowed[1] - width, 0, allowed[0] - height))
            return images.contiguous(memory_format=torch.channels_last)
        if self.facts.minimum > self.size_divisor:
            images = F.pad(images, (0, max(0, self.facts.minimum - width), 0, max(0, self.facts.minimum - height)))
        return super().pad(images)

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """Feature maps of images (B, in_chans, H, W); with `features_only=False`, what timm's model returns."""
        if self.checkpointing and self.training:
            hold_statistics(self.model)
        if self.features_only:
            return super().forward(images)
        self._check_images(images)
        with nullcontext() if self.fast else hooks_kept(self):
            return self.model(self.pad(images))

    def forward_features(self, images: Tensor) -> dict[int, Tensor] | Tensor:
        """Maps by index; of a classifier, what timm's `forward_features` returns."""
        images = self.pad(images)
        if not self.features_only:
            return self.model.forward_features(images)
        maps = self.model.forward_intermediates(
            images, indices=self.taken, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        by_index = dict(zip(self.taken, maps, strict=True))
        return {i: self._level(self.sources[i], by_index[self.sources[i].index], images) for i in self.out_indices}

    def _level(self, source: Source, x: Tensor, images: Tensor) -> Tensor:
        if source.stride == source.own_stride:
            return x
        (x,) = self.pyramid[str(source.stride)]([x])
        return crop_to(x, *(ceil_div(side, source.stride) for side in images.shape[-2:]))

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returns; with `pre_logits`, what the last layer sees."""
        return self.model.forward_head(features, pre_logits=pre_logits)

    def forward_intermediates(self, x: Tensor, indices: Indices = None, **options: Any) -> Any:
        """What timm's own returns; a backbone of maps has those alone that it was built for.

        Args:
            x: images (B, in_chans, H, W).
            indices: of timm's features: None (all), an int for the last n, or indices from 0 or from the end.
            **options: timm's, such as `norm`, `stop_early`, `output_fmt` and `intermediates_only`.
        """
        self._check_images(x)
        try:
            return self.model.forward_intermediates(self.pad(x), indices=indices, **options)
        except (AssertionError, TypeError) as error:
            raise InputError(
                f"timm/{self.model_name}: forward_intermediates({indices=}, {options}): {error}"
            ) from error

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **options: Any) -> None:
        """timm's own, where the model has one."""
        if not hasattr(self.model, "set_input_size"):
            super().set_input_size(img_size, **options)
            return
        check_size(f"timm/{self.model_name}", img_size)
        size = None if img_size is None else to_2tuple(img_size)
        try:
            self.model.set_input_size(size, **options)
        except (AssertionError, TypeError) as error:
            raise InputError(f"timm/{self.model_name}: set_input_size({img_size=}, {options}): {error}") from error
        if size and self.facts.side:
            self.facts = replace(self.facts, side=size)
        if size:
            self.build_options["img_size"] = list(size)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The layer that yields the logits, or several, as timm's model has it."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one for `num_classes`, as timm does; 0 for none."""
        if self.features_only:
            raise InputError(f"timm/{self.model_name}: build it with features_only=False to have a classifier")
        like = next(self.parameters())
        try:
            self.model.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        except AssertionError as error:
            raise InputError(f"timm/{self.model_name}: global_pool={global_pool!r} is impossible: {error}") from error
        self.model.to(device=like.device, dtype=like.dtype)
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool

    def check_pool(self, global_pool: str) -> None:
        """timm's models say by themselves how they pool."""

    @property
    def head_hidden_size(self) -> int:
        return getattr(self.model, "head_hidden_size", self.num_features)

    def prepare_for_inference(self) -> nn.Module:
        fold_norms(self.model)
        return super().prepare_for_inference()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns timm's own activation checkpointing on or off.

        Raises:
            InputError: the model has none.
        """
        self.checkpointing = enable
        try:
            self.model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError, TypeError) as error:
            if enable:
                raise InputError(f"timm/{self.model_name} has no activation checkpointing; leave it out") from error

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        """timm's own layers, one pattern each, in timm's convention."""
        by_layer = sorted(self._layers(coarse).items(), key=lambda item: item[1])
        patterns = []
        for layer, names in groupby(by_layer, key=lambda item: item[1]):
            alternatives = "|".join(re.escape(name) for name, _ in names)
            patterns.append((rf"^model\.(?:{alternatives})$", (layer,)))
        return {"layers": patterns}

    def no_weight_decay(self) -> set[str]:
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in names}

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        """The stem, then what ends in each of the model's maps; of models of one stride, quarters of the blocks."""
        layers = self._layers()
        ends = [self._last_layer(name, layers) for name in self._stage_names()]
        stages: list[list[nn.Module | nn.Parameter]] = [[] for _ in range(len(ends) + 1)]

        layer_of = {parameter: layers[name] for name, parameter in self.model.named_parameters()}

        def stage_of(parameter: nn.Parameter) -> int:
            layer = layer_of[parameter]
            if layer == 0:
                return 0
            return 1 + next((i for i, end in enumerate(ends) if layer <= end), len(ends) - 1)

        for found, part in _largest_parts(self.model, stage_of):
            stages[found].append(part)
        return stages

    def _stage_names(self) -> list[str]:
        """timm's names of the modules that end a stage, as far as they are built."""
        info = list(self.model.feature_info)
        blocks = self.facts.blocks
        indices = [math.ceil(blocks * n / 4) - 1 for n in (1, 2, 3, 4)] if blocks else []
        indices = indices or [level.index for level in self.facts.levels] or range(len(info))
        last = self.taken[-1] if self.features_only else len(info)
        return [info[i]["module"] for i in indices if i <= last or i == indices[0]]

    def _layers(self, coarse: bool = False) -> dict[str, int]:
        """Parameter names of timm's model to the number of their layer, the stem's being 0."""
        if hasattr(self.model, "group_matcher"):
            return group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        names = [name for name, _ in self.model.named_parameters()]
        pattern = r"[^.\d]+\.\d+" if coarse else r"[^.\d]+(\.\d+)+"
        keys = [found[0] if (found := re.match(pattern, name)) else "" for name in names]
        order = {key: i for i, key in enumerate(dict.fromkeys(["", *keys]))}
        last = max(order.values(), default=0)
        seen, layers = False, {}
        for name, key in zip(names, keys, strict=True):
            seen |= bool(key)
            layers[name] = order[key] if key else (last if seen else 0)
        return layers

    def _last_layer(self, module: str, layers: Mapping[str, int]) -> int:
        inside = [layer for name, layer in layers.items() if name.startswith(f"{module}.")]
        if inside:
            return max(inside)
        before = 0
        for name, part in self.model.named_modules():  # a module without parameters ends with what comes before it
            if name == module:
                break
            before = max(
                [before, *(layers[f"{name}.{p}".lstrip(".")] for p, _ in part.named_parameters(recurse=False))]
            )
        return before

    # Weights

    @property
    def key_layouts(self) -> tuple[KeyLayout, ...]:
        return key_layouts(self.model, self.model_name)

    @property
    def new_parts(self) -> tuple[str, ...]:
        return ("pyramid", "out_norms", *(f"model.{name}" for name in self._classifiers()))

    def adapt_table(self, name: str, value: Tensor, checkpoint: Mapping[str, Tensor]) -> Tensor:
        """The rows of a classifier that was trained with a class for the background, without it."""
        offset = self.pretrained_cfg.get("label_offset") or 0
        is_classifier = name.rpartition(".")[0] in [f"model.{c}" for c in self._classifiers()]
        return value[offset:] if is_classifier and len(value) == self.num_classes + offset else value

    def whole_names(self) -> set[str]:
        return self._whole | set(self.state_dict())

    def _classifiers(self) -> tuple[str, ...]:
        names = self.pretrained_cfg.get("classifier") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def make_head(self) -> None:
        """timm's model has its own."""


def _largest_parts(
    module: nn.Module, stage_of: Callable[[nn.Parameter], int], whole: bool = False
) -> Iterator[tuple[int, nn.Module | nn.Parameter]]:
    """Modules, as large as may be, and single parameters, each with the one stage that all of it belongs to."""
    found = {stage_of(parameter) for parameter in module.parameters()}
    if len(found) == 1 and whole:
        yield found.pop(), module
        return
    for parameter in module.parameters(recurse=False):
        yield stage_of(parameter), parameter
    for child in module.children():
        yield from _largest_parts(child, stage_of, whole=True)
