"""Backbones inside models of transformers: import this module, and transformers knows the type `dense_backbone`.

    import backbones_tasks.transformers
    config = Mask2FormerConfig(backbone_config=DenseBackboneConfig(name="pvt_v2_b2", pretrained=True), num_labels=21)
    model = Mask2FormerForUniversalSegmentation(config)

NAME is whatever `build_backbone` takes. It works in every class of transformers that has a `backbone_config`, but for
RF-DETR, whose class of backbone is fixed; `build_detector("hf/rf_detr")` has a way around that.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, Mask2FormerConfig, MaskFormerConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel

from backbones import LoadReport, backbone_info, build_backbone

MODEL_TYPE = "dense_backbone"

_given: ContextVar[nn.Module | None] = ContextVar("given", default=None)


class DenseBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """What `AutoBackbone` builds a `DenseBackbone` from.

    Args:
        name: whatever `build_backbone` takes.
        options: those of `build_backbone`, such as `drop_path_rate`, `frozen_stages` or `in_chans`.
        pretrained: True, a tag of `backbones info NAME`, or the path of a checkpoint. Loaded when a model is made of
            the configuration, and not when `from_pretrained` finds the backbone's weights in the model's own.
        batch_norm: "train" or "frozen", whatever the model around it does; unless given, it is frozen where that model
            freezes its backbone's batch norms, as DETR does.
        out_indices: which maps: 0 to 3 are strides 4 to 32. All of them unless given.
        out_features: the same by name: "stage1" is stride 4.
        num_maps: how many maps the backbone has; of `name` unless given.
        **others: those of every configuration of transformers.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(
        self,
        name: str = "",
        options: Mapping[str, Any] | None = None,
        pretrained: bool | str = False,
        batch_norm: Literal["train", "frozen"] | None = None,
        out_indices: Sequence[int] | None = None,
        out_features: Sequence[str] | None = None,
        num_maps: int | None = None,
        **others: Any,
    ):
        others.pop("stage_names", None)  # of a saved one
        super().__init__(**others)
        self.name, self.options, self.pretrained = name, dict(options or {}), pretrained
        self.batch_norm = batch_norm
        self.num_maps = num_maps or (len(backbone_info(name).strides) if name else 0)
        self.stage_names = [f"stage{i + 1}" for i in range(self.num_maps)]
        if out_indices is None and out_features is None:
            out_indices = range(self.num_maps)
        self.set_output_features_output_indices(
            None if out_features is None else list(out_features), None if out_indices is None else list(out_indices)
        )


