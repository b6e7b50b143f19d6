"""Multi-head attention on `scaled_dot_product_attention`."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .linear import Linear


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention of queries (B, N, C) to keys and values (B, M, C); returns (B, N, C).

    The heads split C evenly. `bias` is added to the logits and broadcasts to (B, heads, N, M).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, C / heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, C).

    Args:
        dim: C.
        heads: number of heads; divides `dim`.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % heads:
            raise InputError(f"attention: {heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), self.heads, bias))
