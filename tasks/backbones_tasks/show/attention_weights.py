"""Attention weights of any model, fused or not, where their cells lie, and what follows from them.

Under PyTorch's plain kernel, `scaled_dot_product_attention` is made of the same operators as attention written out:
a softmax, and its product with values. These are seen whoever calls them, and `Places` knows where tokens are from: no
architecture has to hand out its weights, or to tell how it cuts its maps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from backbones import Backbone

from .grid import Grid, grid_of
from .places import MOVES, NOWHERE, PRODUCTS, Places, middle, modules_running, tensors_in, told, varies

SOFTMAX = ("_softmax", "_safe_softmax")
#: Class, distillation and register tokens.
LONGEST_PREFIX = 9


@dataclass(frozen=True)
class Cells:
    """Which cells of a grid the tokens of each group stand for.

    Args:
        grid: over the image.
        of: (groups, N): the cell of each token, -1 where it is from no place, or from padding.
    """

    grid: Grid
    of: Tensor

    @property
    def span(self) -> tuple[int, int, int]:
        """Rows and columns of the cells of a group, and how many rows or columns one is from the next.

        Of the group that has most cells in the image, and of these one whose cells are nearest to each other.
        """
        inside = self.of >= 0
        lines = self.of // self.grid.width, self.of % self.grid.width
        far = sum(torch.where(inside, x, -1).amax(1) - torch.where(inside, x, self.of.max()).amin(1) for x in lines)
        one = int((inside.sum(1) * (2 * self.of.max() + 2) - far).argmax())
        rows, columns = (x[one][inside[one]].unique() for x in lines)
        apart = max(int(x.diff().max()) if len(x) > 1 else 1 for x in (rows, columns))
        return len(rows), len(columns), apart


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer in the forward pass of one image.

    Args:
        name: of the module that attends.
        groups: windows, or other groups of tokens, that attend among themselves; 1 where all tokens attend.
        heads, queries, keys: numbers of heads, and of tokens in a group.
        asking, asked: cells that the queries and the keys stand for; None where they are none of the image.
    """

    name: str
    groups: int
    heads: int
    queries: int
    keys: int
    asking: Cells | None
    asked: Cells | None

    @property
    def is_global(self) -> bool:
        """Whether all tokens attend to all."""
        return self.groups == 1 and self.asking is not None and _equal(self.asking, self.asked)

    @property
    def prefix(self) -> int:
        """Tokens, class tokens as a rule, that stand before those of cells and ask, too."""
        if self.groups > 1 or self.asking is None:
            return 0
        before = int((self.asking.of[0] >= 0).int().argmax())
        return before if before <= LONGEST_PREFIX else 0

    @property
    def window(self) -> tuple[int, int] | None:
        """Rows and columns of windows whose cells attend among themselves; None where there are none."""
        if self.groups == 1 or self.asking is None or not _equal(self.asking, self.asked):
            return None
        rows, columns, apart = self.asking.span
        return None if apart > 1 else (rows, columns)

    def __str__(self) -> str:
        groups = f"{self.groups} groups" if self.groups > 1 else "one group"
        if self.is_global:
            return f"all {self.queries} tokens"
        if self.asked is None:
            return f"{groups} of {self.queries} tokens to {self.keys}, which are no cells of the image"
        if self.asking is None:
            return f"{groups} of {self.keys} tokens, asked by no cell of the image"
        if self.groups == 1:
            return f"{self.queries} cells to {self.keys}"
        if self.window:
            return f"{self.groups} windows of {self.window[0]} x {self.window[1]}"
        own, other = (
            f"{rows} x {columns} cells" + (f", {apart} apart" if apart > 1 else "")
            for rows, columns, apart in (self.asking.span, self.asked.span)
        )
        return f"{groups} of {own}" + ("" if _equal(self.asking, self.asked) else f", to {other}")


@dataclass(frozen=True)
class Attended:
    """What a layer did with one image.

    Args:
        layer: which one.
        weights: (groups, heads, queries, keys), which sum to 1 over the keys.
        values: (groups, heads, keys, d), or None where weights and values are multiplied one by one.
    """

    layer: AttentionLayer
    weights: Tensor
    values: Tensor | None


class Unseen(Exception):
    """No attention was seen; the text says what could not be seen into."""


def attention_layers(model: Backbone, images: Tensor) -> list[AttentionLayer]:
    """The attention layers in the order in which they run on one image (1, C, H, W)."""
    return watch(model, images, lambda index, seen: seen.layer)


