"""torchvision's classification models, cut into a stem and four stages."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from timm.layers import DropPath, select_adaptive_pool2d
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Permute, StochasticDepth

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.layers import POOLS, Blocks, fold_norm, over_channels
from backbones.weights import KeyLayout

from .dilation import Pad, keep_resolution
from .table import MODELS, REFUSED


class TorchvisionBackbone(Backbone):
    """A classification model of torchvision as a `Backbone`.

    The stem ends at stride 2, or where the first pooling or patch embedding ends; a stage ends with the last
    block of its stride, as in torchvision's own detectors. What stands between the last stage and the pooling
    belongs to the classifier, except in MobileNetV3, whose last convolution torchvision's detectors and
    segmenters use too.

    Args:
        model: torchvision's name of the model.
        channels: width of each map.
        norm_layer: what to build instead of BatchNorm, such as `torchvision.ops.FrozenBatchNorm2d`.
        **options: those of `backbones.Backbone`.
    """

    block_pattern = r"^stages\.(\d+)\.(\d+)"
    overwrites = True
    global_pools = POOLS
    output_strides = (8, 16, 32)

    def __init__(
        self,
        model: str,
        channels: tuple[int, ...],
        norm_layer: Callable[..., nn.Module] | None = None,
        **options: Any,
    ):
        family = MODELS[model].family
        if family == "VGG":  # whose classifier reads 7 x 7 cells
            self.global_pools = tuple(kind for kind in POOLS if kind)
        super().__init__(channels=channels, **options)
        self.model = model

        net = _build(model, _arguments(model, family, self.output_stride, norm_layer))
        cut = _CUTS[family](net)
        if not (family == "MobileNetV3" and self.output_stride == 16):
            cut.stages = keep_resolution(cut.stages, self.dilations)
        if family == "GoogLeNet":  # its poolings have no padding, and drop what 2 does not divide
            self.size_divisor = 32
        depths = [sum(map(_has_branch, stage)) for stage in cut.stages]
        if not sum(depths) and self.drop_path_rate:
            raise InputError(f"{model} has no residual branches to drop; leave drop_path_rate at 0")
        for block, rate in zip(_branched(cut), chain(*self.drop_path_rates(depths)), strict=True):
            _drop_path(block, rate)

        self.stem = nn.Sequential(*cut.stem)
        if self.in_chans != 3:
            _adapt_first_conv(self.stem, self.in_chans)
        run = _ChannelsLast if cut.channels_last else Blocks
        self.stages = nn.ModuleList(self.wanted(run(*stage) for stage in cut.stages))
        self._classifier = (cut.norm, cut.pre_logits)
        self.pool_size = cut.pool_size
        if not self.features_only:
            widths = [m.in_features // cut.pool_size**2 for m in cut.pre_logits if isinstance(m, nn.Linear)]
            self.num_features = widths[0] if widths else cut.head.in_features
            self.hidden_features = cut.head.in_features if widths else None
        self.key_layouts = (_layout(net, cut),)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = self.pre_logits(select_adaptive_pool2d(features, self.global_pool, self.pool_size)).flatten(1)
        else:
            x = features
            for layer in self.pre_logits:  # on maps
                if not isinstance(layer, nn.Flatten):
                    x = over_channels(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else over_channels(self.head, x)

    def make_norm(self) -> nn.Module:
        return nn.Sequential(*self._classifier[0])

    def make_pre_logits(self) -> nn.Module:
        layers = [*(self._classifier[1] if hasattr(self, "_classifier") else self.pre_logits)]
        width = self.pooled_features * self.pool_size**2
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.Dropout):
                layer.p = self.drop_rate
            elif isinstance(layer, LayerNorm2d) and layer.normalized_shape != (width,):
                layers[i] = LayerNorm2d(width, eps=layer.eps)
            elif isinstance(layer, nn.Linear):
                if layer.in_features != width:
                    layers[i] = nn.Linear(width, layer.out_features)
                width = layer.out_features
        return nn.Sequential(*layers)

    def prepare_for_inference(self) -> nn.Module:
        """Residual blocks name their norms by the convolution before; other blocks are sequences, which say it."""
        for block in [module for module in self.modules() if type(module) in (BasicBlock, Bottleneck)]:
            for n in (1, 2, 3) if type(block) is Bottleneck else (1, 2):
                folded = fold_norm(getattr(block, f"conv{n}"), getattr(block, f"bn{n}"))
                if folded is not None:
                    setattr(block, f"conv{n}", folded)
                    setattr(block, f"bn{n}", nn.Identity())
        return super().prepare_for_inference()

    def no_weight_decay(self) -> set[str]:
        """Position biases, logit scales and layer scales, beside norms and biases."""
        kinds = ("relative_position_bias_table", "cpb_mlp", "logit_scale", "layer_scale")
        return {name for name, _ in self.named_parameters() if any(kind in name for kind in kinds)}

    def finish(self) -> None:
        super().finish()
        del self._classifier


def refuse(model: str, **options: Any) -> NoReturn:
    """Says why a model of torchvision is not offered, and what to use instead."""
    raise InputError(f"torchvision's {model} is not offered: {REFUSED[model].reason}")


def _arguments(
    model: str, family: str, output_stride: int, norm_layer: Callable[..., nn.Module] | None
) -> dict[str, Any]:
    """What torchvision's builder is called with."""
    arguments: dict[str, Any] = {}
    if norm_layer is not None:
        if family in ("DenseNet", "GoogLeNet", "MNASNet", "ShuffleNetV2", "VGG"):
            raise InputError(f"torchvision's {model} takes no norm_layer")
        arguments["norm_layer"] = norm_layer
    if family == "GoogLeNet":
        arguments |= {"aux_logits": False, "init_weights": True}
    if family == "MobileNetV3":
        arguments["dilated"] = output_stride == 16  # as torchvision's segmenters have it
    return arguments


