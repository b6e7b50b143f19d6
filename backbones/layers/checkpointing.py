"""Activation checkpointing that leaves the statistics of norms alone.

What is recomputed in the backward pass sees the same batch again, which would move running statistics twice a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint


def checkpoint(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)`, its activations recomputed in the backward pass; nothing else changes."""
    calls = 0

    def run(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1 or torch.compiler.is_compiling():
            return module(*args, **kwargs)
        with statistics_held(module):
            return module(*args, **kwargs)

    return torch_checkpoint(run, *args, use_reentrant=False)


@contextmanager
def statistics_held(model: nn.Module) -> Iterator[None]:
    """While it lasts, norms in `model` write their running statistics to copies."""
    norms = [module for module in model.modules() if has_statistics(module)]
    held = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        _hold(norm)
    try:
        yield
    finally:
        for norm, buffers in zip(norms, held, strict=True):
            norm._buffers.update(buffers)


def hold_statistics(model: nn.Module) -> None:
    """The same for a model of another library, which checkpoints by itself: whatever it runs in the backward pass.

    Norms that have been put in since the last call are found by the next one.
    """
    for module in model.modules():
        if has_statistics(module) and "_statistics_hooks" not in module.__dict__:
            module._statistics_hooks = (
                module.register_forward_pre_hook(_before),
                module.register_forward_hook(_after, always_call=True),
            )


def release_statistics(model: nn.Module) -> None:
    """Takes back what `hold_statistics` did."""
    for module in model.modules():
        for hook in module.__dict__.pop("_statistics_hooks", ()):
            hook.remove()


def has_statistics(module: nn.Module) -> bool:
    """Whether it is a norm that keeps running statistics, torch's own or another that calls them as torch does."""
    return isinstance(module._buffers.get("running_mean"), Tensor)


def _hold(norm: nn.Module) -> None:
    norm._buffers.update({name: b.clone() for name, b in norm._buffers.items() if isinstance(b, Tensor)})


def _before(norm: nn.Module, inputs: Any) -> None:
    # PyTorch has no public question for whether the backward pass is running; its own checkpointing asks this one.
    if norm.training and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        norm._held_buffers = dict(norm._buffers)
        _hold(norm)


def _after(norm: nn.Module, inputs: Any, output: Any) -> None:
    held = norm.__dict__.pop("_held_buffers", None)
    if held is not None:
        norm._buffers.update(held)