def watch(model: Backbone, images: Tensor, keep: Callable[[int, Attended], Any]) -> list[Any]:
    """What is kept of each layer's weights on one image (1, C, H, W).

    Args:
        model: in eval mode.
        images: one image.
        keep: called with the index of a layer and what it did; what it returns is kept. (All weights of a large model
            take gigabytes.)
    """
    kept: list[Any] = []

    def done(seen: Attended) -> None:
        kept.append(keep(len(kept), seen))

    layers = _Layers(tuple(images.shape[-2:]), done)
    # With autograd on, models take no short cut of inference, in which keys may come in another order.
    with (
        modules_running(model) as running,
        torch.enable_grad(),
        _plain_attention(),
        _Attention(images, running, layers.add) as attention,
    ):
        model(images)
    layers.complete()
    if not kept:
        raise Unseen(told(attention.lost))
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


def distances(seen: Attended) -> list[float] | None:
    """Mean attention distance of each head, in pixels: from the middle of what asks to what it attends to.

    Weighted by attention and averaged over the cells that ask (Dosovitskiy et al.,
    https://arxiv.org/abs/2010.11929, figure 7); tokens that are no cells of the image are left out at both ends. None
    where what asks is no cell.
    """
    asking, asked = seen.layer.asking, seen.layer.asked
    if asking is None or asked is None:
        return None
    total = torch.zeros(seen.layer.heads, dtype=torch.double, device=seen.weights.device)
    count = 0
    for weights, queries, keys in zip(seen.weights, asking.of, asked.of, strict=True):
        inside, known = queries >= 0, keys >= 0
        middles = asking.grid.middles(queries[inside]), asked.grid.middles(keys[known])
        apart = torch.cdist(*middles, compute_mode="donot_use_mm_for_euclid_dist")
        weights = weights[:, inside][:, :, known]
        mean = (weights * apart).sum(-1) / weights.sum(-1).clamp(min=1e-12)
        total += mean.double().sum(1)
        count += int(inside.sum())
    return (total / count).tolist()


def by_offset(seen: Attended) -> Tensor:
    """Mean weight by the offset from query to key, in cells, of a layer that attends within windows.

    Windows that the border of the image or a mask cuts say something else, and count only where all are cut.

    Returns:
        (heads, 2 * rows - 1, 2 * columns - 1) of windows (rows, columns); offset 0 is in the middle.
    """
    rows, columns = seen.layer.window
    cells, width = seen.layer.asking.of, seen.layer.asking.grid.width
    total = seen.weights.new_zeros(seen.layer.heads, (2 * rows - 1) * (2 * columns - 1))
    count = torch.zeros_like(total[0])
    whole = (cells >= 0).all(1) & (seen.weights.flatten(1).amin(1) > 1e-30)  # a mask of -100 leaves next to nothing
    groups = whole.nonzero()[:, 0].tolist() or range(len(cells))
    for weights, own in ((seen.weights[group], cells[group]) for group in groups):
        inside = own >= 0
        row, column = own[inside] // width, own[inside] % width
        down, right = row - row[:, None], column - column[:, None]  # key minus query
        near = (down.abs() < rows) & (right.abs() < columns)  # a cyclic shift brings both ends of a map together
        index = ((down + rows - 1) * (2 * columns - 1) + right + columns - 1)[near]
        total.index_add_(1, index, weights[:, inside][:, :, inside][:, near])
        count.index_add_(0, index, torch.ones_like(index, dtype=count.dtype))
    return (total / count.clamp(min=1)).unflatten(1, (2 * rows - 1, 2 * columns - 1))


def _equal(a: Cells, b: Cells | None) -> bool:
    return b is not None and a.grid == b.grid and torch.equal(a.of, b.of)


@dataclass(frozen=True)
class _Call:
    """Weights (L, N, M) and values (L, M, d) of groups and heads together, places of queries (L, N) and keys (L, M)."""

    weights: Tensor
    values: Tensor | None
    queries: Tensor
    keys: Tensor


class _Layers:
    """Puts calls together into layers, and hands each on when the next one begins."""

    def __init__(self, size: tuple[int, int], done: Callable[[Attended], None]):
        self.size = size
        self.done = done
        self.name = ""
        self.calls: list[_Call] = []

    def add(self, name: str, call: _Call) -> None:
        call = _by_groups(call)
        # A layer may attend in several calls, windows sorted by kind, say; it is complete when another begins.
        if name != self.name or not all(_goes_on(call, other) for other in self.calls):
            self.complete()
        self.name = name
        self.calls.append(call)

    def complete(self) -> None:
        if not self.calls:
            return
        weights = torch.cat([call.weights for call in self.calls])
        values = None if self.calls[0].values is None else torch.cat([call.values for call in self.calls])
        asking, asked = (
            None if found is None else Cells(*found)
            for found in (
                grid_of(torch.cat([call.queries for call in self.calls]), self.size),
                grid_of(torch.cat([call.keys for call in self.calls]), self.size),
            )
        )
        self.calls.clear()
        asking, asked = _without_masked(asking, asked, weights)
        layer = AttentionLayer(self.name, *weights.shape, asking, asked)
        self.done(Attended(layer, weights, values))


