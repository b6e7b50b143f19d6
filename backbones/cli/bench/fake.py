"""Whether a model would run on a GPU, and what it asks of it, told without one.

The model runs on fake CUDA tensors: they have a shape, a dtype and a device, and no data.

- Faults: a tensor on the CPU meets one on the GPU, or the CPU waits for the GPU (`.item()`, `.cpu()`, `nonzero`, ...).
- Operations: what PyTorch's dispatcher runs, views and bare allocations aside; a GPU starts a kernel or a few for each.
- Bytes moved: those of all tensors that operations read and write, were nothing kept in a cache.

Attention counts as one operation that reads q, k, v and the mask and writes a result laid out as q is, as the flash and
memory-efficient kernels do; the CPU's own way of computing it would say nothing about a GPU. The second call is
counted, so that tables which a model keeps are there.
"""

import argparse
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.cli.output import print_hint, print_json, print_table
from backbones.discovery import describe
from backbones.layers.cache import TableCache

from .cases import Case, columns

# Not a GPU's work: they only name memory.
_FREE = {
    "aten._unsafe_view",
    "aten.detach",
    "aten.empty",
    "aten.empty_like",
    "aten.empty_strided",
    "aten.new_empty",
    "prim.device",
}


@dataclass(frozen=True)
class Asked:
    """What a model asks of a GPU in one forward pass, or why it would not run there as it should."""

    name: str
    library: str
    column: str
    dtype: str
    size: str
    operations: int | None = None
    gigabytes: float | None = None
    by_operation: dict[str, int] | None = None
    error: str = ""


def run(args: argparse.Namespace) -> int:
    """The command with `--device fake-cuda`; returns 1 if a model of ours has a fault."""
    load = Case(name="", size=(args.size[0], args.size[-1]), batch=args.batch or 8)
    # A GPU runs none of the others' operations one by one.
    versus = tuple(other for other in args.vs if other == "timm")
    every = [columns(name, load, versus, args.dtype) for name in args.names]  # all are checked before any is run
    # Layouts are not looked at: what is counted is what the model's code asks for.
    rows = [
        [ask(replace(case, channels_last=False)) for case in cases if case.cast or not case.channels_last]
        for cases in every
    ]
    failed = int(any(asked.error and asked.library == "ours" for row in rows for asked in row))
    where = f"fake CUDA, torch {torch.__version__}: forward, batch {load.batch}, {load.size[0]} x {load.size[1]}"
    if args.json:
        print_json({"machine": where, "results": [asdict(asked) for row in rows for asked in row]})
        return failed
    print(f"{where}; operations, GB read and written")
    names = list(dict.fromkeys((asked.column, asked.dtype) for row in rows for asked in row))
    table = []
    for row in rows:
        cells = {(a.column, a.dtype): "fault" if a.error else f"{a.operations}  {a.gigabytes:.2f}" for a in row}
        table.append([row[-1].name, row[-1].size, *(cells.get(name, "") for name in names)])
    print_table(["name", "size", *(f"{column} {dtype}" for column, dtype in names)], table)
    for asked in (asked for row in rows for asked in row if asked.error):
        print_hint(f"{asked.name}, {asked.column} {asked.dtype}: {asked.error}")
    return failed


def ask(case: Case) -> Asked:
    """Runs a case on fake CUDA tensors."""
    asked = Asked(case.name, case.library, case.column, case.dtype, "x".join(map(str, case.size)))
    try:
        counter = count(*case.build("cpu"), getattr(torch, case.dtype), case.for_inference, case.cast)
    except Exception as error:  # whatever a model raises
        return replace(asked, error=describe(error))
    return replace(
        asked,
        operations=sum(counter.operations.values()),
        gigabytes=round(counter.bytes / 1e9, 3),
        by_operation=dict(counter.operations.most_common()),
    )


def count(
    model: nn.Module, images: Tensor, dtype: torch.dtype, for_inference: bool = False, cast: bool = False
) -> "GPUWork":
    """What the second call of a model with images asks of a GPU; the model is left on fake tensors.

    Args:
        model: on the CPU, in float32.
        images: likewise.
        dtype: under autocast, unless one of the following casts weights and images to it.
        for_inference: what `backbones.for_inference` makes of the model.
        cast: `model.to(dtype)`.

    Raises:
        WouldWait: the CPU waits for the GPU, or feeds it.
        RuntimeError: PyTorch's own words for tensors on two devices.
    """
    import backbones

    work = GPUWork()
    mixed = dtype != torch.float32 and not (for_inference or cast)
    if cast:
        model.to(dtype)
    if for_inference:  # before the move: what it folds is values
        model = backbones.for_inference(model, dtype=None if dtype == torch.float32 else dtype)
    with FakeTensorMode(), _attention(work), _tables(), torch.no_grad():
        _move(model)
        images = torch.empty(images.shape, device="cuda", dtype=torch.float32 if mixed else dtype)
        with _autocast(dtype if mixed else None), work:
            for _ in range(2):
                work.operations.clear()
                work.bytes = 0
                model(images)
    return work


class WouldWait(RuntimeError):
    """A forward pass has the CPU wait for the GPU, or copies something to it at each call."""


class GPUWork(TorchDispatchMode):
    """Counts operations and the bytes that they move; raises at what a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.namespace}.{func.overloadpacket.__name__}"
        read = _tensors((args, kwargs))
        try:
            result = func(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise WouldWait(f"{error} makes the CPU wait for the GPU: what comes out depends on the data") from error
        written = _tensors(result)
        if len({t.device.type for t in (*read, *written) if t.ndim}) > 1:
            raise WouldWait(
                f"{name} of {', '.join(f'{tuple(t.shape)} on {t.device.type}' for t in read)} goes between CPU and GPU "
                "at each call"
            )
        if not func.is_view and name not in _FREE and any(t.is_cuda for t in (*read, *written)):
            self.add(name, (*read, *written))
        return result

    def add(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.operations[name] += 1
        self.bytes += sum(_numbers(t) * t.element_size() for t in tensors)


def _numbers(tensor: Tensor) -> int:
    """How many lie in memory: an expanded tensor repeats some of them."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _move(model: nn.Module) -> None:
    """Has fake CUDA tensors in place of all parameters and buffers; what is neither stays where it is."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(_like(value), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _like(buffer)


def _like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


@contextlib.contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast("cuda")`, which without a GPU switches itself off."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _tables() -> Any:
    """Has caches keep tables of fake tensors, for as long as this run: they are no use to any other."""
    kept: dict[Hashable, Any] = {}

    def get(cache: TableCache, key: Hashable, compute: Callable[[], Any]) -> Any:
        if (cache, key) not in kept:
            kept[cache, key] = compute()
        return kept[cache, key]

    return mock.patch.object(TableCache, "get", get)


def _attention(work: GPUWork) -> Any:
    """Replaces PyTorch's attention, which without a GPU finds no kernel for one."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
        given = [t for t in (query, key, value, attn_mask) if t is not None]
        if {t.device.type for t in given} != {"cuda"} or len({t.dtype for t in (query, key, value)}) > 1:
            raise RuntimeError(f"attention of {', '.join(f'{t.dtype} on {t.device.type}' for t in given)}")
        result = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        if value.shape[-1] == query.shape[-1]:
            result = torch.empty_like(query)
        work.add("scaled_dot_product_attention", (*given, result))
        return result

    return mock.patch("torch.nn.functional.scaled_dot_product_attention", attention)
