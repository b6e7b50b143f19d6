"""What is drawn at random: nothing in eval mode, what the rates ask for in training, and never a seed."""

import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..backbone import Backbone
from ..guard import guarded
from .common import Build, asked, random_images, require, seeded, with_drop_path

_RATE = 0.3  # under a half, so that what is kept is told from what is dropped
_USE_RATES = "hand the rates of Backbone.drop_path_rates(depths) to the blocks, one timm.layers.DropPath per branch"


def check_random_numbers(build: Build) -> None:
    """A call in eval mode draws no random number, and none in training sets a seed."""
    model = with_drop_path(build, 0.2)
    images = random_images(model, 64, 64)
    before = _states()
    with torch.no_grad():
        model.eval()(images)
    changed = [name for name, state in _states().items() if state != before[name]]
    require(
        not changed,
        f"a call in eval mode changes the random numbers of {' and '.join(changed)}, which the whole program shares",
        "draw nothing, and set no seed, where self.training is false",
    )
    model.train()
    after = []
    for seed in (1, 2):
        with seeded(seed):
            model(images)
            after.append(_states())
    same = [name for name, state in after[0].items() if state == after[1][name]]
    require(
        not same,
        f"after a call in training mode, the random numbers of {' and '.join(same)} go on alike whatever the seed was: "
        "it sets a seed, for the whole program",
        "leave seeds to the program; numbers that must not change belong into a buffer, drawn by the constructor",
    )


def check_rates_of_zero(build: Build) -> None:
    """With all rates at 0, which is what a backbone is built with, training mode draws nothing at random."""
    model = build(drop_path_rate=0.0).train()
    images = random_images(model, 64, 64)
    maps = []
    with torch.no_grad():
        for seed in (1, 2):
            with seeded(seed):
                maps.append(model(images))
    random = [i for i, (a, b) in enumerate(zip(*maps, strict=True)) if not torch.equal(a, b)]
    drops = sorted({f"{n} ({m})" for n, m in model.named_modules() if _drops(m)})
    require(
        not random,
        f"with all rates at 0, two calls in training mode give other maps {random}",
        "let every rate of dropout be 0 unless an option says more"
        + (f": {', '.join(drops[:4])}" if drops else ", and draw nothing else"),
    )


def check_drop_path(build: Build) -> None:
    """Drop path rises with depth to the rate asked for, does not depend on what is pruned, and is off in eval mode."""
    model = asked(build, drop_path_rate=_RATE).eval()
    images = random_images(model, 64, 64)[:1].expand(8, -1, -1, -1)  # alike, so that what differs was dropped
    with torch.no_grad():
        for a, b in zip(model(images), model(images), strict=True):
            require(
                torch.equal(a, b),
                f"with drop_path_rate={_RATE}, two calls in eval mode differ",
                "drop paths only where self.training is true, as timm.layers.DropPath does",
            )
    draws = _draws(model, images)
    rates = draws.rates
    require(
        bool(rates) or _varies(model, images),
        f"drop_path_rate={_RATE} changes nothing in training mode",
        f"{_USE_RATES}, or refuse the option with an InputError where there is nothing to drop",
    )
    told = f"with drop_path_rate={_RATE}, blocks drop their branches at {[round(rate, 3) for rate in rates]}, "
    require(
        not draws.twice,
        f"with drop_path_rate={_RATE}, {draws.twice} branches are dropped twice in a row, which keeps "
        f"{(1 - _RATE) ** 2:.2f} of them where {1 - _RATE:.2f} was asked for",
        "put one timm.layers.DropPath behind each branch",
    )
    require(max(rates, default=0.0) <= _RATE + 1e-4, told + "more than asked for", _USE_RATES)
    require(
        not rates or max(rates) >= _RATE / 2,
        told + "and none at the rate asked for",
        _USE_RATES,
    )
    require(rates == sorted(rates), told + "which does not ascend", _USE_RATES)
    spared = any(_spares(m) for m in model.modules()) or len(rates) < 3
    require(
        len(set(rates)) > 1 or spared,
        told + "which is the same at every depth",
        _USE_RATES,
    )
    fine = tuple(range(max(1, len(model.strides) - 1)))
    pruned = _draws(build(drop_path_rate=_RATE, out_indices=fine), images).rates
    require(
        pruned == rates[: len(pruned)],
        f"with out_indices={fine} drop path rates change from {rates} to {pruned}",
        "compute them from the whole depth, with Backbone.drop_path_rates",
    )


