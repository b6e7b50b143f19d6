"""The toolkit for plugin authors: what more than one architecture needs."""

from .activation import activate, gelu, may_overwrite
from .attention import Attention, SpatialReductionAttention, attend
from .blocks import Blocks, residual, run_blocks
from .cache import TableCache
from .conv import ConvNorm, conv2d, fold_norm, fold_norm_before, init_conv, norm_affine, pad_same
from .head import PreLogits
from .linear import Linear, Mlp, init_linear, linear
from .mbconv import MBConv, SqueezeExcite, halve
from .norm import layer_norm_2d
from .padding import ceil_div, crop_to, pad_to_multiple
from .relative_position import DistanceBias, LogPositionBias, RelativePositionBias
from .window import window_partition, window_unpartition

__all__ = [
    "Attention",
    "Blocks",
    "ConvNorm",
    "DistanceBias",
    "Linear",
    "LogPositionBias",
    "MBConv",
    "Mlp",
    "PreLogits",
    "RelativePositionBias",
    "SpatialReductionAttention",
    "SqueezeExcite",
    "TableCache",
    "activate",
    "attend",
    "ceil_div",
    "conv2d",
    "crop_to",
    "fold_norm",
    "fold_norm_before",
    "gelu",
    "halve",
    "init_conv",
    "init_linear",
    "layer_norm_2d",
    "linear",
    "may_overwrite",
    "norm_affine",
    "pad_same",
    "pad_to_multiple",
    "residual",
    "run_blocks",
    "window_partition",
    "window_unpartition",
]
