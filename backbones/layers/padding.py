"""Padding to a multiple and cropping back: how fixed strides meet any image size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pads (B, C, H, W) at the right and bottom until `multiple` divides both sides."""
    if multiple == 1:
        return x
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    # While exporting with dynamic sides, asking whether there is anything to pad would fix the answer.
    if torch.compiler.is_compiling() or bottom or right:
        return F.pad(x, (0, right, 0, bottom))
    return x


def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """The top left (B, C, height, width) of a map that padding made larger."""
    return x[..., :height, :width]
