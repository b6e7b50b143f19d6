"""What stands between pooling and logits."""

from torch import Tensor, nn


class PreLogits(nn.Module):
    """LayerNorm, linear, tanh over pooled features (B, C): the hidden layer of CoAtNet's and MaxViT's classifiers."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)).tanh()
