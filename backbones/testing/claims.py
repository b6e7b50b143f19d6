"""What an architecture says of its parts: in which order they come, and which of them decay."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

from ..backbone import Backbone
from ..weights import is_new
from .common import Build, hooked, owner_of, parameters_of, random_images, require, some

_IN_TURN = "let freezable() return the stem, then one entry per stage, in the order in which they run"
_IN_LAYERS = (
    "let group_matcher(), or stem_pattern and block_pattern, match the names of the stem, then those of the blocks, in "
    "the order in which they run"
)


def check_freezable(build: Build) -> None:
    """`freezable()` names each part that published weights hold, in the order in which they run."""
    model = build()
    entries = _entries(model)
    calls = _calls(model)
    left = _published(model) - {n for entry in entries for n in entry}
    last = max((calls[n] for entry in entries for n in entry if n in calls), default=0)
    # A norm at the end may learn where all else is frozen.
    left -= {n for n in left if calls.get(n, 0) > last and "norm" in type(owner_of(model, n)).__name__.lower()}
    require(
        not left,
        f"freezable() leaves out {len(left)} parameters, which learn whatever frozen_stages is: {some(left)}",
        _IN_TURN,
    )
    begins = [min((calls[n] for n in entry if n in calls), default=-1) for entry in entries]
    begun = [(i, begin) for i, begin in enumerate(begins) if begin >= 0]
    wrong = [(i, j) for (i, a), (j, b) in itertools.pairwise(begun) if a >= b]
    require(
        not wrong,
        f"entry {wrong[0][1]} of freezable() runs before entry {wrong[0][0]}" if wrong else "",
        _IN_TURN,
    )


def check_layer_decay(build: Build) -> None:
    """timm's layer-wise lr decay covers each parameter once, from the stem up; norms and biases do not decay."""
    model = build()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    groups = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    require(
        sorted(n for n, _ in groups) == sorted(names.values()),
        f"{len(names)} parameters learn, and the optimizer has {len(groups)}",
        "let group_matcher() name each layer by an expression, and return the same each time",
    )
    matcher = model.group_matcher()
    layers = group_parameters(model, matcher, reverse=True)
    unmatched = {n for n in _published(model) if n in names.values() and not _is_matched(n, matcher)}
    require(
        not unmatched,
        f"group_matcher() matches {len(unmatched)} parameters in no layer, which learn as fast as a new head: "
        f"{some(unmatched)}",
        _IN_LAYERS,
    )
    scale = {n: group["lr_scale"] for n, group in groups}
    require(
        len(set(scale.values())) > 2,
        f"there are {len(set(scale.values()))} lr scales in all: {sorted(set(scale.values()))}",
        _IN_LAYERS,
    )
    spans = [(min(found), max(found)) for entry in _entries(model) if (found := [layers[n] for n in entry])]
    wrong = [(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(spans)) if a[0] > b[0] or a[1] > b[1]]
    require(
        not wrong,
        f"group_matcher() has layers {wrong[0][1]} in entry {wrong[0][0]} of freezable(), and {wrong[0][2]} in the next"
        if wrong
        else "",
        _IN_LAYERS,
    )
    decaying = [n for n, group in groups if group["weight_decay"] and n.endswith("bias")]
    require(not decaying, f"weight decay on {some(decaying)}", "name such parameters in no_weight_decay()")


def check_no_weight_decay(build: Build) -> None:
    """Each name in `no_weight_decay()` is that of a parameter, which then does not decay."""
    model = build()
    told, names = model.no_weight_decay(), {n for n, _ in model.named_parameters()}
    wrong = set(told) - names
    ends = sorted({n for n in names for w in wrong if n.endswith(f".{w}")})
    require(
        not wrong,
        f"no_weight_decay() names {some(wrong)}, and there is no such parameter",
        f"give full names, such as {ends[0]}" if ends else "give names as named_parameters() has them, and no others",
    )


# --- how it is measured -------------------------------------------------------------------------------------


def _entries(model: Backbone) -> list[set[str]]:
    """Names of the parameters in each entry of `freezable()` that are in none before it."""
    names = {id(p): n for n, p in model.named_parameters()}
    entries: list[set[str]] = []
    for entry in model.freezable():
        held = {names[id(p)] for part in entry for p in parameters_of(part)}
        entries.append(held.difference(*entries))
    return entries


def _published(model: Backbone) -> set[str]:
    """Names of the parameters that are no new parts."""
    return {n for n, _ in model.named_parameters() if not is_new(n, model.new_parts)}


def _calls(model: Backbone) -> dict[str, int]:
    """When the layer that has a parameter is first called; of parameters of whole stages and models, none."""
    called: dict[str, int] = {}
    owners = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    layers = {
        n: m for n, m in owners.items() if not any(other.startswith(f"{n}.") or not n for other in owners if other != n)
    }
    with hooked(layers, lambda name, _: called.setdefault(name, len(called))), torch.no_grad():
        model(random_images(model, 64, 64))
    return {f"{n}.{p}": called[n] for n in called for p, _ in layers[n].named_parameters(recurse=False)}


def _is_matched(name: str, matcher: Any) -> bool:
    """Whether a parameter is in a layer; timm takes what none matches for parts of a head."""
    if not isinstance(matcher, Mapping):  # a function, which sorts every name
        return True
    specs = [spec if isinstance(spec, (list, tuple)) else [(spec,)] for spec in matcher.values() if spec is not None]
    return any(re.match(row[0], name) for spec in specs for row in spec)
