"""What a forward pass keeps in memory: for the backward pass, and after it."""

import gc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backbone import Backbone
from ..layers import has_statistics
from .common import (
    Build,
    asked,
    fail,
    loss_of,
    owner_of,
    random_images,
    require,
    require_close,
    seeded,
    some,
    with_drop_path,
)

#: Bytes from which on what is kept is an activation, and no number that somebody wants to look at.
_LARGE = 1024


def check_nothing_is_kept(build: Build) -> None:
    """After a step of training, and after a call in eval mode, no activation is left in memory."""
    model = build()
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            _step(model)  # what is kept for good, such as tables of sizes, is made now
            with _Made() as made:
                _step(model)
        left = made.left(model)
        if not left:
            continue
        places = some(_places(model, left))
        fail(
            f"after {'a step of training' if training else 'a call in eval mode'}, {len(left)} of the tensors that it "
            f"computed, {sum(left.values()) / 1024:.0f} KB, are still in memory"
            + (f": in {places}" if places else ", outside of the model"),
            "keep no activation in an attribute, a list or a closure: hand it on as an argument, and leave looking at "
            "it to forward hooks",
        )


def check_checkpointing(build: Build) -> None:
    """Activation checkpointing keeps less for the backward pass, and changes no gradient and no statistic."""
    gradients, buffers = [], []
    make = partial(asked, partial(with_drop_path, build, 0.5))
    models = make(), make(checkpointing=True)
    images = random_images(models[0], 64, 64)
    plain, kept = (_saved_bytes(model, images) for model in models)
    require(
        kept <= 0.9 * plain,
        f"with checkpointing=True, {kept / 1024:.0f} KB are kept for the backward pass, and {plain / 1024:.0f} KB "
        "without",
        "put blocks into backbones.layers.Blocks, run parts by backbones.layers.checkpoint where self.checkpointing is "
        "true, or refuse the option in set_grad_checkpointing with an InputError",
    )
    models[1].set_grad_checkpointing(False)
    off = _saved_bytes(models[1], images)
    require(
        abs(off - plain) <= 0.01 * plain,
        f"after set_grad_checkpointing(False), {off / 1024:.0f} KB are kept for the backward pass, and "
        f"{plain / 1024:.0f} KB in a model built without",
        "let set_grad_checkpointing extend the base class's, and the forward ask self.checkpointing anew",
    )
    for model in (make(), make(checkpointing=True)):
        with seeded(1):
            loss_of(model, images).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        buffers.append({n: b.double() for n, b in model.named_buffers()})
    lost = gradients[0].keys() - gradients[1].keys()
    require(
        not lost,
        f"with checkpointing=True, there is no gradient of {some(lost)}",
        "recompute with use_reentrant=False, as backbones.layers.checkpoint does: the other way gives none where no "
        "input needs one",
    )
    for name, gradient in gradients[0].items():
        require_close(
            gradients[1][name],
            gradient,
            f"with checkpointing=True, the gradient of {name} differs",
            "recompute just what the forward pass computed, with the same random numbers: preserve_rng_state=True",
            tolerance=1e-4,
        )
    moved = [n for n, b in buffers[0].items() if not torch.allclose(b, buffers[1][n], rtol=1e-4, atol=1e-6)]
    require(
        not moved,
        f"after one step with checkpointing=True, {len(moved)} buffers differ from those without: {some(moved)}",
        _twice(model, moved),
    )


def _twice(model: Backbone, moved: list[str]) -> str:
    """How to keep statistics from moving in the second pass as well."""
    kinds = {type(owner).__name__ for owner in (owner_of(model, name) for name in moved) if not has_statistics(owner)}
    if kinds:
        return (
            f"let {some(kinds)} call its statistics running_mean and running_var, by which "
            "backbones.layers.checkpoint knows what to hold still in the second pass"
        )
    return (
        "recompute by backbones.layers.Blocks or backbones.layers.checkpoint, which hold the statistics of batch norms "
        "still in the second pass"
    )


# --- how it is measured -------------------------------------------------------------------------------------


def _step(model: Backbone) -> None:
    loss = loss_of(model, random_images(model, 64, 64))
    if loss.requires_grad:
        loss.backward()
        model.zero_grad()


class _Made(TorchDispatchMode):
    """Remembers the memory of every tensor that is made while it lasts, without keeping it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = StorageWeakRef(storage)
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._given and storage.nbytes() >= _LARGE:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def left(self, model: Backbone) -> dict[int, int]:
        """Of what was made and is neither the model's state nor a gradient, whatever is still there, and its bytes."""
        for collect in (lambda: None, gc.collect):
            collect()
            own = {s._cdata for t in (*model.parameters(), *model.buffers()) for s in _storages((t, t.grad))}
            left = {k: size for k, (r, size) in self._made.items() if k not in own and not r.expired()}
            if not left:
                break
        return left


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()


def _places(model: Backbone, left: Mapping[int, int]) -> Iterator[str]:
    """Attributes of the model's parts that hold any of that memory."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and any(s._cdata in left for s in _storages(value)):
                yield f"{name}.{attribute}".lstrip(".")


def _saved_bytes(model: Backbone, images: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and buffers left out."""
    own = {s._cdata for t in (*model.parameters(), *model.buffers()) for s in _storages(t)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update({s._cdata: s.nbytes() for s in _storages(tensor) if s._cdata not in own})
        return tensor

    with seeded(1), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, images)
    return sum(kept.values())
