"""timm's optimizers, lookahead and second-order ones among them, and which parameter learns how fast."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from backbones.errors import InputError

from ..data.loading import mix
from ..models.base import HoldsBackbone
from ..options import nearest

LOOKAHEAD = "lookahead_"  # before the name of any optimizer
_LOOKAHEAD_OPTIONS = ("lookahead_alpha", "lookahead_k")


def check_optimizer(options: Mapping[str, Any]) -> None:
    """Raise InputError for an optimizer of a task's options that is unknown, or that does not take its own."""
    name, own = options["optimizer"], options["optimizer_options"] or {}
    known, single = list_optimizers(), name.lower().removeprefix(LOOKAHEAD)
    if single not in known:
        raise InputError(
            f"model.optimizer={name!r} is unknown; {nearest(single, known)}; each also after {LOOKAHEAD!r}"
        )
    try:
        _create(
            nn.Linear(1, 1), {**options, "lr": options["lr"] or 1.0, "weight_decay": options["weight_decay"] or 0.0}
        )
    except (TypeError, ValueError, AssertionError, LookupError) as error:
        raise InputError(f"model.optimizer={name!r}, optimizer_options={own}: {error}") from error
    for pattern, factor in (options.get("lr_multipliers") or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"model.lr_multipliers: {pattern!r} is no regular expression: {error}") from error
        if not 0 <= factor < float("inf"):
            raise InputError(f"model.lr_multipliers: {pattern!r}: {factor} must be at least 0")


def check_multipliers(model: nn.Module, multipliers: Mapping[str, float]) -> None:
    """Raise InputError for a pattern that is in the name of no parameter."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in multipliers:
        if not any(re.search(pattern, name) for name in names):
            raise InputError(
                f"model.lr_multipliers: {pattern!r} is in the name of no parameter, such as "
                f"{', '.join(names[:3])}; --print_groups lists them"
            )


def make_optimizer(model: HoldsBackbone, options: Mapping[str, Any], around: HoldsBackbone | None = None) -> Optimizer:
    """timm's optimizer; norms, biases and position tables do not decay, and layers have an `lr_scale` each.

    Args:
        model: what is trained, and what options name parameters of
        options: of `Task`
        around: a module with the model in it, if there is more to be trained
    """
    decay = options["layer_decay"] if options["layer_decay"] < 1 else None
    optimizer = _create(around or model, options, layer_decay=decay)
    factors = dict.fromkeys(model.backbone_parameters(), options["backbone_lr"]) if options["backbone_lr"] != 1 else {}
    for name, parameter in model.named_parameters():
        for pattern, factor in options["lr_multipliers"].items():
            if re.search(pattern, name):
                factors[parameter] = factors.get(parameter, 1.0) * factor
    if factors:
        optimizer.param_groups[:] = _split(optimizer.param_groups, factors)  # the list is the lookahead's, too
    if is_second_order(optimizer):
        _explain(optimizer, options)
    return optimizer


def is_second_order(optimizer: Optimizer) -> bool:
    """Whether it differentiates gradients, which must have a graph then."""
    return getattr(optimizer, "is_second_order", False)


def differentiable_twice(step: Callable[..., Any]) -> Callable[..., Any]:
    """A training step whose attention runs by the kernel that has second derivatives."""

    def differentiable(*arguments: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return step(*arguments)

    return differentiable


def _create(model: nn.Module, options: Mapping[str, Any], **more: Any) -> Optimizer:
    own = dict(options["optimizer_options"] or {})
    lookahead = {name: own.pop(name) for name in _LOOKAHEAD_OPTIONS if name in own}
    if lookahead and not options["optimizer"].lower().startswith(LOOKAHEAD):
        raise ValueError(f"{', '.join(lookahead)}: write {LOOKAHEAD}{options['optimizer']} for lookahead")
    optimizer = create_optimizer_v2(
        model, opt=options["optimizer"], lr=options["lr"], weight_decay=options["weight_decay"], **own, **more
    )
    if not 0 <= lookahead.get("lookahead_alpha", 0) <= 1 or lookahead.get("lookahead_k", 1) < 1:
        raise ValueError(f"{lookahead}: alpha is from 0 to 1, and k from 1")
    for group in optimizer.param_groups:
        group.update(lookahead)
    return optimizer


def _split(groups: list[dict[str, Any]], factors: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """Groups of parameters whose learning rates have one factor each; those without a factor first."""
    split: list[dict[str, Any]] = []
    for group in groups:
        rest = [p for p in group["params"] if factors.get(p, 1.0) == 1]
        split += [{**group, "params": rest}] if rest else []
    for group in groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            if factors.get(p, 1.0) != 1:
                by_factor.setdefault(factors[p], []).append(p)
        scale = group.get("lr_scale", 1.0)
        split += [{**group, "params": params, "lr_scale": f * scale} for f, params in by_factor.items()]
    return split


def _explain(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Have AdaHessian draw anew by the step, the same after a resume, and say which models it cannot train."""
    inner: Any = getattr(optimizer, "_base_optimizer", optimizer)
    differentiate = inner.set_hessian

    def set_hessian() -> None:
        first = next(inner.get_params())
        steps = max(state["hessian step"] for state in inner.state.values())
        inner.generator = torch.Generator(first.device).manual_seed(mix(options["seed"], steps))
        try:
            differentiate()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"model.optimizer={options['optimizer']!r} needs second derivatives, which a layer of this model has "
                f"not: {error}; choose another optimizer"
            ) from error

    inner.set_hessian = set_hessian
