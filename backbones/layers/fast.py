"""What `backbones.for_inference` puts in the place of PyTorch's linear layers and convolutions."""

import torch
from torch import Tensor, nn

from . import onednn
from .activation import activate


class FastLinear(nn.Linear):
    """`nn.Linear` and an activation, in the kernel that is fastest where it runs."""

    act: str | None

    @classmethod
    def of(cls, layer: nn.Linear, act: str | None = None) -> "FastLinear":
        """One with the parameters of `layer`, and an activation as `activate` takes it."""
        fast = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        fast.weight, fast.bias = layer.weight, layer.bias
        fast.act = act
        return fast.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 1 and onednn.can_run(x, self.weight):
            return onednn.linear(x, self.weight, self.bias, self.act)
        return activate(super().forward(x), self.act, spare=True)


class FastConv(nn.Conv2d):
    """`nn.Conv2d` and an activation, in the kernel that is fastest where it runs."""

    act: str | None

    @classmethod
    def of(cls, layer: nn.Conv2d, act: str | None = None) -> "FastConv":
        """One with the parameters of `layer`, and an activation as `activate` takes it."""
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        fast = cls(*shape, layer.groups, layer.bias is not None, layer.padding_mode, device="meta")
        fast.weight, fast.bias = layer.weight, layer.bias
        fast.act = act
        return fast.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if plain and onednn.can_run(x, self.weight) and (onednn.is_linear(self) or not torch.compiler.is_compiling()):
            return onednn.conv(x, self, self.act)
        return activate(super().forward(x), self.act, spare=True)


def fuse(layer: nn.Module, act: str | None) -> tuple[nn.Module, str | None]:
    """A layer that does the activation too, and None; or the layer as it is and the activation that is left to do."""
    if act in onednn.ACTIVATIONS:
        if type(layer) is FastLinear and layer.act is None:
            return FastLinear.of(layer, act), None
        if type(layer) in (nn.Conv2d, FastConv) and is_plain(layer) and getattr(layer, "act", None) is None:
            return FastConv.of(layer, act), None
    return layer, act


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether another module may do the work of this one: it has no hooks and, if kinds are given, is just of one.

    A subclass may do more (adapters, quantisation, parametrisation), and so may a subclass of tensors in its place.
    """
    if kinds and (type(module) not in kinds or type(module.weight) is not nn.Parameter):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)
