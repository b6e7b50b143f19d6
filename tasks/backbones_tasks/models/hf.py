"""Models of transformers on any backbone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from backbones.errors import InputError, MissingDependency

from ..options import nearest
from .heads import HEADS, check_strides
from .joined import join_maps
from .transformers import DenseBackbone, given


def known_options(architecture: str) -> set[str]:
    """Names of the options that transformers has for a head, but for what the backbone decides."""
    config_class = _model_class(architecture).config_class
    with _quiet():
        common, all_options = PreTrainedConfig().to_dict(), config_class().to_dict()
    decided = {"backbone_config", "num_channels", "dilation", "freeze_backbone_batch_norms", "use_auxiliary_head"}
    return all_options.keys() - common.keys() - decided


def check_options(architecture: str, options: Mapping[str, Any]) -> None:
    """Raise InputError, with the nearest name, for options that transformers has not for this head."""
    known = known_options(architecture)
    for option in options:
        if option not in known:
            raise InputError(f"{architecture} has no option {option!r}; {nearest(option, sorted(known))}")


def build_head(
    architecture: str,
    backbone: nn.Module,
    num_labels: int,
    options: Mapping[str, Any],
    batch_norm: Literal["train", "frozen"] = "train",
    **more: Any,
) -> PreTrainedModel:
    """A model of transformers on a backbone.

    Args:
        architecture: "hf/NAME".
        backbone: module from images to a list of maps, with timm's `feature_info`.
        num_labels: of objects, or of masks; "nothing" is none of them.
        options: of the model's configuration, by transformers' names.
        batch_norm: what becomes of the backbone's, whatever transformers does to them.
        **more: options that `check_options` does not know.

    Raises:
        InputError: an unknown or a wrong option, or a backbone whose maps do not fit.
        MissingDependency: transformers is too old for this head.
    """
    head, model_class = HEADS[architecture], _model_class(architecture)
    check_options(architecture, options)
    channels, strides = list(backbone.feature_info.channels()), list(backbone.feature_info.reduction())
    check_strides(architecture, strides)
    with _quiet(), given(backbone, batch_norm=batch_norm) as config:
        told = {"backbone_config": config, **head.defaults, **head.maps(channels, strides, dict(options)), **more}
        try:
            settings = model_class.config_class(num_labels=num_labels, **{**told, **options})
            model = model_class(settings)
        except (StrictDataclassError, TypeError, ValueError, LookupError, AssertionError) as error:
            raise InputError(f"{architecture} with {dict(options)}: {type(error).__name__}: {error}") from error
        if head.joined:
            join_maps(model, config)
    _look_up_listed(model)
    return model


class Listed(Sequence[nn.Module]):
    """Parts of a module in an order of their own, looked up whenever they are called: they may have been replaced.

    Args:
        owner: the module.
        names: what its parts are called.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str]):
        self.owner, self.names = owner, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.owner.get_submodule(name) for name in self.names[index]]
        return self.owner.get_submodule(self.names[index])


def _look_up_listed(model: nn.Module) -> None:
    """Turns transformers' plain lists of submodules, which adapters, quantisation and copies pass by, into `Listed`."""
    for module in model.modules():
        names = {part: name for name, part in module.named_children()}
        for attribute, value in list(vars(module).items()):
            if isinstance(value, list) and value and all(isinstance(p, nn.Module) and p in names for p in value):
                setattr(module, attribute, Listed(module, [names[part] for part in value]))


def backbone_path(model: nn.Module) -> str:
    """Where in a model of transformers the backbone is."""
    return next(f"{name}.backbone" for name, module in model.named_modules() if isinstance(module, DenseBackbone))


def _model_class(architecture: str) -> type[PreTrainedModel]:
    name = HEADS[architecture].model
    try:
        found: type[PreTrainedModel] = getattr(transformers, name)
    except AttributeError as error:
        raise MissingDependency(
            f"{architecture} needs a transformers that has {name}, and {transformers.__version__} has not; run `pip "
            "install -U 'dense-backbones[transformers]'`"
        ) from error
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks about what it would have built of its own accord."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
