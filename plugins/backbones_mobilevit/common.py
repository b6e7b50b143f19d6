"""What MobileViT and MobileViTv2 share: the MobileNetV2 trunk that their transformers sit in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, make_divisible
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import Blocks, ConvNorm, Layer, ceil_div, init_conv, init_linear, residual
from backbones.layers.padding import is_exporting
from backbones.weights import KeyLayout

TIMM = KeyLayout(
    "timm",
    (
        (r"^stem\.", "stem.0."),
        (r"^stages\.0\.0\.", "stem.1."),  # the block at stride 2
        *((rf"^stages\.{i + 1}\.", f"stages.{i}.") for i in range(4)),
        (r"^final_conv\.", "norm."),
        (r"^head\.fc\.", "head."),
        (r"\.bn\.", ".norm."),
        (r"\.conv1_1x1\.", ".expand."),
        (r"\.conv2_kxk\.", ".depthwise."),
        (r"\.(conv3_1x1|conv_proj)\.", ".project."),
        (r"\.conv_kxk\.", ".local."),
        (r"\.conv_1x1\.", ".embed."),
        (r"\.conv_fusion\.", ".fuse."),
    ),
)


class MobileTrunk(Backbone):
    """Inverted residuals, and from stride 8 on one block with transformers at the end of each stage.

    Args:
        block: makes that block, given the stage's number from 0, its width, its number of transformers, their drop
            path rate, and what its convolution dilates by.
        stem_dims: widths of the first convolution and of the inverted residual after it, both at stride 2.
        dims: width of each stage.
        local_depth: inverted residuals of the first stage; the others have one.
        depths: transformers in each of the last three stages.
        expand_ratio: width inside an inverted residual over its input's.
        **options: those of `backbones.Backbone`.
    """

    key_layouts = (TIMM,)
    output_strides = (8, 16, 32)

    def __init__(
        self,
        block: Callable[[int, int, int, float, int], nn.Module],
        stem_dims: tuple[int, int],
        dims: Sequence[int],
        local_depth: int,
        depths: Sequence[int],
        expand_ratio: float,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        (stem_rate,), *rates = self.drop_path_rates((1, local_depth, 2, 2, 2))

        def inverted_residual(in_chans: int, out_chans: int, stride: int, rate: float, dilation: int = 1) -> nn.Module:
            return InvertedResidual(in_chans, out_chans, stride, expand_ratio, rate, dilation)

        def stage(i: int) -> nn.Module:
            dilation = self.dilations[i]
            stride, reach = (1, dilation // 2) if dilation > 1 else (2, 1)
            blocks = [inverted_residual(dims[i - 1] if i else stem_dims[1], dims[i], stride, rates[i][0], reach)]
            if i == 0:
                blocks += [inverted_residual(dims[0], dims[0], 1, rate) for rate in rates[0][1:]]
            else:
                blocks.append(block(i - 1, dims[i], depths[i - 1], rates[i][1], dilation))
            return Blocks(*blocks)

        self.stem = nn.Sequential(
            ConvNorm(self.in_chans, stem_dims[0], stride=2, act="silu"),
            inverted_residual(*stem_dims, 1, stem_rate),
        )
        self.stages = nn.ModuleList(self.wanted(map(stage, range(4))))
        self.apply(_init_weights)

    def group_matcher(self, coarse: bool = False) -> Mapping[str, Any]:
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.(\d+)\.transformer\.(\d+)", None),
                (r"^stages\.(\d+)\.(\d+)\.(?:norm|project|fuse)\.", (99999,)),
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }


class InvertedResidual(Layer):
    """1x1, depth-wise 3x3, 1x1 without an activation; a residual where the shape stays (MobileNetV2)."""

    def __init__(
        self, in_chans: int, out_chans: int, stride: int, expand_ratio: float, drop_path: float, dilation: int
    ):
        super().__init__()
        hidden = make_divisible(in_chans * expand_ratio)
        self.expand = ConvNorm(in_chans, hidden, kernel=1, act="silu")
        self.depthwise = ConvNorm(hidden, hidden, stride=stride, groups=hidden, act="silu", dilation=dilation)
        self.project = ConvNorm(hidden, out_chans, kernel=1)
        self.drop_path = DropPath(drop_path)
        self.has_residual = stride == 1 and in_chans == out_chans

    def forward(self, x: Tensor) -> Tensor:
        update = self.project(self.depthwise(self.expand(x)))
        # Where there is no residual to fall back on, a dropped path would leave nothing of the image.
        return residual(x, self.drop_path(update), spare=self.fast) if self.has_residual else update


def resize(x: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), bilinearly."""
    # While exporting with dynamic sides the question would fix the answer; to its own size, a map stays as it is.
    if is_exporting() or x.shape[-2:] != (height, width):
        return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=align_corners)
    return x


def to_patches(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) of sides that `size` divides -> (B, H / size, size, W / size, size, C), without a copy."""
    if is_exporting():  # the other way asks whether a quotient divides a side, which it cannot prove
        return x.unfold(1, size, size).unfold(2, size, size).permute(0, 1, 4, 2, 5, 3)
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size))


def from_patches(x: Tensor) -> Tensor:
    """(B, H / size, size, W / size, size, C) -> (B, H, W, C)."""
    return x.flatten(3, 4).flatten(1, 2)


def covered(side: int, size: int) -> int:
    """The side of a map that patches of `size` x `size` cover."""
    return size * ceil_div(side, size)


def check_patch_size(patch_size: int) -> None:
    if not isinstance(patch_size, int) or patch_size < 1:
        raise InputError(f"patch_size={patch_size!r} must be a positive number of cells")


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    init_conv(module)