def _build(model: str, arguments: Mapping[str, Any]) -> nn.Module:
    if MODELS[model].family != "RegNet":
        return get_model(model, weights=None, **arguments)
    with torch.device("cpu"):  # it computes its widths with tensors, which the meta device cannot
        net = get_model(model, weights=None, **arguments)
    return net.to(torch.get_default_device())


# --- where each family is cut ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Cut:
    """The modules of a torchvision model, in the order in which they run.

    Args:
        stem: before the first stage.
        stages: one list per stride; drop path, checkpointing and lr decay go by the modules in it.
        norm: between the last map and the pooling.
        pre_logits: between the pooling and the last layer, without the dropout before that.
        head: the layer that yields the logits.
        pool_size: side of what the pooling yields.
        channels_last: whether stages run on maps (B, H, W, C).
    """

    stem: list[nn.Module]
    stages: list[list[nn.Module]]
    norm: list[nn.Module] = field(default_factory=list)
    pre_logits: list[nn.Module] = field(default_factory=list)
    head: nn.Linear
    pool_size: int = 1
    channels_last: bool = False


def _cut_resnet(net: nn.Module) -> _Cut:
    return _Cut(
        stem=[net.conv1, net.bn1, net.relu, net.maxpool],
        stages=[[*net.layer1], [*net.layer2], [*net.layer3], [*net.layer4]],
        head=net.fc,
    )


def _cut_regnet(net: nn.Module) -> _Cut:
    return _Cut(stem=[net.stem], stages=[[*stage] for stage in net.trunk_output], head=net.fc)


def _cut_efficientnet(net: nn.Module) -> _Cut:
    conv, first, *stages, last = net.features
    stages = [[*stage] for stage in stages]  # at strides 4, 8, 16, 16, 32 and, most of them, 32
    return _Cut(
        stem=[conv, first],
        stages=[stages[0], stages[1], stages[2] + stages[3], [*chain(*stages[4:])]],
        norm=[last],
        head=net.classifier[-1],
    )


