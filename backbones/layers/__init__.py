"""The toolkit for plugin authors: what more than one architecture needs."""

from .activation import activate, may_overwrite
from .attention import Attention, SpatialReductionAttention, attend, scaled_attention
from .blocks import Blocks, residual, run_blocks
from .cache import TableCache
from .checkpointing import checkpoint, has_statistics, hold_statistics, release_statistics
from .conv import ConvNorm, init_conv, pad_same
from .dropout import DROPOUTS, Dropout, set_dropouts
from .fast import FastConv, FastLinear, fuse, is_plain
from .head import POOLS, PreLogits, over_channels, pool, pool_tokens
from .hooks import hooks_kept
from .inference import Layer, fold_norm, fold_norm_before, fold_sequence, scale_outputs
from .linear import Mlp, init_linear
from .mbconv import MBConv, SqueezeExcite, halve
from .norm import layer_norm_2d
from .padding import ceil_div, crop_to, pad_to_multiple
from .patches import PatchEmbed, pad_for_patches
from .positions import Resampling
from .relative_position import DistanceBias, LogPositionBias, PositionBias, RelativePositionBias
from .window import window_partition, window_unpartition

__all__ = [
    "DROPOUTS",
    "POOLS",
    "Attention",
    "Blocks",
    "ConvNorm",
    "DistanceBias",
    "Dropout",
    "FastConv",
    "FastLinear",
    "Layer",
    "LogPositionBias",
    "MBConv",
    "Mlp",
    "PatchEmbed",
    "PositionBias",
    "PreLogits",
    "RelativePositionBias",
    "Resampling",
    "SpatialReductionAttention",
    "SqueezeExcite",
    "TableCache",
    "activate",
    "attend",
    "ceil_div",
    "checkpoint",
    "crop_to",
    "fold_norm",
    "fold_norm_before",
    "fold_sequence",
    "fuse",
    "halve",
    "has_statistics",
    "hold_statistics",
    "hooks_kept",
    "init_conv",
    "init_linear",
    "is_plain",
    "layer_norm_2d",
    "may_overwrite",
    "over_channels",
    "pad_for_patches",
    "pad_same",
    "pad_to_multiple",
    "pool",
    "pool_tokens",
    "release_statistics",
    "residual",
    "run_blocks",
    "scale_outputs",
    "scaled_attention",
    "set_dropouts",
    "window_partition",
    "window_unpartition",
]
