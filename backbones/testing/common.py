"""What all checks share: how they fail, and the images and numbers that they need."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..errors import InputError

#: A function that returns a fresh backbone for the options it is given, the same one each time.
Build = Callable[..., Backbone]
#: Raises `CheckFailed` where a promise is broken.
Check = Callable[[Build], None]


class CheckFailed(AssertionError):
    """A broken promise: what was expected, what came, and how to mend it."""


class Skipped(Exception):
    """A check that does not apply, or not here."""


def fail(what: str, remedy: str) -> NoReturn:
    raise CheckFailed(f"{what}. To mend it, {remedy}.")


def require(holds: bool, what: str, remedy: str) -> None:
    if not holds:
        fail(what, remedy)


def require_close(ours: Tensor, expected: Tensor, what: str, remedy: str, tolerance: float = 1e-5) -> None:
    require(ours.shape == expected.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(expected.shape)}", remedy)
    worst = (ours - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    require(worst <= tolerance, f"{what} by {worst:.1e} of the largest value, {tolerance:.0e} at most", remedy)


def require_near(ours: Tensor, expected: Tensor, share: float, what: str, remedy: str) -> None:
    off = ((ours - expected).norm() / expected.norm()).item()
    require(off <= share, f"{what}: by {off:.1%}, {share:.0%} at most", remedy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While it lasts, random numbers of torch, numpy and Python are those of a seed; the caller's go on afterwards."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002  (the one that all share)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002  (the one that all share)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002  (the one that all share)
        random.setstate(states[1])


def random_images(model: Backbone, height: int, width: int) -> Tensor:
    return torch.randn(2, model.in_chans, height, width)


def called_in_eval(build: Build, height: int = 64, width: int = 64) -> tuple[Backbone, Tensor, list[Tensor]]:
    """A model in eval mode, images, and their maps."""
    model = build().eval()
    images = random_images(model, height, width)
    with torch.no_grad():
        return model, images, list(model(images))


def disturb(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.01)


def expected_shapes(model: Backbone, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    return [
        (batch, c, math.ceil(height / s), math.ceil(width / s))
        for c, s in zip(model.out_channels, model.strides, strict=True)
    ]


def loss_of(model: Backbone, images: Tensor) -> Tensor:
    """A number whose gradient reaches all that the maps depend on."""
    return torch.stack([m.square().mean() for m in model(images)]).sum()


def asked(build: Build, **options: Any) -> Backbone:
    """A model built with options that an architecture may refuse, as long as it says so."""
    try:
        return build(**options)
    except InputError as error:
        raise Skipped(str(error)) from None


def with_drop_path(build: Build, rate: float, **options: Any) -> Backbone:
    """A model with stochastic depth, where the architecture has it."""
    try:
        return build(drop_path_rate=rate, **options)
    except InputError:
        return build(**options)


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that has a parameter or a buffer."""
    return model.get_submodule(name.rpartition(".")[0])


def parameters_of(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@contextmanager
def hooked(modules: dict[str, nn.Module], see: Callable[[str, list[Tensor]], object]) -> Iterator[None]:
    """Forward hooks that are shown each module's name and the tensors that it took and returned."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, taken: Any, given: Any) -> None:  # one that returned anything would replace the output
            see(name, [*_tensors(taken), *_tensors(given)])

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
