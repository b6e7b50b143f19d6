"""Transformer blocks of ViT, and what may stand in the place of their norms and activations."""

from collections.abc import Callable
from functools import partial

from timm.layers import DropPath, LayerScale, get_act_layer, get_norm_layer
from torch import Tensor, nn

from backbones.errors import InputError
from backbones.layers import Attention, Layer, Mlp, attend, residual, window_partition, window_unpartition

#: What makes a norm of a width, or its name in timm.
NormLayer = str | Callable[[int], nn.Module]
#: What makes an activation, or its name in timm.
ActLayer = str | Callable[[], nn.Module]

#: Activations that `backbones.layers.activate` knows, and has fast kernels for.
_KNOWN = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "gelu_tanh": "gelu_tanh"}
_KNOWN |= {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}


def make_norm_layer(norm_layer: NormLayer | None) -> Callable[[int], nn.Module]:
    """What makes norms, of an option `norm_layer`; LayerNorm of epsilon 1e-6 for None."""
    if norm_layer is None:
        return partial(nn.LayerNorm, eps=1e-6)
    return _found("norm_layer", norm_layer, get_norm_layer, "layernorm, rmsnorm or simplenorm")


def make_act(act_layer: ActLayer | None) -> str | nn.Module:
    """An activation as `Mlp` takes it, of an option `act_layer`; exact GELU for None."""
    if act_layer is None:
        return "gelu"
    if act_layer in _KNOWN:
        return _KNOWN[act_layer]
    return _found("act_layer", act_layer, get_act_layer, "gelu, relu, silu, gelu_tanh, mish or hard_swish")()


def _found(option: str, given: object, find: Callable[[str], object], known: str) -> Callable[..., nn.Module]:
    layer = given
    if isinstance(given, str):
        try:
            layer = find(given)
        except (AssertionError, KeyError):
            layer = None
    if not callable(layer) or isinstance(layer, nn.Module):
        raise InputError(f"{option}={given!r}: give one of timm's names, such as {known}, or a class")
    return layer


class NormedAttention(Attention):
    """Attention whose queries and keys are normed, head by head (Dehghani et al., https://arxiv.org/abs/2302.05442)."""

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool, scale: float | None, norm_layer: Callable[[int], nn.Module]
    ):
        super().__init__(dim, heads, qkv_bias, scale)
        self.q_norm = norm_layer(dim // heads)
        self.k_norm = norm_layer(dim // heads)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.flatten(-2) for part in (q, k, v))
        x = attend(q, k, v, self.heads, bias, self.fast, self.attn_drop.rate, self.scale)
        return self.proj_drop(self.proj(x))


class Block(Layer):
    """Pre-norm attention and MLP, on tokens (B, N, dim) or, without prefix tokens, maps (B, h, w, dim)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        init_values: float | None,
        drop_path: float,
        window: int,
        qkv_bias: bool,
        qk_scale: float | None,
        qk_norm: bool,
        norm_layer: Callable[[int], nn.Module],
        act_layer: ActLayer | None,
    ):
        super().__init__()
        self.window = window
        self.norm1 = norm_layer(dim)
        self.attn = (
            NormedAttention(dim, heads, qkv_bias, qk_scale, norm_layer)
            if qk_norm
            else Attention(dim, heads, qkv_bias, qk_scale)
        )
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), make_act(act_layer))
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop_path(self.ls1(self.attend(self.norm1(x)))), spare=self.fast)
        return residual(x, self.drop_path(self.ls2(self.mlp(self.norm2(x)))), spare=self.fast)

    def attend(self, x: Tensor) -> Tensor:
        """Attention among all tokens or, in maps larger than a window, within windows."""
        if x.ndim == 3:
            return self.attn(x)
        batch, height, width, _ = x.shape
        if not self.window or max(height, width) <= self.window:
            return self.attn(x.flatten(1, 2)).reshape(x.shape)
        windows = self.attn(window_partition(x, self.window))
        return window_unpartition(windows, self.window, batch, height, width)
