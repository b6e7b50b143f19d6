"""Transformer blocks of ViT."""

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from backbones.layers import Attention, Layer, Mlp, attend, residual, window_partition, window_unpartition


class NormedAttention(Attention):
    """Attention whose queries and keys are normed, head by head (Dehghani et al., https://arxiv.org/abs/2302.05442)."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        x = attend(*(part.flatten(-2) for part in (q, k, v)), self.heads, bias, self.fast, self.attn_drop.rate)
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
        qk_norm: bool = False,
    ):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = NormedAttention(dim, heads) if qk_norm else Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
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
