"""What all checks share: how they fail, and the images and numbers that they need."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..backbone import Backbone

#: A function that returns a fresh backbone for the options it is given, the same one each time.
Build = Callable[..., Backbone]
#: Raises `CheckFailed` where a promise is broken.
Check = Callable[[Build], None]


class CheckFailed(AssertionError):
    """A broken promise: what was expected, what came, and how to mend it."""


class Skipped(Exception):
    """A check that does not apply, or not here."""


def fail(what: str, remedy: str) -> NoReturn:
    raise CheckFailed(what + (f". To mend it, {remedy}." if remedy else "."))


def require(holds: bool, what: str, remedy: str) -> None:
    if not holds:
        fail(what, remedy)


def require_close(ours: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    require(ours.shape == expected.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(expected.shape)}", "")
    worst = (ours - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    require(worst <= tolerance, f"{what} by {worst:.1e} of the largest value, {tolerance:.0e} at most", "")


def require_near(ours: Tensor, expected: Tensor, share: float, what: str) -> None:
    off = ((ours - expected).norm() / expected.norm()).item()
    require(off <= share, f"{what}: by {off:.1%}, {share:.0%} at most", "")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def random_images(model: Backbone, height: int, width: int) -> Tensor:
    return torch.randn(2, model.in_chans, height, width)


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


def parameters_of(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
