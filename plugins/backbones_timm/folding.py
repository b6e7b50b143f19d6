"""Which batch norms of timm's models follow which convolution, for `backbones.for_inference`."""

import copy

from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import efficientnet, mobilenetv3, resnet
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from torch import nn

from backbones.layers import fold_norm

# Nothing comes between the two in the forward of exactly these classes; what a subclass does, nobody has looked up.
PAIRS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    ConvNormAct: (("conv", "bn"),),
    ConvBnAct: (("conv", "bn1"),),
    DepthwiseSeparableConv: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    EdgeResidual: (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    efficientnet.EfficientNet: (("conv_stem", "bn1"),),
    mobilenetv3.MobileNetV3: (("conv_stem", "bn1"),),
    resnet.BasicBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    resnet.Bottleneck: (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    resnet.ResNet: (("conv1", "bn1"),),
}


def fold_norms(model: nn.Module) -> None:
    """Folds what `PAIRS` names, in place."""
    for module in list(model.modules()):
        for conv, norm in PAIRS.get(type(module), ()):
            _fold(module, conv, norm)


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    found, rest = getattr(module, norm), nn.Identity()
    if type(found) is BatchNormAct2d:
        rest = nn.Sequential(found.drop, found.act)
        found = copy.copy(found)
        found._modules = dict(found._modules) | {"drop": nn.Identity(), "act": nn.Identity()}
    folded = fold_norm(getattr(module, conv), found)
    if folded is not None:
        setattr(module, conv, folded)
        setattr(module, norm, rest)
