"""ConvNeXt (Liu et al., https://arxiv.org/abs/2201.03545)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.layers import Blocks, Layer, Mlp, pad_to_multiple, residual
from backbones.weights import KeyLayout

TIMM = KeyLayout(
    "timm",
    (
        (r"^stem\.0\.", "stem.conv."),
        (r"^stem\.1\.", "stem.norm."),
        (r"\.downsample\.0\.", ".downsample.norm."),
        (r"\.downsample\.1\.", ".downsample.conv."),
        (r"^head\.norm\.", "pre_logits."),
        (r"^head\.fc\.", "head."),
    ),
)
TORCHVISION = KeyLayout(
    "torchvision",
    (
        (r"^features\.0\.0\.", "stem.conv."),
        (r"^features\.0\.1\.", "stem.norm."),
        *((rf"^features\.{2 * n}\.0\.", f"stages.{n}.downsample.norm.") for n in range(1, 4)),
        *((rf"^features\.{2 * n}\.1\.", f"stages.{n}.downsample.conv.") for n in range(1, 4)),
        *((rf"^features\.{2 * n + 1}\.(\d+)\.", rf"stages.{n}.blocks.\1.") for n in range(4)),
        (r"\.block\.0\.", ".conv_dw."),
        (r"\.block\.2\.", ".norm."),
        (r"\.block\.3\.", ".mlp.fc1."),
        (r"\.block\.5\.", ".mlp.fc2."),
        (r"\.layer_scale$", ".gamma"),
        (r"^classifier\.0\.", "pre_logits."),
        (r"^classifier\.2\.", "head."),
    ),
)
_OFFICIAL = (
    (r"^downsample_layers\.0\.0\.", "stem.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.norm."),
    (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.conv."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.(dwconv|depthwise_conv)\.", ".conv_dw."),
    (r"\.(pwconv|pointwise_conv)(\d)\.", r".mlp.fc\2."),
)
OFFICIAL = KeyLayout(
    "official",  # and OpenMMLab's, which spells the same words out
    (*_OFFICIAL, (r"^norm\.", "pre_logits."), (r"^norm(\d)\.", r"out_norms.\1.")),
)
OPENMMLAB_CLASSIFIER = KeyLayout(
    "OpenMMLab's classifier",
    ((r"^backbone\.", ""), *_OFFICIAL, (r"^norm3\.", "pre_logits."), (r"^head\.fc\.", "head.")),
)


# With a hidden layer, the norm before the classifier is a part among others.
_HIDDEN = ((r"^pre_logits\.(weight|bias)$", r"pre_logits.norm.\1"), (r"^head\.pre_logits\.", "pre_logits."))


class ConvNeXt(Backbone):
    """Four stages of depth-wise 7 x 7 convolutions and channel MLPs at strides 4, 8, 16 and 32.

    With `output_stride` 8 or 16, later stages keep the resolution and dilate their convolutions instead.

    Args:
        dims: width of each stage.
        depths: blocks per stage.
        layer_scale: initial scale of each block's update; the official dense-prediction code starts at 1. None for
            none at all. timm calls it `ls_init_value`.
        head_hidden_size: width of a hidden layer of the classifier; None for no such layer.
        **options: those of `backbones.Backbone`.
    """

    key_layouts = (TIMM, TORCHVISION, OFFICIAL, OPENMMLAB_CLASSIFIER)
    output_strides = (8, 16, 32)
    remedies = ((r"\.gamma$", "layer scales", "build with layer_scale=1e-6"),)

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        layer_scale: float | None = 1e-6,
        head_hidden_size: int | None = None,
        **options: Any,
    ):
        super().__init__(channels=dims, strides=(4, 8, 16, 32), **options)
        self.hidden_features = head_hidden_size
        if head_hidden_size:
            self.new_parts = (*self.new_parts, "pre_logits.fc")
            self.key_layouts = tuple(KeyLayout(each.name, (*each.renames, *_HIDDEN)) for each in self.key_layouts)
        drop_path = self.drop_path_rates(depths)
        self.stem = Stem(self.in_chans, dims[0])
        self.stages = nn.ModuleList(
            self.wanted(
                Stage(
                    downsample=Downsample(dims[i - 1], dims[i], self.dilations[i]) if i else nn.Identity(),
                    blocks=[Block(dims[i], self.dilations[i], layer_scale, rate) for rate in drop_path[i]],
                )
                for i in range(4)
            )
        )
        self.apply(_init_weights)

    def make_pre_logits(self) -> nn.Module:
        norm = nn.LayerNorm(self.pooled_features, eps=1e-6)
        if not self.hidden_features:
            return norm
        fc = nn.Linear(self.pooled_features, self.hidden_features)
        return nn.Sequential(OrderedDict(norm=norm, fc=fc, act=nn.GELU()))

    def adapt_table(self, name: str, value: Tensor, checkpoint: Mapping[str, Tensor]) -> Tensor:
        if name.endswith(".gamma"):  # torchvision's is (C, 1, 1)
            return value.flatten()
        return super().adapt_table(name, value, checkpoint)


class Stem(nn.Module):
    """Patches of 4 x 4 pixels: (B, C_in, H, W) -> (B, dim, H / 4, W / 4)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 4, 4)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(pad_to_multiple(x, 4)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """(B, C_in, H, W) -> (B, dim, H / stride, W / stride)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.downsample = downsample
        self.blocks = Blocks(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Norm and 2 x 2 convolution, of stride 2; or of stride 1 before a stage that is dilated instead."""

    def __init__(self, in_chans: int, dim: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_chans, eps=1e-6)
        self.stride = 1 if dilation > 1 else 2
        # The stage that first keeps the resolution meets a map that is dense still.
        self.reach = max(1, dilation // 2)
        self.conv = nn.Conv2d(in_chans, dim, 2, stride=self.stride, dilation=self.reach)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.stride == 2:
            return self.conv(pad_to_multiple(x, 2))
        before, after = self.reach // 2, self.reach - self.reach // 2
        return self.conv(F.pad(x, (before, after, before, after)))


class Block(Layer):
    """Depth-wise convolution, norm, MLP and layer scale in one residual, on maps (B, H, W, C)."""

    def __init__(self, dim: int, dilation: int, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3 * dilation, dilation=dilation, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        update = self.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return residual(x, self.drop_path(self.mlp(self.norm(update))), self.gamma, spare=self.fast)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