def _cut_mobilenet_v2(net: nn.Module) -> _Cut:
    stem, stages = _by_stride([*net.features][:-1])
    return _Cut(stem=stem, stages=stages, norm=[net.features[-1]], head=net.classifier[-1])


def _cut_mobilenet_v3(net: nn.Module) -> _Cut:
    stem, stages = _by_stride([*net.features])
    return _Cut(stem=stem, stages=stages, pre_logits=[nn.Flatten(), *net.classifier[:2]], head=net.classifier[-1])


def _by_stride(blocks: list[nn.Module]) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The stem, and one list per block that torchvision marks as the first of a stride."""
    starts = [i for i, block in enumerate(blocks) if getattr(block, "_is_cn", False)]
    return blocks[: starts[0]], [blocks[a:b] for a, b in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def _cut_mnasnet(net: nn.Module) -> _Cut:
    stacks = [[*stack] for stack in net.layers[8:14]]
    return _Cut(
        stem=[*net.layers[:8]],
        stages=[stacks[0], stacks[1], stacks[2] + stacks[3], stacks[4] + stacks[5]],
        norm=[*net.layers[14:]],
        head=net.classifier[-1],
    )


def _cut_shufflenet(net: nn.Module) -> _Cut:
    return _Cut(
        stem=[net.conv1],
        stages=[[net.maxpool], [*net.stage2], [*net.stage3], [*net.stage4]],
        norm=[net.conv5],
        head=net.fc,
    )


def _cut_densenet(net: nn.Module) -> _Cut:
    f = net.features
    for transition in (f.transition1, f.transition2, f.transition3):
        transition.pool.ceil_mode = True  # odd sides keep their last row
    return _Cut(
        stem=[f.conv0, f.norm0, f.relu0, f.pool0],
        stages=[
            [f.denseblock1],
            [f.transition1, f.denseblock2],
            [f.transition2, f.denseblock3],
            [f.transition3, f.denseblock4, f.norm5, nn.ReLU(inplace=True)],
        ],
        head=net.classifier,
    )


def _cut_convnext(net: nn.Module) -> _Cut:
    f = net.features
    downs = [[], *([f[i][0], Pad(2), f[i][1]] for i in (2, 4, 6))]
    norm, flatten, head = net.classifier
    return _Cut(
        stem=[Pad(4), f[0]],
        stages=[[*down, *blocks] for down, blocks in zip(downs, f[1::2], strict=True)],
        pre_logits=[norm, flatten],
        head=head,
    )


def _cut_swin(net: nn.Module) -> _Cut:
    f = net.features
    downs = [[], [f[2]], [f[4]], [f[6]]]
    return _Cut(
        stem=[Pad(4), f[0], Permute([0, 3, 1, 2])],
        stages=[[*down, *blocks] for down, blocks in zip(downs, f[1::2], strict=True)],
        norm=[Permute([0, 2, 3, 1]), net.norm, Permute([0, 3, 1, 2])],
        head=net.head,
        channels_last=True,
    )


def _cut_vgg(net: nn.Module) -> _Cut:
    parts: list[list[nn.Module]] = [[]]  # each begins with the pooling that halves the sides
    for layer in net.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True  # odd sides keep their last row
            parts.append([])
        parts[-1].append(layer)
    full, half, *stages = parts
    fc1, relu1, dropout, fc2, relu2 = net.classifier[:5]
    return _Cut(
        stem=full + half,
        stages=stages,
        pre_logits=[nn.Flatten(), fc1, relu1, dropout, fc2, relu2],
        head=net.classifier[-1],
        pool_size=7,
    )


def _cut_googlenet(net: nn.Module) -> _Cut:
    fours = [net.inception4a, net.inception4b, net.inception4c, net.inception4d, net.inception4e]
    return _Cut(
        stem=[net.conv1],
        stages=[
            [net.maxpool1, net.conv2, net.conv3],
            [net.maxpool2, net.inception3a, net.inception3b],
            [net.maxpool3, *fours],
            [net.maxpool4, net.inception5a, net.inception5b],
        ],
        head=net.fc,
    )


_CUTS: Mapping[str, Callable[[nn.Module], _Cut]] = {
    "ConvNeXt": _cut_convnext,
    "DenseNet": _cut_densenet,
    "EfficientNet": _cut_efficientnet,
    "EfficientNetV2": _cut_efficientnet,
    "GoogLeNet": _cut_googlenet,
    "MNASNet": _cut_mnasnet,
    "MobileNetV2": _cut_mobilenet_v2,
    "MobileNetV3": _cut_mobilenet_v3,
    "RegNet": _cut_regnet,
    "ResNeXt": _cut_resnet,
    "ResNet": _cut_resnet,
    "ShuffleNetV2": _cut_shufflenet,
    "Swin": _cut_swin,
    "SwinV2": _cut_swin,
    "VGG": _cut_vgg,
    "Wide ResNet": _cut_resnet,
}


class _ChannelsLast(Blocks):
    """Blocks that run on maps (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _layout(net: nn.Module, cut: _Cut) -> KeyLayout:
    """torchvision's names in ours, read off where each module has gone."""
    names = {module: name for name, module in net.named_modules()}
    parts = {"stem": cut.stem, "norm": cut.norm, "pre_logits": cut.pre_logits}
    parts |= {f"stages.{n}": stage for n, stage in enumerate(cut.stages)}
    ours = {f"{part}.{i}": module for part, modules in parts.items() for i, module in enumerate(modules)}
    moved = {names[module]: name for name, module in (ours | {"head": cut.head}).items() if module in names}
    return KeyLayout(
        "torchvision",
        (
            (r"(denselayer\d+\.(?:norm|relu|conv))\.(\d\.)", r"\1\2"),  # published DenseNets are older than their code
            (r"^aux\d\..*", ""),  # GoogLeNet's classifiers for training
            *((rf"^{re.escape(theirs)}\.", f"{name}.") for theirs, name in moved.items()),
        ),
    )


def _adapt_first_conv(stem: nn.Module, in_chans: int) -> None:
    conv = next(m for m in stem.modules() if isinstance(m, nn.Conv2d))
    conv.weight = nn.Parameter(adapt_input_conv(in_chans, conv.weight.detach()))
    conv.in_channels = in_chans


# --- drop path ------------------------------------------------------------------------------------------------


def _branch(block: nn.Module) -> nn.Module | None:
    """The module whose output a residual block adds to its input; None if it adds nothing."""
    if hasattr(block, "stochastic_depth"):
        return block.stochastic_depth if getattr(block, "use_res_connect", True) else None
    if hasattr(block, "expansion"):  # ResNet
        return block.bn3 if hasattr(block, "bn3") else block.bn2
    if hasattr(block, "proj") and hasattr(block, "f"):  # RegNet
        return block.f
    if getattr(block, "use_res_connect", False):  # MobileNet
        return block.conv if hasattr(block, "conv") else block.block
    return block.layers if getattr(block, "apply_residual", False) else None  # MNASNet


def _has_branch(block: nn.Module) -> bool:
    return _branch(block) is not None


def _branched(cut: _Cut) -> list[nn.Module]:
    return [block for stage in cut.stages for block in stage if _has_branch(block)]


def _drop_path(block: nn.Module, rate: float) -> None:
    branch = _branch(block)
    if isinstance(branch, StochasticDepth):
        block.stochastic_depth = DropPath(rate)
    elif rate:  # torchvision has none here
        block.drop_path = _DropBranch(rate)
        branch.register_forward_hook(block.drop_path.after)


class _DropBranch(DropPath):
    """Drop path for a residual branch that is added in somebody else's forward."""

    def after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self(output)
