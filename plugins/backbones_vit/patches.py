"""From images to patches: a projection, or a few convolutions."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import InputError

ConvStem = Sequence[int | tuple[int, int]]


class PatchEmbed(nn.Module):
    """Images (B, C, H, W) to patches (B, H / stride, W / stride, dim).

    Args:
        in_chans: C.
        dim: width.
        patch_size: side of a patch, in pixels.
        stride: pixels from patch to patch; below `patch_size`, patches overlap, each about the middle of its cell.
        conv_stem: see `VisionTransformer`.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int, conv_stem: ConvStem | None):
        super().__init__()
        self.convs = nn.Sequential()
        self.overlap = 0
        if not conv_stem:
            self.overlap = patch_size - stride
            self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)
            return
        steps = [step if isinstance(step, Sequence) else (step, 2) for step in conv_stem]
        if math.prod(stride for _, stride in steps) != patch_size:
            raise InputError(f"conv_stem={conv_stem}: strides must multiply to patch_size={patch_size}")
        left, dilation = stride, 1  # what strides are still to do, and how much closer cells lie than published
        for width, step in steps:
            kept = math.gcd(step, left)
            left //= kept
            conv = nn.Conv2d(in_chans, width, 3, kept, dilation, dilation, bias=False)
            self.convs.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            dilation *= step // kept
            in_chans = width
        self.proj = nn.Conv2d(in_chans, dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        if self.overlap:
            before, after = self.overlap // 2, self.overlap - self.overlap // 2
            images = F.pad(images, (before, after, before, after))
        return self.proj(self.convs(images)).permute(0, 2, 3, 1)
