"""Linear layers."""

from torch import Tensor, nn

from .activation import activate
from .dropout import Dropout
from .fast import fuse
from .inference import Layer


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights and zero biases, as most transformers start; for `module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Mlp(Layer):
    """Linear, activation, linear over the last dimension: the MLP of a transformer block.

    Args:
        dim: width.
        hidden: width between the two layers.
        act: activation, as `activate` takes it.
    """

    act: str | nn.Module | None

    def __init__(self, dim: int, hidden: int, act: str | nn.Module = "gelu"):
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = Dropout("proj_drop_rate")

    def forward(self, x: Tensor) -> Tensor:
        x = activate(self.fc1(x), self.act, spare=self.fast)
        return self.drop(self.fc2(self.drop(x)))

    def prepare_for_inference(self) -> nn.Module:
        self.fc1, self.act = fuse(self.fc1, self.act)
        return super().prepare_for_inference()
