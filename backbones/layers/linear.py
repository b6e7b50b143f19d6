"""Linear layers, and how they cost a CPU no more than they must."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import activate
from .inference import Layer
from .padding import is_exporting

# oneDNN's float32 kernels for x86; elsewhere, or without it, `F.linear` is as good.
_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
# PyTorch hands a single image of no more numbers than these to its own convolution, which is slower than either.
_FEW = 20480


class FastLinear(nn.Linear):
    """`nn.Linear` that runs as `linear` does; what `for_inference` puts in its place."""

    @classmethod
    def of(cls, layer: nn.Linear) -> "FastLinear":
        """One with the parameters of `layer`."""
        fast = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        fast.weight, fast.bias = layer.weight, layer.bias
        return fast.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, run as a 1x1 convolution where that is faster.

    In float32 on x86, PyTorch sends `F.linear` to MKL and convolutions to oneDNN. The two compute the same
    sums, and on AMD Zen 5 oneDNN takes half the time, forward and backward. Rows are laid along the width
    of a channels-last map, so that nothing is copied.
    """
    few = not torch.compiler.is_compiling() and x.numel() <= _FEW
    if not _ONEDNN or _not_plain_float32(x) or few or is_exporting():  # what is exported runs on any machine
        return F.linear(x, weight, bias)
    rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (..., C) -> (1, C, 1, rows)
    # A kernel of one cell has nothing to dilate, but asking for it keeps PyTorch from its own, slower
    # convolution, which it otherwise takes for 1x1 kernels where it runs on a single thread.
    y = F.conv2d(rows, weight[:, :, None, None], bias, dilation=2)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _not_plain_float32(x: Tensor) -> bool:
    return x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")


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

    def __init__(self, dim: int, hidden: int, act: str = "gelu"):
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.act, spare=self.fast))
