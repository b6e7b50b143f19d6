"""Hybrid ViT: a transformer over the last map of a ResNet, which also makes the fine levels of the pyramid.

Dosovitskiy et al., https://arxiv.org/abs/2010.11929; with 32 pixels per patch: Steiner et al.,
https://arxiv.org/abs/2106.10270. The ResNet is that of Big Transfer (Kolesnikov et al.,
https://arxiv.org/abs/1912.11370), with activations after the convolutions: standardised weights (Qiao et al.,
https://arxiv.org/abs/1903.10520), GroupNorm, and TensorFlow's padding.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import InputError
from backbones.layers import Blocks, pad_same

from .vit import STRIDES, VisionTransformer


class HybridVisionTransformer(VisionTransformer):
    """A plain transformer over the last map of a ResNet.

    Args:
        dim: width of the transformer.
        depth: number of its blocks.
        heads: attention heads per block.
        cnn_depths: bottlenecks in each stage of the ResNet; three stages give patches of 16 pixels, four of 32.
        pyramid: "stages" (maps finer than the patches from the ResNet's stages, of widths 256, 512 and 1024, and
            the others from the transformer), or one of `VisionTransformer`'s, all from the transformer.
        **options: those of `VisionTransformer`, but for the patches.
    """

    pyramids = ("stages", *VisionTransformer.pyramids)

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        cnn_depths: Sequence[int] = (3, 4, 9),
        pyramid: str = "stages",
        **options: Any,
    ):
        if not 1 <= len(cnn_depths) <= 4 or min(cnn_depths) < 1:
            raise InputError(f"cnn_depths={tuple(cnn_depths)} must be one to four positive numbers of bottlenecks")
        if options.get("embed_layer") is not None:
            raise InputError("a hybrid's patches come from its ResNet; leave embed_layer out")
        self.cnn_depths = tuple(cnn_depths)  # before anything is built, because `make_patch_embed` reads it
        patch_size = STRIDES[len(cnn_depths) - 1]
        super().__init__(dim, depth, heads, patch_size, conv_stem=None, pyramid=pyramid, **options)
        if pyramid in ("stages", "plain") or not self.features_only:
            self.size_divisor = 1  # the ResNet pads for itself; only up-sampling a map needs all of its last cells

    def forward_features(self, images: Tensor) -> dict[int, Tensor] | Tensor:
        """Maps by index; of a classifier, the normed tokens (B, prefix tokens + patches, dim)."""
        stages, patches = self.patch_embed(self.pad(images))
        if not self.features_only:
            return self.forward_patches(patches)
        maps = {i: stages[i] for i in self.out_indices if not self.taps[i]}
        if self.blocks:
            maps |= self.forward_patches(patches)
        return maps

    def embed_patches(self, images: Tensor) -> Tensor:
        return self.patch_embed(images)[1]

    def levels(
        self, pyramid: str, dim: int, patch_stride: int, output_stride: int, depth: int, taps: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        if pyramid != "stages":
            return super().levels(pyramid, dim, patch_stride, output_stride, depth, taps)
        fine = [i + 1 < len(self.cnn_depths) for i in range(len(STRIDES))]
        channels = tuple(64 * stride if is_fine else dim for stride, is_fine in zip(STRIDES, fine, strict=True))
        return channels, STRIDES, tuple(0 if is_fine else depth for is_fine in fine)

    def make_patch_embed(self, dim: int, patch_size: int, conv_stem: None) -> nn.Module:
        last = self.out_indices[-1]
        dilations = [max(1, stride // self.output_stride) for stride in STRIDES]  # of all stages, whatever is asked for
        if self.features_only and not self.taps[last]:
            return HybridEmbed(self.in_chans, self.cnn_depths[: last + 1], dilations)
        return HybridEmbed(self.in_chans, self.cnn_depths, dilations, dim)

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        return {
            "stem": r"^patch_embed\.backbone\.stem",
            "stages": r"^patch_embed\.backbone\.stages\.(\d+)" + ("" if coarse else r"\.blocks\.(\d+)"),
            "embed": r"^cls_token|dist_token|reg_token|pos_embed|patch_embed\.proj",
            "blocks": super().group_matcher(coarse)["blocks"],
        }

    def freezable(self) -> list[list[nn.Module | nn.Parameter]]:
        """The ResNet's stem, its first three stages, and all that follows."""
        cnn, proj = self.patch_embed.backbone, self.patch_embed.proj
        tokens = [getattr(self, name) for name in ("pos_embed", *self.prefix) if self.blocks]
        rest = [*cnn.stages[3:], *([proj] if proj is not None else []), *tokens, *self.blocks]
        return [[cnn.stem], *(list(cnn.stages[i : i + 1]) for i in range(3)), rest]


