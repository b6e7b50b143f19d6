"""What stands between the last map and logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

#: Kinds of pooling that take cells alone, as timm names them; "" leaves maps as they are.
POOLS = ("avg", "max", "avgmax", "catavgmax", "")


def pool(x: Tensor, kind: str, dims: int | Sequence[int] = (2, 3)) -> Tensor:
    """Maps (B, C, h, w) as vectors, as timm's `SelectAdaptivePool2d` has them; of tokens (B, N, C), over `dims=1`.

    Args:
        x: what is pooled.
        kind: "avg", "max", "avgmax" (their mean), "catavgmax" (both, 2 * C) or "", which leaves it as it is.
        dims: of the cells.
    """
    if kind in ("", "avg"):
        return x.mean(dims) if kind else x
    peak = x.amax(dims)
    if kind == "max":
        return peak
    average = x.mean(dims)
    return (average + peak) / 2 if kind == "avgmax" else torch.cat((average, peak), dim=-1)


def pool_tokens(x: Tensor, kind: str, prefix: int = 1) -> Tensor:
    """Tokens (B, prefix + cells, C), that of the class first, as vectors.

    Args:
        x: what is pooled.
        kind: as in `pool`, over the cells; "token" takes that of the class, and "both" (2 * C) its and the average.
        prefix: tokens that are no cells.
    """
    if kind == "token":
        return x[:, 0]
    if not kind:
        return x
    cells = x[:, prefix:]
    return torch.cat((x[:, 0], cells.mean(1)), dim=-1) if kind == "both" else pool(cells, kind, dims=1)


def over_channels(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer for vectors (B, C) on those or, cell by cell, on maps (B, C, h, w)."""
    return layer(x) if x.ndim == 2 else layer(x.movedim(1, -1)).movedim(-1, 1)


class PreLogits(nn.Module):
    """LayerNorm, linear, tanh over pooled features (B, C): the hidden layer of CoAtNet's and MaxViT's classifiers."""

    def __init__(self, dim: int, eps: float = 1e-6, hidden: int | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fc = nn.Linear(dim, hidden or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)).tanh()
