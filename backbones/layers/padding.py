"""Padding to a multiple and cropping back: how fixed strides meet any image size."""

import torch
import torch.nn.functional as F
from torch import Tensor

# torch 2.6 has only the wider question.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def ceil_div(side: int, stride: int) -> int:
    """`ceil(side / stride)`, in the form that convolutions have, so that symbolic sizes compare as equal."""
    return (side - 1) // stride + 1


def pad_to_multiple(x: Tensor, multiple: int, value: float = 0.0) -> Tensor:
    """Pads (B, C, H, W) with `value` at the right and bottom until `multiple` divides both sides."""
    if multiple == 1:
        return x
    bottom, right = (ceil_div(side, multiple) * multiple - side for side in x.shape[-2:])
    # While exporting with dynamic sides, asking whether there is anything to pad would fix the answer.
    if torch.compiler.is_compiling() or bottom or right:
        return F.pad(x, (0, right, 0, bottom), value=value)
    return x


def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """The top left (B, C, height, width) of a map that padding made larger."""
    if is_exporting():  # a slice would ask whether symbolic sides are large enough, which it cannot prove
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        return x.index_select(-2, rows).index_select(-1, columns)
    return x[..., :height, :width]