class HybridEmbed(nn.Module):
    """A ResNet and the projection of its last map to the width of a transformer, unless `dim` is None."""

    def __init__(self, in_chans: int, depths: Sequence[int], dilations: Sequence[int], dim: int | None = None):
        super().__init__()
        self.backbone = ResNet(in_chans, depths, dilations)
        self.proj = nn.Conv2d(64 * STRIDES[len(depths) - 1], dim, 1) if dim else None

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The ResNet's maps, and its last one as patches (B, h, w, dim)."""
        maps = self.backbone(images)
        return maps, None if self.proj is None else self.proj(maps[-1]).permute(0, 2, 3, 1)


class ResNet(nn.Module):
    """Images (B, in_chans, H, W) to a list of maps (B, 64 * s, ceil(H / s), ceil(W / s)) of strides s = 4, 8, ...

    Where a stage has a dilation above 1, its map and those that follow are as fine as the one before.
    """

    def __init__(self, in_chans: int, depths: Sequence[int], dilations: Sequence[int]):
        super().__init__()
        stem = OrderedDict(conv=StdConv(in_chans, 64, 7, 2), norm=GroupNorm(64, act=True), pool=MaxPool())
        self.stem = nn.Sequential(stem)
        self.stages = nn.ModuleList()
        width = 64
        for depth, stride, dilation in zip(depths, STRIDES, dilations, strict=False):
            out_width = 64 * stride
            step = 1 if stride == 4 or dilation > 1 else 2
            first = Bottleneck(width, out_width, step, max(1, dilation // 2), shortcut=True)
            rest = (Bottleneck(out_width, out_width, dilation=dilation) for _ in range(depth - 1))
            blocks = Blocks(first, *rest)
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
            width = out_width

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with their norms, beside a shortcut that has its own where the shape changes."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, dilation: int = 1, shortcut: bool = False):
        super().__init__()
        width = out_chans // 4
        self.conv1 = StdConv(in_chans, width, 1)
        self.norm1 = GroupNorm(width, act=True)
        self.conv2 = StdConv(width, width, 3, stride, dilation)
        self.norm2 = GroupNorm(width, act=True)
        self.conv3 = StdConv(width, out_chans, 1)
        self.norm3 = GroupNorm(out_chans)
        nn.init.constant_(self.norm3.weight, 0.1)  # near to the identity, which releases start from with 0
        self.downsample = None
        if shortcut:
            layers = OrderedDict(conv=StdConv(in_chans, out_chans, 1, stride), norm=GroupNorm(out_chans))
            self.downsample = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        x = self.norm3(self.conv3(x))
        return F.relu_(shortcut + x)


class StdConv(nn.Conv2d):
    """Convolution whose weight has mean 0 and variance 1 per output channel, padded as TensorFlow's SAME."""

    eps = 1e-8
    #: Whether the weight is standardised already, because it does not change any more.
    standardised = False

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int = 1, dilation: int = 1):
        padding = kernel // 2 * dilation if stride == 1 else 0
        super().__init__(in_chans, out_chans, kernel, stride, padding, dilation, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1 and kernel > 1:
            x = pad_same(x, kernel, stride)
        weight = self.weight if self.standardised else self.standardise()
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)

    def standardise(self) -> Tensor:
        """The weight that it runs with."""
        rows = self.weight.flatten(1)
        return F.layer_norm(rows, rows.shape[1:], eps=self.eps).view(self.weight.shape)

    def prepare_for_inference(self) -> nn.Module:
        self.weight = nn.Parameter(self.standardise(), requires_grad=False)
        self.standardised = True
        return self


class GroupNorm(nn.GroupNorm):
    """GroupNorm of 32 groups, with a ReLU if `act`."""

    def __init__(self, channels: int, act: bool = False):
        super().__init__(32, channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.relu_(x) if self.act else x


class MaxPool(nn.Module):
    """3x3 max-pooling of stride 2 of maps that are nowhere negative, padded as TensorFlow's SAME."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return F.max_pool2d(pad_same(x, 3, 2), 3, 2)
        # An even side lacks its last cell alone, which ceil_mode allows for without a copy.
        return F.max_pool2d(x, 3, 2, padding=[side % 2 for side in x.shape[-2:]], ceil_mode=True)
