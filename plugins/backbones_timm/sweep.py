"""Whether timm's models keep the promise: `python -m backbones_timm.sweep` builds the smallest of each module.

Each is called at 224 x 224, or the one size that it is built for, at 256 x 320 and at 250 x 333, here and by timm's
own `features_only=True`. Beside the sizes of the maps, their values are checked: an image's maps depend on its last
pixels, and on no other image.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from backbones import InputError, build_backbone
from backbones.layers import ceil_div

from . import table

STRIDES = (4, 8, 16, 32)
SIZES = ((256, 320), (250, 333))
# What models that are built for a size are built for, so that they take all of SIZES: windows of 8, then of 7 patches.
IMG_SIZES = ((256, 352), (448, 448))


@dataclass(frozen=True)
class Verdict:
    """What came of one model.

    Args:
        ours: "kept", "kept with img_size=...", or why the plugin refuses.
        timms: "kept", or what timm's own maps are or raise.
        difference: largest one between our maps and timm's, of strides that both have, over timm's largest value;
            None where timm has none or images are padded.
    """

    module: str
    name: str
    ours: str
    timms: str
    difference: float | None

    def __str__(self) -> str:
        difference = "" if self.difference is None else f" (maps differ by {self.difference:.0e})"
        return f"{self.module}: {self.name}: {self.ours} | timm: {self.timms}{difference}"


def smallest_of_each_module() -> dict[str, str]:
    """Module of timm to its model with the fewest parameters."""
    by_size = sorted(table.models().values(), key=lambda facts: -facts.params)
    return dict(sorted((facts.module, facts.name) for facts in {facts.module: facts for facts in by_size}.values()))


@torch.no_grad()
def judge(name: str) -> Verdict:
    """Builds a model both ways, and compares the maps with what is promised, and with each other.

    Sizes are those of the meta device, values those of the CPU.

    Raises:
        AssertionError: maps are other than promised, and nothing was said.
    """
    facts = table.models()[name]
    sizes = (facts.side or (224, 224), *SIZES)
    ours = "refused: " + facts.refused
    for options in ({}, *({"img_size": size} for size in IMG_SIZES if facts.side)):
        try:
            _where_it_runs(lambda options=options: _check_sizes(name, sizes[bool(options) :], options))
        except AssertionError as error:
            if not options:
                raise
            ours += f"; with {options}: {_words(error)}"
        except Exception as error:
            if not (options or isinstance(error, InputError)):
                raise
            ours = f"refused: {_words(error)}" if not options else f"{ours}; with {options}: {_words(error)}"
        else:
            ours = f"kept with img_size={options['img_size']}" if options else "kept"
            break
    if not facts.refused:
        model = build_backbone(f"timm/{name}").eval()
        for parameter in model.parameters():  # branches whose last norm starts at zero would hide what they see
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
        check(model, facts.side or (91, 125))
    return Verdict(facts.module, name, ours, _of_timm(name, sizes), _difference(name))


def _check_sizes(name: str, sizes: Sequence[Sequence[int]], options: Mapping[str, Any]) -> None:
    model = build_backbone(f"timm/{name}", **options).eval()
    for size in sizes:
        check(model, size, values=False)


def check(model: Callable[[Tensor], list[Tensor]], size: Sequence[int], values: bool = True) -> None:
    """Raises AssertionError where the maps of a backbone with four levels are not what is promised."""
    images = torch.randn(2 if values else 1, 3, *size)
    maps = model(images)
    shapes = [tuple(m.shape[1:]) for m in maps]
    expected = [(c, *(ceil_div(side, s) for side in size)) for c, s in zip(model.out_channels, STRIDES, strict=True)]
    assert shapes == expected, f"at {size} maps are {shapes}, not {expected}"
    if not values:
        return
    assert all(m.isfinite().all() for m in maps), f"at {size} values are not finite"
    one = images[:1].clone()
    alone = model(one)
    for a, b in zip(maps, alone, strict=True):
        worst = (a[:1] - b).abs().max() / b.abs().max().clamp(min=1e-6)
        assert worst < 1e-3, f"at {size} an image's maps change by {worst:.0e} with what else is in the batch"
    one[..., -4:, -4:] += 5 * torch.randn_like(one[..., -4:, -4:])
    for stride, a, b in zip(STRIDES, alone, model(one), strict=True):
        same = torch.equal(a[..., -1, -1], b[..., -1, -1])
        assert not same, f"at {size} the last cell at stride {stride} does not see the last pixels"


def _where_it_runs(function: Callable[[], Any]) -> Any:
    """On the meta device; of models that look at values, which it has not, on the CPU."""
    try:
        with torch.device("meta"):
            return function()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
    return function()


def _words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, InputError) else f"{type(error).__name__}: {words[:100]}"


def _of_timm(name: str, sizes: Sequence[Sequence[int]]) -> str:
    """What timm's own feature maps lack, at the first size where they lack anything."""
    try:
        return _where_it_runs(lambda: _lacks(timm.create_model(name, features_only=True).eval(), sizes)) or "kept"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"


