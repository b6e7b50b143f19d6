"""What timm's models really return: `python -m backbones_timm.measure` writes the table that the plugin ships.

Nothing is taken from `feature_info`: each model is built on the meta device and asked for its maps at sizes that
tell a floor from a ceil, a multiple of 32 from a multiple of 224, and a fixed size from any size.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_deprecated_models, model_entrypoint
from torch import Tensor, nn

from backbones import Weights
from backbones.layers import halve

from . import table
from .sources import sources
from .table import Facts, Level

# What timm's models can be told so that they take other sizes, the freest first.
_FLEXIBLE = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
# Sizes that no rule but the right one explains: odd at every stride, even but not divisible by 4, and small.
_SIZES = ((97, 250), (251, 333))
_SMALL = ((1, 1), (5, 300))
_MINIMA = (1, 2, 4, 8, 16, 32, 64, 96, 128)
# Multiples of the coarsest stride that windows of 7, 8, 12, ... patches need.
_WINDOWS = (2, 7, 8, 10, 12, 14, 16, 24)

# What a model that somebody registers with timm may lack, and no backbone can be made without.
_INTERFACE = ("feature_info", "forward_intermediates", "prune_intermediate_layers", "pretrained_cfg", "num_features")

Sizes = list[tuple[int, int, int]]


def create(name: str, pad_convolutions: bool = False, **options: Any) -> nn.Module:
    """timm's model; with `pad_convolutions`, its 3 x 3 convolutions and poolings lose no border.

    That is how segmentation-models-pytorch makes encoders of Inception and Xception. Poolings that round up are
    computed in a form that can be exported.
    """
    model = timm.create_model(name, **options)
    for path, module in [*model.named_modules()]:
        if _rounds_up(module):
            model.set_submodule(path, _Halve())
    for module in model.modules() if pad_convolutions else ():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and module.kernel_size in (3, (3, 3)):
            module.padding = 1 if isinstance(module, nn.MaxPool2d) else (1, 1)
    return model


def _rounds_up(module: nn.Module) -> bool:
    """Whether it is the pooling in the shortcuts of ResNet-D, whose size `torch.export` cannot prove."""
    if type(module) is not nn.AvgPool2d or not module.ceil_mode:
        return False
    return [to_2tuple(n) for n in (module.kernel_size, module.stride, module.padding)] == [(2, 2), (2, 2), (0, 0)]


class _Halve(nn.Module):
    """AvgPool2d(2, ceil_mode=True), for images of any size when exported."""

    def forward(self, x: Tensor) -> Tensor:
        return halve(x, "avg")


class Sibling(NamedTuple):
    """What models that are made of the same parts have in common.

    Args:
        rule: to which multiple, and to how many pixels at least, sides are padded; None for models of one size.
        output_strides: as in `Facts`.
        uses_all: whether the maps depend on all parameters.
        as_told: whether maps are what `feature_info` tells.
    """

    rule: tuple[int, int] | None
    output_strides: tuple[int, ...]
    uses_all: bool
    as_told: bool


def measure(name: str, siblings: dict[Any, Sibling] | None = None, **options: Any) -> Facts:
    """What a model's maps are, and how it takes images of other sizes than its own.

    Args:
        name: timm's name of the model.
        siblings: what was found of models made of the same parts, which differ in widths and depths, and not in
            how they take sizes.
        **options: what it is built with.
    """
    siblings = {} if siblings is None else siblings
    cfg = timm.get_pretrained_cfg(name)
    native = tuple(options.get("img_size") or (cfg.input_size[1:] if cfg else (224, 224)))
    known = {"name": name, "module": model_entrypoint(name).__module__.rpartition(".")[2]}
    kept, fixed, problem = None, None, ""
    for flexible, pad_convolutions in [*((f, False) for f in _FLEXIBLE), ({}, True)]:
        incomplete = not (kept or fixed) or (kept and 1 < len(kept["levels"]) < 4)
        if not incomplete or (kept and not pad_convolutions):
            continue
        try:
            probe = _Probe(name, pad_convolutions, {**options, **flexible})
        except TypeError:
            if flexible:
                continue  # the model has no such option
            raise
        known["params"] = round(sum(p.numel() for p in probe.model.parameters()) / 1e6, 2)
        if lacks := [part for part in _INTERFACE if not hasattr(probe.model, part)]:
            return Facts(**known, refused=f"it has no {' and no '.join(lacks)}, as timm's own models have")
        parts = _parts(probe.model)
        sibling = siblings.get(parts)
        try:
            if sibling and sibling.as_told:
                size, count, levels = native, len(_told(probe.model)), _by_stride(_told(probe.model))
            else:
                size, count, levels = _levels(probe, native)
        except Exception as error:  # whatever a model raises that cannot yield maps
            problem = problem or " ".join(f"{type(error).__name__}: {error}".split())
            continue
        if sibling is None:
            sibling = siblings[parts] = Sibling(
                rule=_rule(probe, levels),
                output_strides=_output_strides(probe, levels, size),
                uses_all=not _unused(probe, levels, size),
                as_told=levels == _by_stride(_told(probe.model)),
            )
        found = known | {
            "levels": tuple(levels),
            "blocks": count if len(levels) == 1 else 0,
            "options": flexible,
            "pad_convolutions": pad_convolutions,
            "output_strides": sibling.output_strides,
            "unused": () if sibling.uses_all else _unused(probe, levels, size),
        }
        if sibling.rule and not (kept and len(kept["levels"]) >= len(levels)):
            kept = found | {"divisor": sibling.rule[0], "minimum": sibling.rule[1]}
        fixed = fixed or found
    if kept or fixed:
        return _complete(kept or fixed | {"side": native})
    return Facts(**known, refused=problem)


def published(name: str, names: Sequence[str] | None = None) -> list[Weights]:
    """Weights that timm knows for a model, its default first.

    Args:
        name: timm's name of the model.
        names: names with tags to choose from; all of timm's unless given.
    """
    names = timm.list_pretrained(f"{name}.*") if names is None else names
    default = timm.get_pretrained_cfg(name)
    rows = [row for full in names if (row := _row(timm.get_pretrained_cfg(full)))]
    first = default.tag if default and default.has_weights else None
    return sorted(rows, key=lambda row: row.tag != first)


def _row(cfg: Any) -> Weights | None:
    if cfg.hf_hub_id:
        source = f"hf-hub:{cfg.hf_hub_id}" + (f"/{cfg.hf_hub_filename}" if cfg.hf_hub_filename else "")
    elif (cfg.url or "").startswith("https://") and not cfg.custom_load:
        source = cfg.url
    else:
        return None
    return Weights(
        tag=cfg.tag or "default",
        source=source,
        input_size=tuple(cfg.input_size),
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        interpolation=cfg.interpolation,
        license=cfg.license or "",
        classes=cfg.num_classes,
    )


def former() -> dict[str, str]:
    """Names that timm has given up and still builds, with the model, and its weights, that each now is."""
    names = get_deprecated_models().items()
    return {name: now for name, now in names if now and timm.is_model(now.partition(".")[0]) and _has_tag(now)}


def _has_tag(name: str) -> bool:
    model, _, tag = name.partition(".")
    return not tag or tag in [row.tag for row in published(model)]


class _Probe:
    """A model without memory, and the sizes of its maps."""

    def __init__(self, name: str, pad_convolutions: bool, options: Mapping[str, Any]):
        self.arguments = (name, pad_convolutions)
        self.options = {"in_chans": 3, **options}
        self.device = "meta"
        self.model = self.build()

    def build(self, **more: Any) -> nn.Module:
        with torch.device(self.device):
            return create(*self.arguments, **self.options, **more).eval()

    def maps(
        self, height: int, width: int, model: nn.Module | None = None, indices: Any = None, batch: int = 1
    ) -> list[Tensor]:
        images = torch.zeros(batch, 3, height, width, device=self.device)
        return (model or self.model).forward_intermediates(
            images, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )

    def sizes(self, height: int, width: int, model: nn.Module | None = None, indices: Any = None) -> Sizes:
        with torch.no_grad():
            return [tuple(m.shape[1:]) for m in self.maps(height, width, model, indices)]


def _levels(probe: _Probe, native: Sequence[int]) -> tuple[tuple[int, int], int, list[Level]]:
    """A size that the model takes, how many maps there are, and the last one of each stride from 4 to 32."""
    for device in ("meta", "cpu"):  # some look at values, which the meta device has not
        if device != probe.device:
            probe.device = device
            probe.model = probe.build()
        for size in ((256, 320), tuple(native)):
            try:
                sizes = probe.sizes(*size)
            except Exception as error:  # it takes no other size than its own, or none that 14 does not divide
                problem = error
                continue
            if found := _by_stride([(c, _stride(size, (h, w))) for c, h, w in sizes]):
                return size, len(sizes), found
            problem = ValueError(f"at {size[0]} x {size[1]} its maps are {_text(sizes)}, of no stride from 4 to 32")
        if not isinstance(problem, (RuntimeError, NotImplementedError)):
            break
    raise problem


def _text(sizes: Sizes) -> str:
    return ", ".join(f"{h} x {w}" for _, h, w in sizes)


def _stride(size: Sequence[int], map_size: Sequence[int]) -> int:
    """Pixels per cell; 0 where that is no integer, or differs between the sides."""
    strides = {side // cells if side % cells == 0 else 0 for side, cells in zip(size, map_size, strict=True)}
    return strides.pop() if len(strides) == 1 else 0


def _by_stride(maps: Sequence[tuple[int, int]]) -> list[Level]:
    """The last map of each stride from 4 to 32, finest first, of (channels, stride) by index."""
    found = {stride: Level(index, channels, stride) for index, (channels, stride) in enumerate(maps)}
    return [found[stride] for stride in sorted(found) if 4 <= stride <= 32]


def _told(model: nn.Module) -> list[tuple[int, int]]:
    return [(level["num_chs"], level["reduction"]) for level in model.feature_info]


def _rule(probe: _Probe, levels: Sequence[Level]) -> tuple[int, int] | None:
    """To which multiple, and to how many pixels at least, sides must be padded; None if nothing helps."""
    coarsest = math.lcm(*(level.stride for level in levels))
    powers = [2**n for n in range(7) if 2**n < coarsest]
    for divisor in [*powers, coarsest, *(coarsest * n for n in _WINDOWS)]:
        several = [(divisor + 1, divisor)] if divisor > 64 else []  # else all of the sizes are padded to the same
        if _holds(probe, levels, divisor, 1, [*several, *_SIZES]):
            return next(((divisor, m) for m in _MINIMA if _holds(probe, levels, divisor, m, _SMALL)), None)
    return None


def _holds(
    probe: _Probe, levels: Sequence[Level], divisor: int, minimum: int, sizes: Sequence[tuple[int, int]]
) -> bool:
    """Whether maps are exactly what is promised of images that are padded so."""
    by_index = sorted(levels)
    for size in sizes:
        height, width = (max(minimum, math.ceil(side / divisor) * divisor) for side in size)
        try:
            found = probe.sizes(height, width, indices=[level.index for level in by_index])
        except Exception:  # the model does not take this size
            return False
        if found != [(c, math.ceil(height / s), math.ceil(width / s)) for _, c, s in by_index]:
            return False
    return True


def _parts(model: nn.Module) -> Any:
    """What decides how a model takes sizes: its blocks, their geometry and the strides, not its widths and depths."""
    geometry = ("kernel_size", "stride", "padding", "ceil_mode", "window_size", "patch_size", "block_size")
    kinds = {
        (type(m).__qualname__, *values)
        for m in model.modules()
        if any(values := [str(getattr(m, g, "")) for g in geometry]) or next(m.children(), None)
    }
    return frozenset(kinds), tuple(dict.fromkeys(stride for _, stride in _told(model)))


def _complete(found: dict[str, Any]) -> Facts:
    levels = found["levels"]
    return Facts(**found, channels=tuple(s.channels for s in sources(levels, found["blocks"], "simple")))


def _unused(probe: _Probe, levels: Sequence[Level], size: Sequence[int]) -> tuple[str, ...]:
    """Parameters of a pruned model that its maps do not depend on."""
    indices = [level.index for level in levels]
    model = probe.build().train()  # in eval mode some keep tables of biases, and the graph does not lead back to them
    model.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    reached = _parameters_behind(probe.maps(*size, model, indices, batch=2))
    return tuple(n for n, p in model.named_parameters() if p.requires_grad and id(p) not in reached)


def _output_strides(probe: _Probe, levels: Sequence[Level], size: Sequence[int]) -> tuple[int, ...]:
    dilates = [level.stride for level in levels] == [4, 8, 16, 32] and _dilates(probe, 8, levels, size)
    return (8, 16, 32) if dilates else (32,)


def _dilates(probe: _Probe, output_stride: int, levels: Sequence[Level], size: Sequence[int]) -> bool:
    try:
        model = probe.build(output_stride=output_stride)
        sizes = probe.sizes(*size, model, [level.index for level in levels])
    except Exception:  # no such option, or not this value
        return False
    strides = [min(level.stride, output_stride) for level in levels]
    return [s[1:] for s in sizes] == [tuple(math.ceil(side / s) for side in size) for s in strides]


def _parameters_behind(maps: Sequence[Tensor]) -> set[int]:
    """Identities of all leaves that the maps were computed from."""
    nodes, seen, leaves = [m.grad_fn for m in maps], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return leaves


def _table(names: Sequence[str]) -> Iterator[Facts]:
    siblings: dict[Any, Sibling] = {}
    for i, name in enumerate(names):
        try:
            facts = measure(name, siblings)
        except Exception as error:
            raise RuntimeError(f"{name} could not be measured") from error
        print(f"{i + 1}/{len(names)} {name}: {facts.sizes}", flush=True)
        yield facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the models of the installed timm, and writes models.csv, weights.csv and former.csv."""
    parser = argparse.ArgumentParser(prog="python -m backbones_timm.measure", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="only these, printed and not written")
    parser.add_argument("--missing", action="store_true", help="keep what the table has, and add what it has not")
    args = parser.parse_args(arguments)
    if args.names:
        for name in args.names:
            print(measure(name))
        return
    names = timm.list_models()
    kept = {name: facts for name, facts in table.models().items() if name in names} if args.missing else {}
    kept |= {facts.name: facts for facts in _table([name for name in names if name not in kept])}
    table.write_models([kept[name] for name in names], timm.__version__)
    tagged: dict[str, list[str]] = {}
    for full in timm.list_pretrained():
        tagged.setdefault(full.partition(".")[0], []).append(full)
    table.write_former(former())
    table.write_weights({name: published(name, tagged.get(name, ())) for name in names})


if __name__ == "__main__":
    main()