def _without_masked(asking: Cells | None, asked: Cells | None, weights: Tensor) -> tuple[Cells | None, Cells | None]:
    """Tokens that fill up a group with a copy of some cell, and are masked, are padding."""
    if asked is None:
        return asking, asked
    masked = weights.sum((1, 2)) == 0
    copies = masked & torch.isin(asked.of, asked.of[~masked])
    if not bool(copies.any()):
        return asking, asked
    known = Cells(asked.grid, asked.of.masked_fill(copies, -1))
    return known if asking is not None and _equal(asking, asked) else asking, known


def _goes_on(call: _Call, before: _Call) -> bool:
    """Whether a call is of other groups of the same layer, and not of the layer's next use."""
    if call.weights.shape[1:] != before.weights.shape[1:]:
        return False
    here = torch.view_as_real(call.queries).nan_to_num(nan=-1, posinf=-2)
    there = torch.view_as_real(before.queries).nan_to_num(nan=-1, posinf=-2)
    return not bool((here[:, None] == there).flatten(2).all(-1).any())


def _by_groups(call: _Call) -> _Call:
    """(groups, heads, ...): heads of a group have tokens from the same places, whichever of the two comes first."""
    inside = call.queries.isfinite().any(1) | call.keys.isfinite().any(1)  # windows beyond the image say nothing
    of = inside.nonzero()[:, 0] if bool(inside.any()) else torch.arange(len(inside), device=inside.device)
    tokens = torch.view_as_real(torch.cat((call.queries, call.keys), 1)[of]).nan_to_num(nan=-1e4, posinf=-2e4)
    _, group, count = tokens.flatten(1).mul(16).round().unique(dim=0, return_inverse=True, return_counts=True)
    queries, keys = call.queries, call.keys
    if bool((count != count[0]).any()):  # groups that cannot be told apart
        queries, keys = torch.full_like(queries, NOWHERE), torch.full_like(keys, NOWHERE)
        group, count = torch.zeros_like(group), count[:1]
    order = of[group.argsort(stable=True)].view(len(count), -1)
    order = order[order[:, 0].argsort()]
    values = None if call.values is None else call.values[order]
    return _Call(call.weights[order], values, queries[order[:, 0]], keys[order[:, 0]])


class _Attention(Places):
    """Sees softmax and its product with values."""

    def __init__(self, images: Tensor, running: Sequence[str], see: Callable[[str, _Call], None]):
        super().__init__(images, running)
        self.see = see
        #: What a softmax returned, moved or not; with its weights where these are scores of cells, by one query.
        self.shares = WeakTensorKeyDictionary()

    def follow(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        super().follow(func, name, args, kwargs, result)
        if name in SOFTMAX:
            self.shares[result] = self._scores(result, args[1])
            return
        shares = [x for x in tensors_in(args) if x in self.shares]
        if not shares:
            return
        if name in MOVES or name in ("clone", "_to_copy"):
            for moved in tensors_in(result):
                self.shares[moved] = self.shares[shares[0]]
        elif name in PRODUCTS:
            a, b = args[PRODUCTS[name] :][:2]
            if a is shares[0]:
                self._see_product(a, b, self.known.get(a), self.known.get(b))
            elif b is shares[0]:
                known = (self.known.get(x) for x in (b, a))
                self._see_product(b.mT, a.mT, *(None if x is None else x.mT for x in known))
        elif name == "mul" and isinstance(args[1], Tensor):
            scores, values = self.shares[shares[0]], args[1] if args[0] is shares[0] else args[0]
            if scores is not None and values in self.known:
                self.see(self.running[-1], scores)

    def _scores(self, shares: Tensor, dim: int) -> _Call | None:
        places = self.known.get(shares)
        if places is None or not varies(places, dim):
            return None
        weights, keys = (x.detach().movedim(dim, -1).reshape(-1, x.shape[dim]) for x in (shares, places))
        return _Call(weights[:, None].float(), None, torch.full_like(keys[:, :1], NOWHERE), keys)

    def _see_product(self, weights: Tensor, values: Tensor, asking: Tensor | None, asked: Tensor | None) -> None:
        shape = (-1, *weights.shape[-2:])
        total = weights.sum(-1)
        if asked is None or not bool(((total - 1).abs() < 0.01).logical_or(total == 0).all()):
            self.lost.append(("softmax", self.running[-1]))
            return
        places = [
            torch.full(x.shape[:-1], NOWHERE, device=x.device) if p is None or varies(p, -1) else middle(p, -1)[..., 0]
            for x, p in ((weights, asking), (values, asked))
        ]
        queries, keys = (p.reshape(-1, p.shape[-1]) for p in places)
        weights, values = (x.detach().float() for x in (weights, values))
        self.see(self.running[-1], _Call(weights.reshape(shape), values.reshape(-1, *values.shape[-2:]), queries, keys))


@contextmanager
def _plain_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operator
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
