"""Norms over the channels of maps."""

from timm.layers import LayerNorm2d


def layer_norm_2d(channels: int, eps: float = 1e-6) -> LayerNorm2d:
    """LayerNorm over the channels of each cell of (B, C, H, W); no copy where the map is channels-last."""
    return LayerNorm2d(channels, eps=eps)
