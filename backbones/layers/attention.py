"""Multi-head attention on `scaled_dot_product_attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import onednn
from .dropout import Dropout
from .inference import Layer

# Attention weights, between some queries and all keys, that are held at a time: what stays in a CPU's cache.
WEIGHTS = 2**20
# Attention weights of one head from which on a product of matrices by itself is quicker than PyTorch's attention.
MANY_WEIGHTS = 2**18


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    bias: Tensor | None = None,
    fast: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of queries (B, N, C) to keys and values (B, M, C); returns (B, N, C).

    The heads split C evenly. `bias` is added to the logits and broadcasts to (B, heads, N, M). `fast` as a `Layer` is;
    `dropout` is the share of attention weights to drop, and `scale` what logits are multiplied by.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, C / heads)
    return scaled_attention(q, k, v, bias, scale, fast, dropout).transpose(1, 2).flatten(2)


def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    fast: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`scaled_dot_product_attention` of queries (B, heads, N, d) to keys (B, heads, M, d) and values (B, heads, M, e).

    In bfloat16 on a CPU that multiplies such matrices, PyTorch's own takes as long as in float32; there, products of
    matrices do it in half the time, for some queries at a time. In float32, PyTorch's multiplies by MKL, and oneDNN is
    up to twice as quick; FLOP counters do not see it, so only layers that are `fast` use it.
    """
    if dropout or not onednn.can_run(q, k) or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    if torch.compiler.is_compiling():
        if fast:
            return _compiled_attention(q, k, v, bias, scale).transpose(1, 2)
    elif fast and bias is None and q.shape[2] * k.shape[2] >= MANY_WEIGHTS:
        return _attend_by_heads(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    elif q.dtype == torch.bfloat16:
        return _attend_by_products(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


@torch.library.custom_op("backbones::attention", mutates_args=(), device_types="cpu")
def _compiled_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """`scaled_attention` of a fast layer, as (B, N, heads, e), which compilers do not look into."""
    return scaled_attention(q, k, v, bias, scale, fast=True).transpose(1, 2).contiguous()


@_compiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[-1])


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, _ = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = q.new_empty(len(q), queries, v.shape[-1])
    rows = max(16, WEIGHTS // (len(q) * k.shape[1]))
    for start in range(0, queries, rows):
        part = q[:, start : start + rows]
        weights = torch.baddbmm(q.new_empty(()).expand(*part.shape[:2], k.shape[1]), part, k.mT, beta=0, alpha=scale)
        if bias is not None:
            rows_of_bias = bias[..., start : start + rows, :] if bias.shape[-2] > 1 else bias
            weights.unflatten(0, (batch, heads)).add_(rows_of_bias)
        out[:, start : start + rows] = weights.softmax(-1) @ v
    return out.unflatten(0, (batch, heads))


def _attend_by_heads(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1])  # as whoever joins the heads wants it
    rows = max(1024, 4 * WEIGHTS // k.shape[2])
    for i in range(batch):
        for head in range(heads):
            keys, values = k[i, head] * scale, v[i, head].mT.contiguous()
            for start in range(0, queries, rows):
                some = slice(start, start + rows)
                weights = onednn.product(q[i, head, some], keys)
                torch.softmax(weights, -1, out=weights)
                out[i, some, head] = onednn.product(weights, values)
    return out.transpose(1, 2)


class Attention(Layer):
    """Multi-head self-attention over tokens (B, N, C).

    Args:
        dim: C.
        heads: number of heads; divides `dim`.
        qkv_bias: whether queries, keys and values have a bias.
        scale: what logits are multiplied by; one over the root of a head's width unless given.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, scale: float | None = None):
        super().__init__()
        if dim % heads:
            raise InputError(f"attention: {heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = Dropout("attn_drop_rate")
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = attend(*self.qkv(x).chunk(3, dim=-1), self.heads, bias, self.fast, self.attn_drop.rate, self.scale)
        return self.proj_drop(self.proj(x))


class SpatialReductionAttention(Layer):
    """Attention of every cell of a map (B, H, W, C) to a smaller map, which a strided convolution makes of it.

    As in PVT (Wang et al., https://arxiv.org/abs/2102.12122).

    Args:
        dim: C.
        heads: number of heads; divides `dim`.
        sr_ratio: how much smaller each side is; at 1, cells attend to the map itself.
    """

    def __init__(self, dim: int, heads: int, sr_ratio: int):
        super().__init__()
        self.heads = heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.attn_drop = Dropout("attn_drop_rate")
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout("proj_drop_rate")
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(self.reduce(x).flatten(1, 2)).chunk(2, dim=-1)
        y = attend(self.q(x).flatten(1, 2), k, v, self.heads, fast=self.fast, dropout=self.attn_drop.rate)
        return self.proj_drop(self.proj(y)).reshape(x.shape)

    def reduce(self, x: Tensor) -> Tensor:
        """The map that keys and values come from: (B, H, W, C) -> (B, h, w, C)."""
        if self.sr_ratio == 1:
            return x
        x = x.permute(0, 3, 1, 2)
        height, width = x.shape[-2:]
        if height < self.sr_ratio or width < self.sr_ratio:  # smaller than one kernel
            x = F.pad(x, (0, max(0, self.sr_ratio - width), 0, max(0, self.sr_ratio - height)))
        return self.norm(self.sr(x).permute(0, 2, 3, 1))
