"""Where in the image each value of a forward pass is from, in any model.

Beside each tensor that comes from the image runs one of places: the middle of what a value stands for, in pixels. What
moves values moves places, a convolution or pooling takes the place in the middle of its kernel, a product of matrices
that of its rows. So windows, grids, patches and reduced maps are known where they are, and no layer has to tell.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

NOWHERE = complex("nan")  # of class tokens and other parameters
OUTSIDE = complex("inf")  # of padding

# Operators by what they do to places: move them as they move values, keep them, or mean those of neighbours. Others
# that are not pointwise lose them.
MOVES, KEEPS, MIXES = (
    frozenset(names.split())
    for names in (
        "_reshape_alias _unsafe_view alias cat channel_shuffle constant_pad_nd detach expand flip gather index "
        "index_select native_channel_shuffle permute pixel_shuffle pixel_unshuffle repeat reshape roll select slice "
        "split split_with_sizes squeeze stack t transpose unbind unfold unsafe_split unsqueeze view",
        "_fused_rms_norm _log_softmax _native_batch_norm_legit_no_training _prelu_kernel _safe_softmax _softmax "
        "_to_copy clone contiguous cudnn_batch_norm hardsigmoid hardswish leaky_relu miopen_batch_norm mish "
        "native_batch_norm native_dropout native_group_norm native_layer_norm silu",
        "_adaptive_avg_pool2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d col2im im2col "
        "reflection_pad2d replication_pad2d upsample_bicubic2d upsample_bilinear2d upsample_nearest2d",
    )
)
VIEWS = {"_reshape_alias", "_unsafe_view", "reshape", "view"}
#: Where the stride, padding and dilation of sliding kernels are among the arguments.
SLIDES = {"convolution": (3, 4, 5), "max_pool2d_with_indices": (2, 3, 4), "avg_pool2d": (2, 3, None)}
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the factors begin
REDUCTIONS = {"amax", "amin", "mean", "sum"}
MIXING = {*SLIDES, *MIXES, *PRODUCTS, *REDUCTIONS}


class Places(TorchDispatchMode):
    """Follows where values are from while a model runs.

    Args:
        images: (1, C, H, W), what the model is called with.
        running: names of the modules that are running, innermost last.
    """

    def __init__(self, images: Tensor, running: Sequence[str] = ()):
        super().__init__()
        rows, columns = (torch.arange(side, device=images.device) + 0.5 for side in images.shape[-2:])
        self.known = WeakTensorKeyDictionary()
        #: How many operators mixed cells on the way from the image to a tensor.
        self.steps = WeakTensorKeyDictionary()
        self.known[images] = torch.complex(*torch.meshgrid(rows, columns, indexing="ij")).expand(images.shape)
        self.running = running
        #: Operators that lost places, and modules in which they did.
        self.lost: list[tuple[str, str]] = []

    def of(self, tensor: Tensor) -> Tensor | None:
        """The places (row + column * i) of a tensor's values, in its shape; None where they were lost or never were.

        NaN stands for what is from no place, such as a class token, infinity for padding.
        """
        return self.known.get(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.follow(func, func.overloadpacket.__name__, args, kwargs, result)
        return result

    def follow(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Finds the places of what an operator returned."""
        inputs = [x for x in tensors_in(args) if x in self.known]
        results = [x for x in tensors_in(result) if x.is_floating_point()]
        if not inputs or not results:
            return
        before = self.known.get(results[0])  # of what is overwritten
        source = self._most_faithful(inputs) if torch.Tag.pointwise in func.tags else inputs[0]
        stem = name.removesuffix("_")
        places = self._places(func, stem, args, kwargs, source, inputs, result)
        if places is None:
            name = name if func.namespace == "aten" else func.name()
            self.lost.append((name, self.running[-1] if self.running else ""))
        for tensor, where in zip(results, places or [None] * len(results), strict=False):
            if where is None:
                self.known.pop(tensor, None)
            else:
                self.known[tensor] = where.expand(tensor.shape)
                self.steps[tensor] = self.steps.get(source, 0) + (stem in MIXING)
        if func._schema.is_mutable and not (before is not None and places and same(before, places[0])):
            self._forget_others(name, results[0])

    def _forget_others(self, name: str, written: Tensor) -> None:
        """What shares memory with a tensor into which values from elsewhere were written is no longer where it was."""
        memory = written.untyped_storage().data_ptr()
        others = [x for x in self.known if x is not written and x.untyped_storage().data_ptr() == memory]
        for other in others:
            del self.known[other]
        self.lost.append((name, self.running[-1] if self.running else ""))

    def _places(
        self, func: Any, name: str, args: Any, kwargs: Any, source: Tensor, inputs: Sequence[Tensor], result: Any
    ) -> list[Tensor] | None:
        first = self.known.get(args[0]) if isinstance(args[0], Tensor) else None
        if name in MOVES:
            return self._move(func, name, args, kwargs)
        if name == "copy":
            source = self.known.get(args[1])
            return None if source is None else [source]
        if name in KEEPS:
            return None if first is None else [first]
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name] :][:2]
            return [multiply(self.known.get(a), self.known.get(b))]
        if name in REDUCTIONS and first is not None:
            return _reduce(first, args, kwargs, result)
        if name in SLIDES and first is not None:
            return [slide(first, tensors_in(result)[0].shape, name, args)]
        if name in MIXES and first is not None:
            return [_mix(first, lambda x: func(x, *args[1:], **kwargs))]
        if torch.Tag.pointwise in func.tags:
            return [join([self.known[x] for x in (source, *inputs)], result.shape)]
        return None

    def _most_faithful(self, inputs: Sequence[Tensor]) -> Tensor:
        """Of what is added or multiplied value by value, the tensor whose places hold for the result.

        It is the one of which fewest operators have mixed cells: a map, not what was added to it of other cells. One
        that says next to nothing, such as a mean by which a map is scaled, is none.
        """
        if len(inputs) == 1:
            return inputs[0]
        extents = [extent(self.known[x]) for x in inputs]
        telling = [x for x, far in zip(inputs, extents, strict=True) if far >= max(extents) / 2]
        return min(telling, key=lambda x: self.steps.get(x, 0))

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
        def places_of(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor  # an index
            known = self.known.get(tensor)
            return torch.full((), NOWHERE, device=tensor.device).expand(tensor.shape) if known is None else known

        if name == "constant_pad_nd":
            args = (*args[:2], OUTSIDE)
        moved = tree_map_only(Tensor, places_of, args)
        if name in VIEWS:  # places have strides of their own
            return [moved[0].reshape(moved[1])]
        return tensors_in(func(*moved, **kwargs))


def multiply(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Places of a product of matrices: those of the rows of one, or of the columns of the other.

    Cells times weights are where the cells are, and so are attention weights times values, and queries times keys: of
    two factors that come from the image, it is the one that is summed over what lies in one place.
    """
    if a is not None and (b is None or not varies(a, -1)):
        return middle(a, -1)
    if b is not None and (a is None or not varies(b, -2)):
        return middle(b, -2)
    return middle(a, -1) * NOWHERE  # a sum over places on both sides, such as attention among channels


def slide(places: Tensor, shape: Sequence[int], name: str, args: Any) -> Tensor:
    """Places of a convolution's or pooling's cells: those under the middle of the kernel.

    Where that is padding, the cell is where the first of the `stride` values is that it stands for: a patch may lie
    partly beyond the image.
    """
    spatial = len(shape) - 2
    stride, padding, dilation = (
        _per_side(args[i] if i is not None and i < len(args) else default, spatial)
        for i, default in zip(SLIDES[name], ((), 0, 1), strict=True)
    )
    kernel = args[1].shape[2:] if name == "convolution" else _per_side(args[1], spatial)
    transposed = name == "convolution" and args[6]
    places = middle(places, 1)
    for i in range(spatial):
        reach = ((kernel[i] - 1) * dilation[i]) / 2 - padding[i]
        step = stride[i] if stride else kernel[i]
        if step == 1 and reach == 0 and not transposed:
            continue
        at = torch.arange(shape[i + 2], device=places.device, dtype=torch.float32)
        if transposed:
            places = sample(places, i + 2, (at - reach) / step)
        else:
            first = at * step + math.ceil(max(0.0, reach - (step - 1) / 2))
            middles, firsts = (sample(places, i + 2, x) for x in (at * step + reach, first))
            places = torch.where(middles.isfinite(), middles, firsts)
    return places.expand(shape)


def sample(places: Tensor, dim: int, at: Tensor) -> Tensor:
    """Places at fractions of indices along a dimension, in straight lines between and beyond them.

    Between a place and padding, it is the place.
    """
    last = places.shape[dim] - 1
    low = at.floor().clamp(0, max(0, last - 1)).long()
    below, above = places.index_select(dim, low), places.index_select(dim, (low + 1).clamp(max=last))
    shape = [-1 if d == dim else 1 for d in range(places.ndim)]
    share = (at - low).view(shape)
    between = below + (above - below) * share
    nearest = torch.where(share < 0.5, below, above)
    other = torch.where(share < 0.5, above, below)
    between = torch.where(between.isfinite(), between, torch.where(nearest.isfinite(), nearest, other))
    return torch.where(share == 0, below, torch.where(share == 1, above, between))


def middle(places: Tensor, dims: int | Sequence[int]) -> Tensor:
    """The mean of places along dimensions, which stay as 1; of what is padding or has none, there is none."""
    dims = [dims] if isinstance(dims, int) else list(dims)
    places = distinct(places, dims)
    if math.prod(places.shape[d] for d in dims) == 1:
        return places
    finite = places.isfinite()
    count = finite.sum(dims, keepdim=True)
    mean = torch.where(finite, places, 0).sum(dims, keepdim=True) / count
    return torch.where(count > 0, mean, torch.where(places.isinf().any(dims, keepdim=True), OUTSIDE, NOWHERE))


def distinct(places: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """The same, of size 1 along those dimensions over which it was only expanded."""
    for dim in range(places.ndim) if dims is None else dims:
        if places.stride(dim) == 0 and places.shape[dim] > 1:
            places = places.narrow(dim, 0, 1)
    return places


def varies(places: Tensor, dim: int) -> bool:
    """Whether places differ along a dimension."""
    places = distinct(places, (dim,))
    return places.shape[dim] > 1 and not same(places, middle(places, dim).expand(places.shape))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether places are equal, to a hundredth of a pixel; what is nowhere or outside equals any other."""
    far = (a - b).abs() > 0.01  # not true of NaN
    return not bool((far & a.isfinite() & b.isfinite()).any())


def join(places: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The first of several places, value by value, and the next where it is none."""
    joined, *others = (p.expand(shape) for p in places)
    for other in others:
        if not bool(distinct(joined).isfinite().all()):
            joined = torch.where(joined.isfinite() | ~other.isfinite(), joined, other)
    return joined


def extent(places: Tensor) -> float:
    """How far places are apart, in pixels down and across."""
    found = distinct(places)
    found = torch.view_as_real(found[found.isfinite()])
    return float((found.amax(0) - found.amin(0)).sum()) if len(found) else 0.0


def _reduce(places: Tensor, args: Any, kwargs: Any, result: Any) -> list[Tensor]:
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = range(places.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted((d % places.ndim for d in dims), reverse=True)
    reduced = middle(places, dims)
    if result.ndim < places.ndim:
        for dim in dims:
            reduced = reduced.squeeze(dim)
    return [reduced]


def _mix(places: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Places of linear combinations of neighbours, padding left out."""
    finite = places.isfinite()
    known = torch.where(finite, places, 0)
    weights = function(finite.float())
    mixed = torch.complex(function(known.real), function(known.imag)) / weights
    return torch.where(weights > 1e-3, mixed, OUTSIDE)


def _per_side(value: Any, spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


def tensors_in(values: Any) -> list[Tensor]:
    """Tensors among the arguments or results of an operator."""
    if isinstance(values, Tensor):
        return [values]
    return [x for value in values for x in tensors_in(value)] if isinstance(values, (list, tuple)) else []


def told(lost: Sequence[tuple[str, str]]) -> str:
    """Which operators lost places, and in which modules, in words; the last ones of many."""
    found = [f"{name} in {module or 'the model'}" for name, module in dict.fromkeys(lost)]
    return ", ".join(["..."] * (len(found) > 3) + found[-3:])


@contextmanager
def modules_running(model: nn.Module) -> Iterator[list[str]]:
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
