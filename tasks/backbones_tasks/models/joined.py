"""RF-DETR on any pyramid: its head takes one map, and its class of backbone is fixed, but the attribute is not."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel

from .transformers import DenseBackbone, DenseBackboneConfig

STRIDE = 16  # of the one map, as in the papers' plain transformers


class JoinedMaps(nn.Module):
    """A backbone whose maps are brought to one size and joined: `feature_maps` is a tuple of one (B, C, h, w).

    Args:
        dense: the backbone.
        at: which map the others are resized to.
    """

    def __init__(self, dense: DenseBackbone, at: int):
        super().__init__()
        self.dense, self.at = dense, at

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        maps = self.dense(pixel_values).feature_maps
        size = maps[self.at].shape[-2:]
        same = [m if m.shape[-2:] == size else _resize(m, size) for m in maps]
        return BackboneOutput(feature_maps=(torch.cat(same, 1),))


def _resize(m: Tensor, size: torch.Size) -> Tensor:
    """Without aliasing, which PyTorch does in no half precision."""
    return F.interpolate(m.float(), size, mode="bilinear", antialias=True).to(m.dtype)


def join_maps(model: PreTrainedModel, config: DenseBackboneConfig) -> None:
    """Puts a backbone into RF-DETR, with a projection of all its maps at the stride nearest to 16."""
    dense = DenseBackbone(config)
    channels, strides = dense.channels, dense.backbone.feature_info.reduction()
    encoder = model.model.backbone
    at = min(range(len(strides)), key=lambda i: abs(strides[i] - STRIDE))
    encoder.backbone = JoinedMaps(dense, at)
    told = copy.copy(model.config)
    told.backbone_config = copy.copy(told.backbone_config)
    told.backbone_config.hidden_size = sum(channels)
    encoder.projector = type(encoder.projector)(told)
    model.initialize_weights()  # what is initialised stays as it is
    model.config.backbone_config = config
