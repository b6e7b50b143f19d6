"""Images as weights want them."""

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Images in [0, 1] to what a backbone's weights were trained on.

    Args:
        backbone: its `pretrained_cfg` has mean and std per channel.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        for name in ("mean", "std"):
            value = torch.tensor(backbone.pretrained_cfg[name]).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).to(self.mean.dtype)  # as the weights, bf16-true among them
