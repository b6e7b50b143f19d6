"""How much a model computes."""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def gmacs(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds, in billions, of convolutions and matrix products in a forward pass, attention included."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops() / 2e9