def check_side_effects(build: Build) -> None:
    """Building and calling a model changes nothing else of the program: its directory, warnings, log, dtype, ..."""
    for what in ("building it", "a call in eval mode", "a call in training mode"):
        with guarded() as changed:
            if what == "building it":
                model = build()
            else:
                model.train(what == "a call in training mode")(random_images(model, 64, 64))
        require(
            not changed,
            f"{what} changes {' and '.join(changed)} for the whole program",
            "leave that to the program; within a function, a context manager such as warnings.catch_warnings() or "
            "torch.no_grad() takes it back",
        )


# --- how it is measured -------------------------------------------------------------------------------------


def _states() -> dict[str, Any]:
    numpy: Any = np.random.get_state()  # noqa: NPY002  (the one that all share)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (numpy[1].tobytes(), numpy[2]),
        "Python": random.getstate(),
    }


class _Draws(TorchDispatchMode):
    """Sees the random numbers that are drawn one for each image or for the whole batch, and what they are used for.

    rates: shares of images that are dropped, in the order of the calls.
    twice: how often what had just been dropped in part was dropped in part again.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self.rates: list[float] = []
        self.twice = 0
        self._uniform: dict[int, Tensor] = {}  # kept, so that no other tensor is given the same id
        self._masks: dict[int, Tensor] = {}
        self._masked: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(function.overloadpacket.__name__, args, out)
        return out

    def _see(self, name: str, args: Any, out: Tensor) -> None:
        inputs = [a for a in args if isinstance(a, Tensor)]
        number = next((a for a in args[1:] if isinstance(a, (int, float))), None)
        one_per_image = out.numel() == out.shape[0] if out.ndim else True
        if name in ("bernoulli", "bernoulli_") and one_per_image and number is not None:
            self._draw(1 - number, out)
        elif name in ("rand", "rand_like", "uniform", "uniform_") and one_per_image:
            self._uniform[id(out)] = out
        elif any(id(a) in self._uniform for a in inputs):
            if number is None:  # a view, as autograd makes one of whatever is drawn
                self._uniform[id(out)] = out
            elif name in ("add", "add_"):  # to be rounded down
                self._draw(1 - number, out)
            elif name in ("lt", "le", "gt", "ge"):
                self._draw(min(number, 1 - number), out)
        elif any(id(a) in self._masks for a in inputs):
            if name in ("mul", "mul_") and not all(id(a) in self._masks for a in inputs):
                self.twice += any(id(a) in self._masked for a in inputs)
                self._masked[id(out)] = out
            else:  # scaled, rounded down, cast, reshaped
                self._masks[id(out)] = out

    def _draw(self, rate: float, mask: Tensor) -> None:
        self.rates.append(rate)
        self._masks[id(mask)] = mask


def _draws(model: Backbone, images: Tensor) -> _Draws:
    with seeded(0), torch.no_grad(), _Draws() as draws:
        model.train()(images)
    return draws


def _varies(model: Backbone, images: Tensor) -> bool:
    """Whether two calls in training mode differ, as they do where something is drawn in another way."""
    maps = []
    for seed in range(8):
        with seeded(seed), torch.no_grad():
            maps.append(model.train()(images))
    return any(not torch.equal(a, b) for other in maps[1:] for a, b in zip(maps[0], other, strict=True))


def _spares(module: nn.Module) -> bool:
    """Whether it is a block's drop path of rate 0, or a block that has one."""
    named = re.compile(r"drop_?path|drop_?prob|stochastic_?depth", re.IGNORECASE)
    if named.search(type(module).__name__):
        return getattr(module, "drop_prob", getattr(module, "p", None)) == 0
    return any(
        named.search(name) and (isinstance(value, nn.Identity) or (isinstance(value, float) and value == 0))
        for name, value in (*module.named_children(), *vars(module).items())
    )


def _drops(module: nn.Module) -> bool:
    """Whether it is a dropout of some rate."""
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return "drop" in type(module).__name__.lower() and isinstance(rate, float) and rate > 0
