"""The network as it is, which knows nothing of dense-backbones: put yours in its place."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """Residual blocks in four stages; returns maps (B, dims[i], H / 2^(i + 2), W / 2^(i + 2)) by name."""

    def __init__(self, dims: Sequence[int], depths: Sequence[int], in_chans: int = 3, drop_path_rate: float = 0.0):
        super().__init__()
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.checkpointing = False
        self.stem = nn.Conv2d(in_chans, dims[0], 3, 2, 1)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            blocks = [Block(dims[i], rate) for rate in rates[sum(depths[:i]) :][:depth]]
            down = nn.Conv2d(dims[max(i - 1, 0)], dims[i], 3, 2, 1)
            self.stages.append(nn.Sequential(down, *blocks))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(images), {}
        for i, stage in enumerate(self.stages):
            x = checkpoint(stage, x, use_reentrant=False) if self.checkpointing and self.training else stage(x)
            maps[f"c{i + 2}"] = x
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable


class Block(nn.Module):
    """Mixes cells, then channels, and adds the result to its input."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.mix = nn.Sequential(
            nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.GroupNorm(1, dim), nn.Conv2d(dim, 4 * dim, 1), nn.GELU()
        )
        self.out = nn.Conv2d(4 * dim, dim, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.out(self.mix(x)))
