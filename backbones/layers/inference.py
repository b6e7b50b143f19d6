"""What a layer does to take part in `backbones.for_inference`."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from .fast import FastConv, is_plain


class Layer(nn.Module):
    """A layer that has a faster way to run in a model that only predicts.

    `backbones.for_inference` calls `prepare_for_inference` of every layer of its copy that has such a method, inner
    layers first, and puts what it returns in the layer's place. Until then `fast` is False, and a layer is as honest as
    any `nn.Module`: its children run through their `__call__`, and what they return is not overwritten.
    """

    #: Whether memory that nobody else reads may be overwritten, and tables that depend on parameters are kept.
    fast = False

    def prepare_for_inference(self) -> nn.Module:
        """Prepares the layer, which belongs to a copy that never learns; returns what takes its place."""
        self.fast = True
        return self


def fold_norm(conv: nn.Module, norm: nn.Module) -> nn.Module | None:
    """The convolution that equals `conv` and then, in eval mode, `norm`; None where there is none."""
    affine = _affine(norm)
    if affine is None or not _is_conv(conv) or conv.out_channels != len(affine[0]):
        return None
    scale, shift = affine
    bias = shift if conv.bias is None else shift + conv.bias.double() * scale
    return _with(conv, conv.weight.double() * scale[:, None, None, None], bias)


def fold_norm_before(norm: nn.Module, conv: nn.Module) -> nn.Module | None:
    """The 1x1 convolution that equals, in eval mode, `norm` and then `conv`; None where there is none."""
    affine = _affine(norm)
    if affine is None or not is_plain(conv, nn.Conv2d, FastConv):
        return None
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1 or conv.in_channels != len(affine[0]):
        return None
    scale, shift = affine
    bias = conv.weight.double().flatten(1) @ shift
    bias = bias if conv.bias is None else bias + conv.bias.double()
    return _with(conv, conv.weight.double() * scale[:, None, None], bias)


def scale_outputs(conv: nn.Module, scale: Tensor) -> nn.Module | None:
    """The convolution that equals `conv` times `scale` (out_chans,); None where there is none."""
    if not _is_conv(conv):
        return None
    bias = None if conv.bias is None else conv.bias.double() * scale.double()
    return _with(conv, conv.weight.double() * scale.double()[:, None, None, None], bias)


def fold_sequence(layers: nn.Sequential) -> nn.Sequential:
    """The same layers, batch norms that follow a convolution folded into it."""
    if type(layers).forward is not nn.Sequential.forward:
        return layers
    names = list(layers._modules)
    for name, following in pairwise(names):
        folded = fold_norm(layers._modules[name], layers._modules[following])
        if folded is not None:
            layers._modules[name], layers._modules[following] = folded, nn.Identity()
    return layers


def _is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution and nothing else."""
    return is_plain(module, nn.Conv2d, FastConv) and getattr(module, "act", None) is None


def _with(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution like `conv`, which may be somebody else's too, with these parameters."""
    new = FastConv.of(conv, getattr(conv, "act", None))
    new.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    new.bias = None if bias is None else nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return new


@torch.no_grad()
def _affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What a norm with running statistics, of whatever library, multiplies by and adds, in float64.

    Read off from what it does, because libraries name the epsilon of a frozen norm as they like, or have none.
    """
    mean = getattr(norm, "running_mean", None)
    if not isinstance(mean, Tensor) or norm.training or not is_plain(norm):
        return None
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and norm.affine:
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        return scale, norm.bias.double() - mean.double() * scale
    probe = copy.deepcopy(norm).double()
    inputs = torch.randn(2, len(mean), 2, 2, dtype=torch.float64, device=mean.device) * 100
    try:
        shift = probe(torch.zeros_like(inputs))[0, :, 0, 0]
        scale = probe(torch.ones_like(inputs))[0, :, 0, 0] - shift
        expected = inputs * scale[:, None, None] + shift[:, None, None]
        is_affine = torch.allclose(probe(inputs), expected, rtol=1e-6, atol=1e-6)
    except RuntimeError:
        return None
    return (scale, shift) if is_affine else None
