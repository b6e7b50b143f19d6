"""From images to patches: a projection, a few convolutions, or a layer of somebody else."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer, get_norm_layer
from torch import Tensor, nn

from backbones.errors import InputError

#: torchvision's `ConvStemConfig`, a dict of the same, a width, or (width, stride); one per convolution.
ConvStem = Sequence[int | tuple[int, int] | Mapping[str, Any] | tuple[Any, ...]]


@dataclass(frozen=True)
class StemConv:
    """One convolution of a stem, by the names of torchvision's `ConvStemConfig`.

    Args:
        out_channels: width.
        kernel_size: side of the kernel.
        stride: pixels per cell of the output.
        norm_layer, activation_layer: what makes them, or their names in timm; None for none.
    """

    out_channels: int
    kernel_size: int = 3
    stride: int = 2
    norm_layer: str | Callable[[int], nn.Module] | None = nn.BatchNorm2d
    activation_layer: str | Callable[[], nn.Module] | None = nn.ReLU

    @classmethod
    def of(cls, step: Any) -> "StemConv":
        """One of what `conv_stem` has."""
        if hasattr(step, "_asdict"):  # a named tuple, as torchvision's is
            step = step._asdict()
        elif isinstance(step, int):
            step = {"out_channels": step}
        elif isinstance(step, Sequence) and len(step) == 2:
            step = dict(zip(("out_channels", "stride"), step, strict=True))
        try:
            conv = cls(**step)
        except TypeError as error:
            fields = ", ".join(cls.__dataclass_fields__)
            raise InputError(f"conv_stem: {step!r} is no width, pair (width, stride) or dict of {fields}") from error
        for name in ("out_channels", "kernel_size", "stride"):
            value = getattr(conv, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"conv_stem: {name}={value!r} must be a positive integer")
        if conv.kernel_size % 2 == 0 and conv.stride == 1:
            raise InputError(
                f"conv_stem: kernel_size={conv.kernel_size} at stride 1 would shrink the map; use an odd one"
            )
        return conv

    def build(self, in_chans: int, stride: int, dilation: int) -> nn.Sequential:
        norm, act = self.norm_layer, self.activation_layer
        padding = (self.kernel_size - 1) // 2 * dilation
        conv = nn.Conv2d(
            in_chans, self.out_channels, self.kernel_size, stride, padding, dilation, bias=self.norm_layer is None
        )
        layers: list[nn.Module] = [conv]
        if norm is not None:
            layers.append((get_norm_layer(norm) if isinstance(norm, str) else norm)(self.out_channels))
        if act is not None:
            layers.append((get_act_layer(act) if isinstance(act, str) else act)())
        return nn.Sequential(*layers)


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
        steps = [StemConv.of(step) for step in conv_stem]
        if math.prod(step.stride for step in steps) != patch_size:
            raise InputError(f"conv_stem={conv_stem}: strides must multiply to patch_size={patch_size}")
        left, dilation = stride, 1  # what strides are still to do, and how much closer cells lie than published
        for step in steps:
            kept = math.gcd(step.stride, left)
            left //= kept
            self.convs.append(step.build(in_chans, kept, dilation))
            dilation *= step.stride // kept
            in_chans = step.out_channels
        self.proj = nn.Conv2d(in_chans, dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        if self.overlap:
            before, after = self.overlap // 2, self.overlap - self.overlap // 2
            images = F.pad(images, (before, after, before, after))
        return self.proj(self.convs(images)).permute(0, 2, 3, 1)


def foreign_embed(
    layer: Callable[..., nn.Module],
    img_size: tuple[int, int],
    patch_size: int,
    stride: int,
    in_chans: int,
    dim: int,
    conv_stem: ConvStem | None,
) -> nn.Module:
    """A patch embedding of somebody else, built as timm's ViT builds its own with `dynamic_img_size`.

    It is to return patches (B, H / patch_size, W / patch_size, dim), whatever the size.

    Raises:
        InputError: it cannot be built so, or returns something else.
    """
    if conv_stem or stride != patch_size:
        other = "conv_stem" if conv_stem else f"an output_stride under patch_size={patch_size}"
        raise InputError(f"embed_layer takes the place of the patch projection; leave out {other}")
    options = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "embed_dim": dim}
    options |= {"bias": True, "strict_img_size": False, "output_fmt": "NHWC"}
    try:
        embed = layer(**options)
    except TypeError as error:
        raise InputError(f"embed_layer={layer!r} is called as timm's, with {', '.join(options)}: {error}") from error
    training = embed.training
    with torch.no_grad():
        shape = tuple(embed.eval()(torch.zeros(1, in_chans, 2 * patch_size, 3 * patch_size)).shape)
    embed.train(training)
    if shape != (1, 2, 3, dim):
        raise InputError(
            f"embed_layer={layer!r} turns an image of 2 x 3 patches into {shape}; it is to return (B, height, width, "
            f"{dim})"
        )
    return embed
