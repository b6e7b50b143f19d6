"""The contract: what every backbone is, and what it gets from its base class."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import CommitInfo
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from timm.layers import calculate_drop_path_rates
from timm.models import FeatureInfo
from torch import Tensor, nn

from . import saving
from .arguments import (
    MOST_CHANNELS,
    MOST_CLASSES,
    OutIndices,
    check_count,
    check_size,
    resolve_indices,
    without_none,
)
from .classifier import Classifier
from .errors import InputError
from .intermediates import Intermediates
from .layers import (
    DROPOUTS,
    Blocks,
    PositionBias,
    RelativePositionBias,
    ceil_div,
    checkpoint,
    crop_to,
    has_statistics,
    hooks_kept,
    layer_norm_2d,
    pad_to_multiple,
    set_dropouts,
)
from .maps import declared_map, in_one_dtype
from .specs import BackboneInfo
from .variants import siblings
from .weights import KeyLayout, LoadReport, read_checkpoint, torchvision_transforms

__all__ = ["Backbone", "FeatureInfo"]


class _Finished(type):
    """Calls `finish` once the outermost constructor has returned, so that no architecture has to."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **without_none(kwargs))
        model.finish()
        return model


class Backbone(Classifier, Intermediates, metaclass=_Finished):
    """An image encoder that returns feature maps at declared strides, for any image size.

    An architecture sets `stem` and `stages` (NCHW in, NCHW out), one stage per entry of `strides`, and
    writes no forward; what does not fit overrides `forward_features`. Called with images of shape
    (B, in_chans, H, W), it returns one map (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))
    per index in `out_indices`, in ascending order. A network of one width and stride throughout runs its blocks by
    `backbones.Blocks`, and makes its maps by `backbones.Pyramid`.

    Args:
        channels: width of each map, finest first.
        strides: pixels per cell of each map, ascending.
        out_indices: which maps to return: None (all), indices from 0 or from the end (-1), or an int for
            the last n, as in timm. Stages beyond the last one asked for are neither built nor run.
        in_chans: channels of the images; weights for RGB are adapted when they are loaded.
        drop_path_rate: stochastic depth of the last block; earlier blocks get a linear share of it.
        attn_drop_rate, proj_drop_rate, pos_drop_rate: dropout of attention weights, of what attention and MLPs
            yield, and of cells with their positions, in architectures that have these.
        checkpointing: recompute activations in the backward pass to save memory.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and the first n stages.
        norm_eval: keep BatchNorm statistics fixed while training.
        output_stride: 32; with 8 or 16, no stride is above it: the last strides are left out, and what follows is
            dilated, or its windows are larger, so that the same weights see the same extent of the image.
        out_norm: a LayerNorm on each map that is returned, as the official dense-prediction code of
            several architectures has it.
        features_only: False builds the published classifier instead; the forward then returns logits.
        num_classes: classes of that classifier; 0 for pooled features.
        drop_rate: dropout before the classifier.
        global_pool: how the classifier pools: "avg", "max", "avgmax" (their mean), "catavgmax" (both) or "" (not at
            all); the class token, where there is one, as "token" and "both" (token and average).
        img_size: side, or (height, width), of the images that tables are made for, where an architecture has such;
            images may have any size all the same.

    None stands for the default of each of these, as in timm.

    Raises:
        InputError: an option or an image that cannot work; it names the range that can.

    What an architecture may override; all else is for those who call it. Attributes may be properties, and what
    depends on options is set in the constructor, `output_strides` and `global_pools` before the base class's is called.

    ==========================  =====================================================================================
    attribute                   what it says
    ==========================  =====================================================================================
    size_divisor                images are zero-padded, right and bottom, to a multiple of this; maps are cropped back
    output_strides              strides of the whole network that `output_stride` may ask for
    global_pools                pooling that the classifier knows, for `global_pool`
    stem_pattern                expression that matches names of the stem's parameters, for layer-wise lr decay
    block_pattern               the same of what belongs to block m of stage n, in groups; blocks in order of the groups
    new_parts                   parts that published classification checkpoints lack, or have for other classes
    left_out                    parts of published checkpoints that the architecture does without on purpose
    key_layouts                 key layouts of published checkpoints, tried beside its own names; the best fit wins
    own_layout                  whose parameter names the architecture has, for reports
    remedies                    of parts that some variants have: pattern of their names, what they are, what takes them
    weight_options              options that only say which weights to load; a saved model is built without them
    overwrites                  True for layers of a library that overwrite what other layers have returned
    runs_stages                 whether `stem`, then `stages`, is all that `forward_features` runs; told by itself
    hidden_features             width of what the last layer sees, where layers before it change it
    low_precision               False keeps `for_inference(dtype=torch.bfloat16)` from running it in that precision
    ==========================  =====================================================================================

    ==========================  =====================================================================================
    method                      what it does
    ==========================  =====================================================================================
    forward_features            maps of images, by index; where the network is not `stem`, then `stages`
    forward_intermediates       maps of each stage or block, for code written for timm; where the network is neither
    forward                     checks images, pads, crops; for a whole network of another library
    pad                         images as `forward_features` takes them
    forward_head                logits of unpooled features
    make_norm                   the classifier's norm before pooling; none by itself
    make_pre_logits             what the classifier has between pooling and logits; nothing by itself
    head_hidden_size            width of what the last layer sees, where `make_pre_logits` changes it; a property
    check_pool                  raises InputError for a pooling that options do not go with; extend it
    make_head                   sets the classifier's last layer, `head`, for `num_classes`
    get_classifier              the last layer, where it is not `head` alone
    reset_classifier            a last layer for other classes, where `make_head` alone does not do
    check_pool                  says which `global_pool` cannot be; where more than the kind decides
    set_input_size              tables for images of another size; where there are such
    make_out_norm               norm of one map for `out_norm=True`
    freezable                   what `frozen_stages` freezes, in turn; where the network is not `stem`, then `stages`
    group_matcher               layers in timm's convention, for lr decay; where the two patterns do not do
    no_weight_decay             names of what takes no weight decay beside norms, biases and `PositionBias`
    set_grad_checkpointing      checkpointing of what neither `Blocks` nor a stage is; extend it
    train                       training and eval mode; extend it
    read_weights                a file of weights under names that `key_layouts` knows
    adapt_table                 a checkpoint's table in this model's size; `RelativePositionBias` is resized by itself
    whole_names                 names of all that the architecture has with its options
    finish                      what is done once the outermost constructor has returned; extend it
    prepare_for_inference       what takes this model's place in `for_inference`; extend it
    extra_repr                  options in what `print` shows
    ==========================  =====================================================================================
    """

    key_layouts: ClassVar[tuple[KeyLayout, ...]] = ()
    own_layout: ClassVar[str] = "own"
    left_out: ClassVar[tuple[str, ...]] = ()
    remedies: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    weight_options: tuple[str, ...] = ()
    stem_pattern: ClassVar[str] = r"^stem"
    block_pattern: ClassVar[str] = r"^stages\.(\d+)\.blocks\.(\d+)"
    output_strides: ClassVar[tuple[int, ...]] = (32,)
    overwrites: ClassVar[bool] = False
    low_precision: ClassVar[bool] = True
    size_divisor: int = 1

    stem: nn.Module
    stages: nn.ModuleList

    # What `build_backbone` adds: who the model is, and what became of the weights that it loaded.
    spec: BackboneInfo
    canonical_name: str
    load_report: LoadReport

    def __init__(
        self,
        *,
        channels: Sequence[int],
        strides: Sequence[int] = (4, 8, 16, 32),
        out_indices: OutIndices = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        checkpointing: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        output_stride: int = 32,
        out_norm: bool = False,
        features_only: bool = True,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if len(channels) != len(strides):
            raise InputError(f"{name}: {len(channels)} channels for {len(strides)} strides; give one per map")
        if output_stride not in self.output_strides:
            raise InputError(
                f"{name}: output_stride={output_stride} is not supported; choose from {self.output_strides}"
            )
        if not 0.0 <= drop_path_rate < 1.0:
            raise InputError(f"{name}: drop_path_rate={drop_path_rate} must be at least 0 and under 1")
        check_count(name, "in_chans", in_chans, 1, MOST_CHANNELS)
        check_count(name, "num_classes", num_classes, 0, MOST_CLASSES)
        check_size(name, img_size)
        if not features_only and out_indices is not None:
            raise InputError(
                f"{name}: out_indices chooses feature maps, and features_only=False builds a classifier; "
                "pass one of the two"
            )

        self.in_chans = in_chans
        self.drop_path_rate = drop_path_rate
        self.dropouts = dict(zip(DROPOUTS, (attn_drop_rate, proj_drop_rate, pos_drop_rate), strict=True))
        self.checkpointing = checkpointing
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.output_stride = output_stride
        self.out_norm = out_norm
        self.features_only = features_only
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.check_pool(global_pool)

        self.out_indices = resolve_indices(out_indices, len(channels), name)
        #: Per stage, how much closer than published its cells lie: what its convolutions dilate by.
        self.dilations = [max(1, stride // output_stride) if output_stride < 32 else 1 for stride in strides]
        if output_stride < 32:  # 32 leaves an architecture as it is, coarser maps included
            strides = [min(stride, output_stride) for stride in strides]
        levels = [
            {"num_chs": c, "reduction": s, "module": f"stages.{i}"}
            for i, (c, s) in enumerate(zip(channels, strides, strict=True))
        ]
        self.feature_info = FeatureInfo(levels, self.out_indices)
        self.num_features = channels[-1]
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (in_chans, 224, 224),
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bicubic",
            "num_classes": num_classes,
            "classifier": "head",
            "fixed_input_size": False,
        }
        #: The options it was built with, by `build_backbone`: what a file can hold, and names of the rest.
        self.build_options: dict[str, Any] = {}
        self.unsaved_options: list[str] = []
        #: Of those, what follows from the weights, or from the name, that were asked for.
        self.implied_options: dict[str, Any] = {}

    # What callers ask

    @property
    def runs_stages(self) -> bool:
        """Whether the network is `stem`, then `stages`."""
        return type(self).forward_features is Backbone.forward_features

    @property
    def out_channels(self) -> list[int]:
        """Widths of the maps that the forward returns."""
        return self.feature_info.channels()

    @property
    def strides(self) -> list[int]:
        """Strides, in pixels, of the maps that the forward returns."""
        return self.feature_info.reduction()

    @property
    def default_cfg(self) -> dict[str, Any]:
        """`pretrained_cfg` under its older name, which code for timm reads as well."""
        return self.pretrained_cfg

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """Feature maps of images (B, in_chans, H, W); with `features_only=False`, logits (B, num_classes)."""
        self._check_images(images)
        padded = self.pad(images)
        with hooks_kept(self) if self.overwrites and not self.fast else nullcontext():
            features: Any = self.forward_features(padded)
        if not self.features_only:
            return self.forward_head(features)
        maps = []
        for i, stride in zip(self.out_indices, self.strides, strict=True):
            if torch.compiler.is_compiling():
                m = features[i]
            else:
                name = getattr(self, "canonical_name", type(self).__name__)
                m = declared_map(features, i, self.feature_info.info, images.shape, padded.shape, name)
            maps.append(crop_to(self.out_norms[str(i)](m), *(ceil_div(side, stride) for side in images.shape[-2:])))
        return in_one_dtype(maps)

    if TYPE_CHECKING:  # torch says that calling a module gives Any
        __call__ = forward

    def forward_features(self, images: Tensor) -> Sequence[Tensor] | Mapping[int, Tensor] | Tensor:
        """Maps by index, those asked for at least; of a classifier, its last map, normed and unpooled."""
        x = self.stem(self.pad(images))  # also right when called on its own
        maps = []
        for stage in self.stages:
            x = self._run(stage, x)
            maps.append(x)
        return maps if self.features_only else self.norm(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns activation checkpointing on or off, as in timm."""
        self.checkpointing = enable
        for module in self.modules():
            if isinstance(module, Blocks):
                module.checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        """Regular expressions that sort parameters into layers, in timm's convention, for layer-wise lr decay."""
        stages = [(r"^stages\.(\d+)\.norm", (99999,)), (r"^stages\.(\d+)", None)]
        blocks = stages if coarse else [(self.block_pattern, None), *stages]
        return {
            "stem": self.stem_pattern,
            "blocks": [*blocks, (r"^(?:norm|last_norm|pre_logits|stage_norms)\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay beside norms and biases: those of relative positions."""
        return {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, PositionBias)
            for parameter, _ in module.named_parameters()
        }

    def transforms(self) -> Callable[[Any], Tensor]:
        """What makes of a picture the images (3, H, W) that the weights were evaluated on.

        torchvision's own preset for its weights, which takes PIL images and uint8 tensors; else timm's, by
        `pretrained_cfg`, which takes PIL images.
        """
        if enum := self.pretrained_cfg.get("enum"):
            preset = torchvision_transforms(enum)
            preset.mean, preset.std = (list(self.pretrained_cfg[key]) for key in ("mean", "std"))
            return preset
        return create_transform(**resolve_data_config(pretrained_cfg=self.pretrained_cfg))

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **options: Any) -> None:
        """Makes tables for images of another size, as in timm; where there is none, any size is right already.

        Args:
            img_size: side, or (height, width).
            **options: timm's others, such as `patch_size` and `window_size`; None alone.
        """
        name = getattr(self, "canonical_name", type(self).__name__)
        check_size(name, img_size)
        if given := [key for key, value in options.items() if value is not None]:
            raise InputError(f"{name}: {', '.join(given)} cannot change once it is built; build it with that")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes weights, options and a model card into a folder, for `backbones.from_pretrained(folder)`.

        Raises:
            InputError: the model was not built by `build_backbone`, or with an option that JSON cannot hold.
        """
        return saving.save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Uploads what `save_pretrained` writes, for `backbones.from_pretrained(repo_id)`.

        Args:
            repo_id: a repository of the Hugging Face Hub; made if need be.
            **options: `private`, `token`, `revision`, `create_pr`, `commit_message`; see `backbones.hub.push_to_hub`.
        """
        return saving.push_to_hub(self, repo_id, **options)

    def train(self, mode: bool = True) -> "Backbone":
        """Training mode for what is neither frozen nor, with `norm_eval`, a BatchNorm."""
        super().train(mode)
        if mode:
            for part in self._frozen_parts():
                if isinstance(part, nn.Module):
                    part.eval()
            if self.norm_eval:
                for module in self.modules():
                    if has_statistics(module):
                        module.eval()
        return self

    def extra_repr(self) -> str:
        return f"out_indices={self.out_indices}, channels={self.out_channels}, strides={self.strides}"

    # What architectures use

    def pad(self, images: Tensor) -> Tensor:
        """Images as the stem takes them: zero-padded, right and bottom, to a multiple of `size_divisor`.

        They are channels-last, whatever weights are: convolutions then hand on channels-last maps, which norms and
        linear layers read without a copy.
        """
        return pad_to_multiple(images, self.size_divisor).contiguous(memory_format=torch.channels_last)

    def wanted(self, stages: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The leading stages that the maps asked for need; the rest of a lazy iterable is never built."""
        return itertools.islice(stages, self.out_indices[-1] + 1 if self.features_only else None)

    def drop_path_rates(self, depths: Sequence[int]) -> list[list[float]]:
        """Rates per stage and block, rising linearly over the whole depth, whatever is pruned."""
        rates: Any = calculate_drop_path_rates(self.drop_path_rate, list(depths), stagewise=True)
        return rates

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        """Parts in the order in which `frozen_stages` takes them: the stem, then one entry per stage."""
        stages: list[list[nn.Module | nn.Parameter]] = [[stage] for stage in self.stages]
        return [[self.stem], *stages]

    def make_out_norm(self, channels: int) -> nn.Module:
        """Norm of one map for `out_norm=True`."""
        return layer_norm_2d(channels)

    def read_weights(self, path: Path) -> Mapping[str, Any]:
        """The content of a file of weights, under names that `key_layouts` knows."""
        return read_checkpoint(path)

    def adapt_table(self, name: str, value: Tensor, checkpoint: Mapping[str, Tensor]) -> Tensor:
        """A size-dependent table of a checkpoint in this model's size; relative position tables are resized."""
        owner = self.get_submodule(name.rpartition(".")[0])
        return owner.fit(value) if isinstance(owner, RelativePositionBias) else value

    def whole_names(self) -> set[str]:
        """Names of all that the architecture has with its options: its classifier, and stages that were not built.

        A checkpoint of the whole is right for any part of it; what is not of the whole is another variant's.
        """
        built = set(self.state_dict())
        whole = [{"features_only": True, "out_indices": None}, {"features_only": False, "out_indices": None}]
        for sibling in siblings(self, *whole):
            built.update(sibling.state_dict())
        return built

    # How it is put together

    def finish(self) -> None:
        """Adds norms or a classifier, checkpointing, freezing and training mode to what the constructors built."""
        if self.features_only:
            # Named by index, so that a part of a pyramid takes the weights of all of it.
            self.out_norms = nn.ModuleDict(
                {
                    str(i): self.make_out_norm(c) if self.out_norm else nn.Identity()
                    for i, c in zip(self.out_indices, self.out_channels, strict=True)
                }
            )
            for i in self.out_indices:  # where a hook sees the map, of every architecture
                self.feature_info.info[i]["module"] = f"out_norms.{i}"
        else:
            self.norm = self.make_norm()
            self._add_pre_logits()
            self.make_head()
        set_dropouts(self, self.dropouts)
        self.set_grad_checkpointing(self.checkpointing)
        convs = (name for name, module in self.named_modules() if isinstance(module, nn.Conv2d))
        self.pretrained_cfg["first_conv"] = next(convs, None)
        parts = len(self.freezable())
        if not -1 <= self.frozen_stages < parts:
            raise InputError(
                f"{type(self).__name__}: frozen_stages={self.frozen_stages} is out of range; "
                f"choose from -1 (none) to {parts - 1} (all that is built)"
            )
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train()

    def _frozen_parts(self) -> list[nn.Module | nn.Parameter]:
        return list(itertools.chain.from_iterable(self.freezable()[: self.frozen_stages + 1]))

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        if recompute and not any(isinstance(m, Blocks) for m in stage.modules()):
            return checkpoint(stage, x)
        return stage(x)

    def _check_images(self, images: Tensor) -> None:
        name = getattr(self, "canonical_name", type(self).__name__)
        expected = f"{name} takes float images of shape (B, {self.in_chans}, H, W)"
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            hint = "; build it with in_chans to match" if images.ndim == 4 else ""
            raise InputError(f"{expected}, got {tuple(images.shape)}{hint}")
        if not images.is_floating_point():
            raise InputError(f"{expected}, got {images.dtype}; scale to [0, 1] and normalise first")
        if images.shape[2] < 1 or images.shape[3] < 1:
            raise InputError(f"{expected} with H and W of at least 1, got {tuple(images.shape)}")