def _lacks(model: nn.Module, sizes: Sequence[Sequence[int]]) -> str:
    for height, width in sizes:
        maps = model(torch.randn(1, 3, height, width))
        info = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
        exact = {
            stride
            for m, (channels, stride) in zip(maps, info, strict=True)
            if m.shape[1:] == (channels, ceil_div(height, stride), ceil_div(width, stride))
        }
        if not exact >= set(STRIDES):
            shapes = ", ".join("x".join(map(str, m.shape[1:])) for m in maps)
            return f"at {height} x {width} maps of {shapes}, told as strides {model.feature_info.reduction()}"
    return ""


def _difference(name: str) -> float | None:
    facts = table.models()[name]
    if facts.refused or facts.pad_convolutions:
        return None
    images = torch.randn(1, 3, *(facts.side or [math.lcm(facts.divisor, 32)] * 2))
    ours = build_backbone(f"timm/{name}", pyramid="plain").eval()
    try:
        model = timm.create_model(name, features_only=True, **facts.options).eval()
        share_weights(ours, model)
        theirs = dict(zip(model.feature_info.reduction(), model(images), strict=True))
    except Exception:  # it has no maps, which `_of_timm` tells
        return None
    pairs = [(m, theirs[s]) for s, m in zip(ours.strides, ours(images), strict=True) if s in theirs]
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def share_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives a `features_only=True` model of timm, where lists of modules are flattened, the weights of a backbone."""
    own = {key.removeprefix("model."): value for key, value in ours.state_dict().items()}
    names = {key: key.removeprefix("model.").removeprefix("body.") for key in theirs.state_dict()}
    flat = {re.sub(r"^([^.]+)\.", r"\1_", key): key for key in own}
    names = {key: name if name in own else flat.get(name) for key, name in names.items()}
    theirs.load_state_dict({key: own[name] for key, name in names.items() if name in own}, strict=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line per module of timm, and how many keep the promise; 1 if any breaks it without a word."""
    parser = argparse.ArgumentParser(prog="python -m backbones_timm.sweep", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="models; the smallest of each module unless given")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    verdicts, broken = [], 0
    for name in args.names or smallest_of_each_module().values():
        try:
            verdicts.append(judge(name))
        except Exception as error:  # maps other than promised, or an error that says nothing of sizes
            broken += 1
            print(f"{table.models()[name].module}: {name}: BROKEN: {type(error).__name__}: {error}", flush=True)
        else:
            print(verdicts[-1], flush=True)
    ours = [verdict.ours for verdict in verdicts]
    print(
        f"{len(verdicts) + broken} models in {time.perf_counter() - start:.0f} s: promise kept by "
        f"{ours.count('kept')}, with img_size by {sum(o.startswith('kept with') for o in ours)}, refused by "
        f"{sum(o.startswith('refused') for o in ours)}, broken by {broken}; by timm's features_only, kept by "
        f"{sum(v.timms == 'kept' for v in verdicts)}"
    )
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
