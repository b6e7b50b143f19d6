"""Attention weights of any model, fused or not, and their roll-out.

Under PyTorch's plain kernel, `scaled_dot_product_attention` is made of the same operators as attention written out,
and the softmax among them is seen, whoever calls it: no architecture has to hand its weights out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from backbones import Backbone
from backbones.layers import ceil_div

SOFTMAX = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
#: Class, distillation and register tokens; what has more tokens beside those of a grid is no grid.
LONGEST_PREFIX = 9


@dataclass(frozen=True)
class Grid:
    """Cells of an image that tokens stand for, in row-major order, after the prefix tokens."""

    height: int
    width: int
    stride: int
    prefix: int = 0

    def token(self, x: float, y: float) -> int:
        """The token of a pixel."""
        return self.prefix + int(y // self.stride) * self.width + int(x // self.stride)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer in the forward pass of one image.

    Args:
        name: of the module that attends.
        groups: windows, or other groups of tokens, that attend among themselves; 1 where all tokens attend.
        heads, queries, keys: numbers of heads, and of tokens in a group.
        grids: cells that the queries and the keys stand for; None where they are no grid over the image.
    """

    name: str
    groups: int
    heads: int
    queries: int
    keys: int
    grids: tuple[Grid, Grid] | None

    @property
    def is_global(self) -> bool:
        """Whether all tokens attend to all."""
        return self.grids is not None and self.grids[0] == self.grids[1]

    @property
    def window(self) -> int | None:
        """Side of the square windows that attend among themselves; None where there are none."""
        side = math.isqrt(self.queries)
        return side if self.grids is None and self.queries == self.keys == side * side else None

    def __str__(self) -> str:
        if self.is_global:
            return f"all {self.queries} tokens"
        if self.grids:
            return f"{self.queries} cells to {self.keys}"
        if self.window:
            return f"{self.groups} windows of {self.window} x {self.window}"
        groups = f"{self.groups} groups" if self.groups > 1 else "one group"
        return f"{groups} of {self.queries} tokens to {self.keys}"


def attention_layers(model: Backbone, images: Tensor) -> list[AttentionLayer]:
    """The attention layers in the order in which they run on one image (1, C, H, W)."""
    size = tuple(model.pad(images).shape[-2:])
    layers = []

    def describe(index: int, name: str, calls: Sequence[Tensor]) -> None:
        groups = sum(len(weights) for weights in calls)
        heads, queries, keys = calls[0].shape[1:]
        grids = None
        if len(calls) == groups == 1:  # several calls take tokens in an order of their own
            found = [_find_grid(n, size, model.size_divisor) for n in (queries, keys)]
            # Queries coarser than keys are no attention between cells, nor are channels that happen to be as many.
            grids = tuple(found) if all(found) and found[0].stride <= found[1].stride else None
        layers.append(AttentionLayer(name, groups, heads, queries, keys, grids))

    _watch(model, images, describe)
    return layers


def attention_weights(model: Backbone, images: Tensor, keep: Callable[[int, Tensor], Any]) -> list[Any]:
    """What is kept of each layer's weights on one image (1, C, H, W).

    Args:
        model: in eval mode.
        images: one image.
        keep: called with the index of a layer and its weights (groups, heads, queries, keys), which sum to 1 over the
            keys; what it returns is kept. (All weights of a large model take gigabytes.)
    """
    kept = []
    _watch(model, images, lambda index, name, calls: kept.append(keep(index, torch.cat(list(calls)))))
    return kept


def roll_out(layers: Sequence[Tensor]) -> Tensor:
    """How much of each token of the input is in each token of the output, after all layers.

    Attention roll-out (Abnar and Zuidema, https://arxiv.org/abs/2005.00928): the product of the layers' weights, the
    identity mixed in half for the residual connection.

    Args:
        layers: weights (N, N) of each layer, averaged over the heads, first layer first.

    Returns:
        (N, N), rows sum to 1.
    """
    flow = torch.eye(len(layers[0]), dtype=layers[0].dtype, device=layers[0].device)
    for weights in layers:
        flow = (weights @ flow + flow) / 2
    return flow


def unmasked(weights: Tensor) -> Tensor:
    """Those of the windows (windows, heads, N, N) that no mask cuts in parts; all of them where a mask cuts each."""
    whole = weights.flatten(1).amin(1) > 1e-30  # a mask of -100 leaves next to nothing
    return weights[whole] if whole.any() else weights


def by_offset(weights: Tensor) -> Tensor:
    """Mean weight by the offset from query to key, in square windows.

    Args:
        weights: (windows, heads, N, N), tokens of a window in row-major order.

    Returns:
        (heads, 2 * side - 1, 2 * side - 1); offset 0 is in the middle.
    """
    side = math.isqrt(weights.shape[-1])
    positions = torch.arange(side, device=weights.device)
    difference = positions - positions[:, None] + side - 1  # key minus query
    index = difference[:, None, :, None] * (2 * side - 1) + difference[None, :, None, :]
    index = index.reshape(-1)
    mean = weights.mean(0).flatten(1)  # (heads, N * N)
    total = mean.new_zeros(len(mean), (2 * side - 1) ** 2).index_add(1, index, mean)
    count = mean.new_zeros((2 * side - 1) ** 2).index_add(0, index, torch.ones_like(mean[0]))
    return (total / count).unflatten(1, (2 * side - 1, 2 * side - 1))


def _watch(model: Backbone, images: Tensor, done: Callable[[int, str, Sequence[Tensor]], None]) -> None:
    """Runs a model; `done` gets each attention layer's index, name and weights, call by call, when it is complete."""
    calls: list[Tensor] = []
    owner, count = "", 0

    def complete() -> None:
        nonlocal count
        if calls:
            done(count, owner, tuple(calls))
            calls.clear()
            count += 1

    def see(name: str, weights: Tensor) -> None:
        nonlocal owner
        # A layer may attend in several calls, windows sorted by kind, say; it is complete when another begins.
        if name != owner:
            complete()
        owner = name
        calls.append(weights.flatten(0, -4).float())

    # With autograd on, models take no short cut of inference, in which keys may come in another order.
    with _names_of_modules(model) as names, torch.enable_grad(), _plain_attention(), _Softmax(names, see):
        model(images)
    complete()


class _Softmax(TorchDispatchMode):
    """Sees what softmax over the last of four or more dimensions returns: (..., heads, queries, keys)."""

    def __init__(self, names: Sequence[str], see: Callable[[str, Tensor], None]):
        super().__init__()
        self.names = names
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SOFTMAX and result.ndim >= 4 and args[1] % result.ndim == result.ndim - 1:
            self.see(self.names[-1], result.detach())
        return result


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operator
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _names_of_modules(model: Backbone) -> Iterator[list[str]]:
    """The names of the modules that are running, innermost last."""
    running: list[str] = []
    handles = []

    def leave(*_: object) -> None:
        running.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _find_grid(tokens: int, size: tuple[int, int], patch: int) -> Grid | None:
    """The finest grid over an image that leaves few of the tokens over, which stand before its cells.

    Where a map is reduced by a convolution that does not pad, its last cells may have no token.
    """
    strides = sorted({base << doublings for base in (1, patch) for doublings in range(7)})
    for stride in strides:
        rows, columns = (ceil_div(side, stride) for side in size)
        prefix = tokens - rows * columns
        if 0 <= prefix <= min(LONGEST_PREFIX, rows * columns // 4):
            return Grid(rows, columns, stride, prefix)
        if tokens == (size[0] // stride) * (size[1] // stride):
            return Grid(size[0] // stride, size[1] // stride, stride)
    return None
