"""AutoBackbone of transformers under the contract."""

import copy
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import hold_statistics
from backbones.pyramid import Pyramid
from backbones.weights import KeyLayout, read_checkpoint

from . import configs

# What a saved configuration says about other things than the architecture.
_NOT_SETTINGS = ("architectures", "dtype", "out_features", "out_indices", "stage_names", "torch_dtype")


class TransformersBackbone(Backbone):
    """A backbone of transformers, by hub id, folder or model type.

    Args:
        source: `ORGANISATION/MODEL` on the hub, a folder with a `config.json`, or a model type.
        config: settings to change in that configuration, or a `PreTrainedConfig` to use instead of it.
        pyramid: of plain transformers: "simple" (ViTDet: all levels from the last block), "taps" (BEiT: each level
            from a block of its own) or "plain" (the one map of the patches' stride).
        taps: for "taps", the four blocks, counted from 1, whose outputs the levels take; a third, half, two thirds
            and all of the depth unless given.
        **options: those of `backbones.Backbone`.
    """

    key_layouts = (KeyLayout("transformers", ((r"^", "body."),)),)
    new_parts = ("head", "out_norms", "pyramid", "body.hidden_states_norms")
    overwrites = True

    def __init__(
        self,
        source: str,
        config: PreTrainedConfig | Mapping[str, Any] | None = None,
        pyramid: str = "simple",
        taps: Sequence[int] | None = None,
        **options: Any,
    ):
        settings = _settings(source, config)
        kind = configs.KINDS[settings["model_type"]]
        channels, strides, features = configs.levels(settings, pyramid, taps)
        super().__init__(channels=channels, strides=strides, **options)
        if not self.features_only:
            raise InputError(
                f"transformers/{source}: features_only=False is not offered; transformers' own "
                "AutoModelForImageClassification.from_pretrained builds the classifier, and backbones_tasks' "
                "build_classifier puts a new head on this backbone"
            )
        self.size_divisor = configs.patch_size(settings) if kind.plain else kind.divisor
        self.settings = settings
        self.features = features
        self.quarters = (0,)
        wanted = sorted({features[i] for i in self.out_indices})
        depths = [settings["num_hidden_layers"]] if kind.plain else settings.get("depths", [1] * len(channels))
        self.body = AutoBackbone.from_config(_config(settings, wanted, self.in_chans, self.drop_path_rate))
        if kind.unused:
            self.body.set_submodule(kind.unused, nn.Identity())
            self.left_out = (f"body.{kind.unused}",)
        _keep_what_learns(self.body)
        self._set_drop_path(self.drop_path_rates(depths))
        if kind.plain:
            self.quarters = tuple(math.ceil(depths[0] * n / 4) for n in range(5))
            if pyramid != "plain":
                own = [strides[i] for i in self.out_indices]
                self.pyramid = Pyramid(settings["hidden_size"], self.size_divisor, own, halve=pyramid == "simple")
        self._wanted = wanted

    def forward_features(self, images: Tensor) -> dict[int, Tensor]:
        """Maps by index."""
        x = self.pad(images)
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        if recompute:
            hold_statistics(self.body)
        if recompute and not self.body.supports_gradient_checkpointing:
            maps = checkpoint(self._maps, x, use_reentrant=False)
        else:
            maps = self._maps(x)
        found = dict(zip(self._wanted, maps, strict=True))
        maps = [found[self.features[i]] for i in self.out_indices]
        return dict(zip(self.out_indices, self.pyramid(maps) if hasattr(self, "pyramid") else maps, strict=True))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        if self.body.supports_gradient_checkpointing and enable:
            self.body.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.body.supports_gradient_checkpointing:
            self.body.gradient_checkpointing_disable()

    def read_weights(self, path: Path) -> Mapping[str, Any]:
        """A checkpoint; of a folder of transformers, under the names that its installed version gives to tensors."""
        if not (path.parent / "config.json").is_file() or path.name not in configs.WEIGHT_FILES:
            return read_checkpoint(path)
        settings = configs.complete(configs.read(str(path.parent.resolve())))
        if settings["model_type"] != self.settings["model_type"]:
            return read_checkpoint(path)
        config = _config(_settings_only(settings), sorted(set(self.features)), 3, 0.0)
        level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR)  # our own report says what is missing
        try:
            net, info = type(self.body).from_pretrained(
                str(path.parent), config=config, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        finally:
            logging.getLogger("transformers").setLevel(level)
        missing = set(info["missing_keys"])
        return {name: value for name, value in net.state_dict().items() if name not in missing}

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        """Embeddings, then the stages or, of plain transformers, the blocks in quarters."""
        blocks = _blocks(self.body)
        named = dict(self.body.named_modules())
        stem = [m for name, m in named.items() if name.rpartition(".")[2] in ("embeddings", "embedder")][:1]
        first = blocks[0]
        stem = stem or [
            getattr(first, part) for part in ("downsample_layers", "patch_embedding") if hasattr(first, part)
        ]
        if len(self.quarters) == 1:
            return [stem, *([stage] for stage in blocks)]
        return [stem, *([*blocks[a:b]] for a, b in pairwise(self.quarters))]

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        stem = (
            r"^body\.(?:\w+\.)?(?:embeddings|embedder)\.",
            r"^body\.model\.stages\.0\.downsample_layers\.",
            r"^body\.encoder\.layers\.0\.patch_embedding\.",
        )
        stage = (r"^body\.(?:\w+\.)*?(?:stages|layers|layer)\.(\d+)\.", None)
        block = (r"^body\.(?:\w+\.)*?(?:stages|layers)\.(\d+)\.(?:blocks|layers)\.(\d+)\.", None)
        return {"stem": "|".join(stem), "blocks": [*([] if coarse else [block]), stage, (r"^body\.", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Tokens, positions and scales, beside norms and biases."""
        kinds = ("cls_token", "register_token", "position_embedding", "pos_embed", "relative_position", "logit_scale")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}

    def __getstate__(self) -> dict[str, Any]:
        # transformers gathers features by hooks that cannot be pickled, and puts them back by itself.
        return self.__dict__ | {"_modules": self._modules | {"body": _without_hooks(self.body)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _prepare(self.body)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(x).feature_maps)

    def _set_drop_path(self, rates: Sequence[Sequence[float]]) -> None:
        """Rates that rise over the whole depth, whatever is pruned; transformers has other ideas in some models."""
        if not self.drop_path_rate:
            return
        if not hasattr(self.body.config, "drop_path_rate"):
            raise InputError(f"transformers' {self.settings['model_type']} has no drop path; leave drop_path_rate at 0")
        units: list[nn.Module] = []
        for stage in _blocks(self.body):
            units += list(getattr(stage, "blocks", None) or getattr(stage, "layers", None) or [stage])
        for unit, rate in zip(units, itertools.chain(*rates), strict=False):  # fewer units where stages are pruned
            for name, module in list(unit.named_modules()):
                if type(module).__name__.endswith("DropPath"):
                    parent, _, leaf = name.rpartition(".")
                    setattr(unit.get_submodule(parent), leaf, DropPath(rate))


def refuse(source: str, **options: Any) -> NoReturn:
    """Says why a model of transformers is not offered."""
    model_type = configs.read(source)["model_type"]
    raise InputError(f"transformers/{source}: model type {model_type!r} is not offered: {configs.REFUSED[model_type]}")


def _settings(source: str, config: PreTrainedConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    settings = configs.read(source)
    if isinstance(config, PreTrainedConfig):
        if config.model_type != settings["model_type"]:
            raise InputError(f"config= is of type {config.model_type!r}, and {source!r} of {settings['model_type']!r}")
        settings = config.to_dict()
    elif config is not None:
        settings |= config
    return configs.complete(_settings_only(settings))


def _settings_only(settings: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in settings.items():  # transformers would fetch such a kernel from the hub and run it
        if "implementation" in name and any(mark in str(value) for mark in "/@|:"):
            raise InputError(f"transformers' {name}={value!r} names code to be loaded; use 'sdpa' or 'eager'")
    return {name: value for name, value in settings.items() if name not in _NOT_SETTINGS}


def _config(
    settings: Mapping[str, Any], wanted: Sequence[int], in_chans: int, drop_path_rate: float
) -> PreTrainedConfig:
    """transformers' configuration of the part that is wanted: no block or stage beyond the last feature."""
    settings = copy.deepcopy(dict(settings))
    kind = configs.KINDS[settings["model_type"]]
    if kind.plain:
        count, kept = settings["num_hidden_layers"], wanted[-1]
        settings |= {"num_hidden_layers": kept, "reshape_hidden_states": True}
    else:
        widths = settings[kind.widths]
        count = len(settings["depths"] if kind.widths == "embed_dim" else widths)
        kept = wanted[-1] - kind.first + 1
        if kind.counts:
            settings[kind.counts] = kept
    model_type = settings.pop("model_type")
    full = AutoConfig.for_model(model_type, **settings).to_dict()
    full = {name: value for name, value in full.items() if name not in ("model_type", *_NOT_SETTINGS)}
    for name, value in full.items():
        if isinstance(value, (list, tuple)) and len(value) == count and count > 3:
            full[name] = list(value[:kept])
    full["num_channels"] = in_chans
    if "stem_channels" in full:
        full["stem_channels"] = [in_chans, *full["stem_channels"][1:]]
    if "drop_path_rate" in full:
        full["drop_path_rate"] = drop_path_rate
    return AutoConfig.for_model(model_type, **full, out_indices=list(wanted))


def _keep_what_learns(body: nn.Module) -> None:
    """Takes away the token of masked images, which never come here, and lets no parameter be empty."""
    for module in body.modules():
        if getattr(module, "mask_token", None) is not None:
            module.mask_token = None
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.numel():  # DINOv3's register tokens, where it has none
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)


def _without_hooks(module: nn.Module) -> nn.Module:
    """The same parameters in modules without the hooks of transformers."""
    twin = copy.copy(module)
    hooks = module._forward_hooks.items()
    twin._forward_hooks = OrderedDict(
        (key, hook) for key, hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")
    )
    twin._modules = {name: child and _without_hooks(child) for name, child in module._modules.items()}
    if hasattr(twin, "_output_capturing_hooks_installed"):
        twin._output_capturing_hooks_installed = False
    return twin


_PREPARED: set[type] = set()


def _prepare(body: nn.Module) -> None:
    """transformers notes what its hooks gather when a model of a class is built: do so where none has been yet."""
    if type(body) not in _PREPARED:
        with torch.device("meta"):
            AutoBackbone.from_config(copy.deepcopy(body.config))
        _PREPARED.add(type(body))


def _blocks(body: nn.Module) -> nn.ModuleList:
    """The stages or, of a plain transformer, the blocks."""
    names = ("stages", "layers", "layer")
    lists = (m for name, m in body.named_modules() if name.rpartition(".")[2] in names)
    return next(m for m in lists if isinstance(m, nn.ModuleList))