class DenseBackbone(BackboneMixin, PreTrainedModel):
    """A backbone as transformers' models have theirs; see `DenseBackboneConfig`.

    Called with images (B, C, H, W) of any size, it returns `feature_maps`, one per index in `out_indices`, and, where
    they are asked for, the same as `hidden_states`.
    """

    config_class = DenseBackboneConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    has_attentions = False
    _no_split_modules: list[str] = []  # noqa: RUF012  (transformers')
    _norms: Mapping[str, list[nn.Module]] = {}
    _values: Mapping[str, Tensor] = {}

    def __init__(self, config: DenseBackboneConfig):
        super().__init__(config)
        backbone = _given.get() or _build(config, False if _loading() else config.pretrained)
        self.backbone = freeze_batch_norm_2d(backbone) if config.batch_norm == "frozen" else backbone
        self.num_features = [level["num_chs"] for level in backbone.feature_info.info]
        self.post_init()
        # what was there before the model around it froze norms, or `from_pretrained` emptied tensors; no submodules
        self._norms = {n: [m] for n, m in self.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
        self._values = _tensors(self.backbone) if _loading() else {}

    @property
    def load_report(self) -> LoadReport | None:
        """What became of the weights that the backbone was built with, if there were any."""
        report: LoadReport | None = getattr(self.backbone, "load_report", None)
        return report

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed; what `gradient_checkpointing_enable` of any model around it sets."""
        return getattr(self.backbone, "checkpointing", False)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """`feature_maps`, a tuple of (B, C, h, w), of images (B, C, H, W)."""
        maps = tuple(self.backbone(pixel_values))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = BackboneOutput(feature_maps=maps, hidden_states=maps if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Keeps the weights as the backbone has them: transformers would draw them as it draws those of its own.

        It comes here once the model around the backbone is complete, and again when that has loaded its weights.
        """
        if module is self:
            self._settle_norms()
            if not _loading():
                self._restore()

    def _settle_norms(self) -> None:
        """Freezes batch norms where the model around wants it so, but with the activation and epsilon that they have.

        DETR and its descendants replace whatever is a BatchNorm2d by a layer of epsilon 1e-5 and no activation.
        """
        for name, (norm,) in self._norms.items():
            if type(self.backbone.get_submodule(name)).__module__.startswith("transformers."):  # each has its own
                kept = norm if self.config.batch_norm == "train" else freeze_batch_norm_2d(norm)
                self.backbone.set_submodule(name, kept)
        self._norms = {}

    def _restore(self) -> None:
        """Gives back what `from_pretrained` has emptied: tables of sizes, and all that the checkpoint had not."""
        if not self._values:
            return
        values, own = self._values, _tensors(self.backbone)
        state = self.backbone.state_dict().keys()
        lost = {n for n, value in own.items() if not getattr(value, "_is_hf_initialized", False)}
        if lost & state and self.config.pretrained:
            values = _tensors(_build(self.config, self.config.pretrained))
        with torch.no_grad():
            for name in lost & values.keys():
                own[name].copy_(values[name])
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self._values[name].requires_grad)  # of `frozen_stages`
        self._values = {}


@contextmanager
def given(backbone: nn.Module, **options: Any) -> Iterator[DenseBackboneConfig]:
    """The configuration of a module that is there already, which a model that is built meanwhile takes as it is.

    Args:
        backbone: module from images to a list of maps, with timm's `feature_info`.
        options: `batch_norm` of the configuration.
    """
    info = backbone.feature_info
    config = DenseBackboneConfig(
        name=getattr(backbone, "canonical_name", ""),
        options=getattr(backbone, "build_options", {}),
        out_indices=info.out_indices,
        num_maps=len(info.info),
        **options,
    )
    token = _given.set(backbone)
    try:
        yield config
    finally:
        _given.reset(token)


def _build(config: DenseBackboneConfig, pretrained: bool | str) -> nn.Module:
    with torch.device("cpu"):  # `from_pretrained` builds models of tensors without values, which tables would be, too
        options = {**config.options, "out_indices": tuple(config.out_indices), "pretrained": pretrained}
        return build_backbone(config.name, **options)


def _loading() -> bool:
    """Whether `from_pretrained` is building a model whose values come later."""
    return torch.empty(0).is_meta


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _from_pretrained(source: str | os.PathLike[str], *arguments: Any, **options: Any) -> nn.Module:
    """transformers' `AutoBackbone.from_pretrained`, which asks the hub about folders, too, and fails."""
    if not Path(source).is_dir():
        return _ask_hub(source, *arguments, **options)
    return super(AutoBackbone.__mro__[1], AutoBackbone).from_pretrained(source, *arguments, **options)


_ask_hub = AutoBackbone.from_pretrained
AutoBackbone.from_pretrained = staticmethod(_from_pretrained)
AutoConfig.register(MODEL_TYPE, DenseBackboneConfig, exist_ok=True)
AutoBackbone.register(DenseBackboneConfig, DenseBackbone, exist_ok=True)
for _config in (Mask2FormerConfig, MaskFormerConfig):  # else they warn that it may not work
    if MODEL_TYPE not in _config.backbones_supported:
        _config.backbones_supported.append(MODEL_TYPE)
