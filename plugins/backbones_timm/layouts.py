"""How released checkpoints name the parameters of timm's models."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import timm
from torch import Tensor, nn

from backbones.weights import KeyLayout

TIMM = KeyLayout("timm", ((r"^", "model."),))


#: What timm's modules call the functions that convert official releases.
_FILTERS = r"(checkpoint|pretrained|)_filter_(fn\w*|torchvision\w*)"


@dataclass(frozen=True)
class Filtered:
    """timm's own conversion of the official release, which knows the model and may resize its tables."""

    name: str
    model: nn.Module
    function: Callable[..., Mapping[str, Any]]

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same weights under our names; nothing where the conversion cannot make sense of them."""
        arguments = (dict(state), self.model)[: len(_required(self.function))]
        try:
            converted = self.function(*arguments)
        except Exception:  # it is offered every checkpoint, and what it raises for a strange one is its own affair
            return {}
        return {f"model.{key}": value for key, value in converted.items() if isinstance(value, Tensor)}


def key_layouts(model: nn.Module, model_name: str) -> tuple[KeyLayout | Filtered, ...]:
    """Layouts of checkpoints for a model: timm's, what timm converts, and others."""
    module = import_module(timm.model_entrypoint(model_name).__module__)
    functions = [f for name, f in vars(module).items() if re.fullmatch(_FILTERS, name) and callable(f)]
    layouts = [Filtered("timm's conversion", model, function) for function in functions]
    if hasattr(model, "conv_stem") and hasattr(model, "blocks"):
        layouts.append(efficientnet_pytorch(model))
    return (*layouts, TIMM, features_only(model))


def features_only(model: nn.Module) -> KeyLayout:
    """timm's models with `features_only=True`, where the two outer levels of modules are one."""
    outer = dict.fromkeys(tuple(name.split(".")[:2]) for name in model.state_dict() if name.count(".") > 1)
    renames = [(rf"^{re.escape(a)}_{re.escape(b)}\.", f"model.{a}.{b}.") for a, b in outer]
    return KeyLayout("timm features_only", ((r"^(model|body)\.", ""), *renames, (r"^(?!model\.)", "model.")))


def efficientnet_pytorch(model: nn.Module) -> KeyLayout:
    """EfficientNet and its Lite variants as in https://github.com/lukemelas/EfficientNet-PyTorch.

    Blocks are counted through all stages there, and the first norm of a block is that of its expansion.
    """
    renames = [
        (r"^_conv_stem\.", "model.conv_stem."),
        (r"^_bn0\.", "model.bn1."),
        (r"^_conv_head\.", "model.conv_head."),
        (r"^_bn1\.", "model.bn2."),
        (r"^_fc\.", "model.classifier."),
        (r"\._se_(reduce|expand)\.", r".se.conv_\1."),
    ]
    count = 0
    for i, stage in enumerate(model.blocks):
        for j, block in enumerate(stage):
            expands = hasattr(block, "conv_pwl")
            parts = {"_depthwise_conv": "conv_dw", "_bn1": "bn2" if expands else "bn1"}
            parts |= {"_expand_conv": "conv_pw", "_bn0": "bn1"} if expands else {}
            parts |= {"_project_conv": "conv_pwl" if expands else "conv_pw", "_bn2": "bn3" if expands else "bn2"}
            renames += [
                (rf"^_blocks\.{count}\.{re.escape(theirs)}\.", f"model.blocks.{i}.{j}.{ours}.")
                for theirs, ours in parts.items()
            ]
            renames.append((rf"^_blocks\.{count}\.", f"model.blocks.{i}.{j}."))
            count += 1
    return KeyLayout("EfficientNet-PyTorch", tuple(renames))


def _required(function: Callable[..., Any]) -> list[Parameter]:
    return [p for p in signature(function).parameters.values() if p.default is Parameter.empty]
