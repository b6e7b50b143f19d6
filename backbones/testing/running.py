"""The conformance kit: what every backbone promises, as plain check functions.

A check takes `build`, a function that returns a fresh backbone for the options it is given, and raises
`CheckFailed` where the promise is broken. `check_backbone` runs them all; `parametrize_backbones` makes them
tests of pytest; `check_plugin` looks at all that one distribution has installed.
"""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..backbone import Backbone
from ..errors import InputError, PluginError
from ..registry import backbone_info, build_backbone, list_backbones, plugins

__all__ = [
    "CHECKS",
    "SLOW_CHECKS",
    "CheckFailed",
    "CheckResult",
    "check_backbone",
    "check_plugin",
    "parametrize_backbones",
    "smallest_of_each_family",
]

Build = Callable[..., Backbone]
Check = Callable[[Build], None]


class CheckFailed(AssertionError):
    """A broken promise: what was expected, what came, and how to mend it."""


class _Skipped(Exception):
    """A check that does not apply, or not here."""


@dataclass(frozen=True)
class CheckResult:
    """What came of one check.

    Args:
        backbone: whom it was about.
        check: name of the check.
        outcome: `passed`, `failed`, `skipped`, or `expected` for a failure that the caller announced.
        message: why, unless it passed.
        seconds: how long it took.
    """

    backbone: str
    check: str
    outcome: str
    message: str
    seconds: float


# --- entry points -------------------------------------------------------------------------------------------


def check_backbone(
    backbone: str | nn.Module | Build,
    expected_failures: Mapping[str, str] | None = None,
    slow: bool = True,
    report: Callable[[CheckResult], None] | None = None,
) -> list[CheckResult]:
    """Run every check on one backbone and keep each result.

    Args:
        backbone: a name; a function or class that takes the options common to all backbones; or a module,
            for which checks that need it built with other options are skipped.
        expected_failures: check name to the reason why it may fail. One that passes all the same is a failure.
        slow: also run the checks that take minutes: compile and two processes.
        report: called with each result as it comes.

    Raises:
        InputError: `expected_failures` names no check.
    """
    expected = dict(expected_failures or {})
    if unknown := expected.keys() - CHECKS.keys():
        raise InputError(f"expected_failures: there is no check {min(unknown)!r}; choose from {', '.join(CHECKS)}")
    name, build = _subject(backbone)
    results = []
    for check in CHECKS:
        if not slow and check in SLOW_CHECKS:
            continue
        results.append(_run(name, check, build, expected.get(check)))
        if report:
            report(results[-1])
    return results


def parametrize_backbones(
    names: Iterable[str | Build],
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    slow_marks: Any = (),
):
    """Decorator for pytest: the test is run once per backbone and check, as `test(name, check)`.

        @parametrize_backbones(["mynet_s"])
        def test_contract(name, check):
            check(name)

    Args:
        names: backbones as `build_backbone` takes them, or functions or classes that build one.
        expected_failures: name to check to reason; those are marked `xfail`, strictly.
        slow_marks: marks of the checks that take minutes, such as `pytest.mark.slow`.
    """
    import pytest

    cases = []
    for name in names:
        for check in CHECKS:
            marks = [slow_marks] if check in SLOW_CHECKS and slow_marks != () else []
            called = _subject(name)[0]
            if reason := (expected_failures or {}).get(called, {}).get(check):
                marks.append(pytest.mark.xfail(reason=reason, strict=True))
            cases.append(pytest.param(name, partial(_check_or_skip, check), id=f"{called}-{check}", marks=marks))
    return pytest.mark.parametrize(("name", "check"), cases)


def check_plugin(
    distribution: str, slow: bool = True, report: Callable[[CheckResult], None] | None = None
) -> list[CheckResult]:
    """Check how a distribution's plugins load, each spec against its model, and the smallest model of each family.

    Args:
        distribution: what was `pip install`ed, or a plugin's namespace.
        slow: as for `check_backbone`.
        report: called with each result as it comes.

    Raises:
        PluginError: nothing of that name is installed.
    """
    owned = [p for p in plugins() if distribution in (p.distribution, p.namespace)]
    if not owned:
        known = ", ".join(sorted({p.distribution for p in plugins() if p.distribution}))
        raise PluginError(f"no plugin comes from {distribution!r}; installed: {known}")
    results = []

    def add(result: CheckResult) -> None:
        results.append(result)
        if report:
            report(result)

    for plugin in owned:
        add(_run(plugin.namespace, "plugin_loads", partial(_check_plugin_loads, plugin), None))
        add(_run(plugin.namespace, "top_module_imports_no_torch", partial(_check_no_torch, plugin), None))
        names = list_backbones(plugin=plugin.namespace)
        for info in map(backbone_info, names):
            add(_run(info.canonical_name, "spec_matches_model", partial(_check_spec, info), None))
        for name in smallest_of_each_family(names):
            check_backbone(backbone_info(name).canonical_name, slow=slow, report=add)
    return results


def smallest_of_each_family(names: Iterable[str]) -> list[str]:
    """One backbone per family, the one with the fewest parameters: what there is to check in little time."""
    infos = {name: backbone_info(name) for name in names}
    by_size = sorted(infos, key=lambda name: -(infos[name].params or math.inf))
    return sorted({infos[name].family: name for name in by_size}.values())


# --- checks -------------------------------------------------------------------------------------------------


def check_shapes(build: Build) -> None:
    """Maps are a list of NCHW tensors with the declared channels, at the declared strides, finest first."""
    model = build().eval()
    strides, channels = list(model.strides), list(model.out_channels)
    _require(
        strides == sorted(set(strides)) and len(strides) == len(channels),
        f"strides {strides} and channels {channels} should be as many, and strides ascend",
        "give one stride per entry of channels, finest first",
    )
    with torch.no_grad():
        maps = model(_images(model, 128, 192))
    _require(
        isinstance(maps, (list, tuple)) and all(isinstance(m, Tensor) for m in maps),
        f"the forward should return a list of tensors, and returned {type(maps).__name__}",
        "return one NCHW map per stride",
    )
    for m, expected in zip(maps, _expected_shapes(model, 2, 128, 192), strict=len(maps) == len(strides)):
        _require(
            tuple(m.shape) == expected,
            f"expected a map (B, C, H, W) of {expected}, got {tuple(m.shape)}",
            "declare the channels and strides that the maps have, and return them channels first",
        )
    _require(len(maps) == len(strides), f"expected {len(strides)} maps, got {len(maps)}", "return one map per stride")


def check_feature_info(build: Build) -> None:
    """`feature_info`, `out_channels` and `strides` agree before the first forward, whatever is asked for."""
    full = build()
    count = len(full.strides)
    for indices in (None, (0,), tuple(range(count)), (-1,), 1):
        model = build(out_indices=indices)
        chosen = range(count)[-1:] if indices in ((-1,), 1) else (0,) if indices == (0,) else range(count)
        told = (model.feature_info.channels(), model.feature_info.reduction())
        _require(
            told == (model.out_channels, model.strides)
            and told == ([full.out_channels[i] for i in chosen], [full.strides[i] for i in chosen]),
            f"with out_indices={indices}, feature_info tells channels and strides {told}, the model "
            f"{(model.out_channels, model.strides)}",
            "pass out_indices on to Backbone.__init__, which fills feature_info in",
        )
    for wrong in ((count,), (-count - 1,), (), 0):
        try:
            build(out_indices=wrong)
        except InputError:
            continue
        _fail(f"out_indices={wrong!r} should be refused, and was taken", "pass out_indices on to Backbone.__init__")


def check_any_size(build: Build) -> None:
    """Every map is ceil(H / stride) x ceil(W / stride), finite, for sizes of all kinds, in any order."""
    model = build().eval()
    for height, width in [(224, 224), (250, 333), (97, 161), (33, 65), (5, 300), (1, 1), (224, 224)]:
        with torch.no_grad():
            maps = model(_images(model, height, width))
        for m, expected in zip(maps, _expected_shapes(model, 2, height, width), strict=True):
            _require(
                tuple(m.shape) == expected,
                f"images of {height} x {width}: expected a map of {expected}, got {tuple(m.shape)}",
                "pad what a stage cannot divide (size_divisor, or backbones.layers.pad_to_multiple); the base class "
                "crops",
            )
            _require(bool(m.isfinite().all()), f"images of {height} x {width} give values that are not finite", "")


def check_out_indices(build: Build) -> None:
    """Maps of a subset equal those of the full pyramid, and stages beyond the last are not built."""
    full = build().eval()
    count = len(full.strides)
    images = _images(full, 70, 90)
    with torch.no_grad():
        maps = full(images)
    for indices in [(0,), tuple(range(1, count)), (0, count - 1)]:
        part = build(out_indices=indices).eval()
        extra = part.state_dict().keys() - full.state_dict().keys()
        _require(
            not extra,
            f"with out_indices={indices} there are parameters that the full model lacks: {_some(extra)}",
            "name parts by their index in the full pyramid",
        )
        part.load_state_dict(full.state_dict(), strict=False)
        with torch.no_grad():
            chosen = part(images)
        for i, m in zip(indices, chosen, strict=True):
            _require_close(m, maps[i], f"map {i} with out_indices={indices} differs from that of the full pyramid")
        if indices[-1] < count - 1:
            _require(
                _count(part) < _count(full),
                f"with out_indices={indices} no fewer parameters are built: {_count(part):,}",
                "make stages lazily and pass them through Backbone.wanted",
            )


def check_batch_independence(build: Build) -> None:
    """An image's maps do not depend on what else is in the batch."""
    model = build().eval()
    images = _images(model, 65, 80)
    with torch.no_grad():
        for both, alone in zip(model(images), model(images[1:]), strict=True):
            _require_close(both[1:], alone, "maps of an image alone and in a batch differ", tolerance=1e-4)


def check_calls_are_independent(build: Build) -> None:
    """In eval mode the same images give the same maps; no call changes its images or what an earlier one returned."""
    model = build().eval()
    images = _images(model, 64, 64)
    kept = images.clone()
    with torch.no_grad():
        first = model(images)
        copies = [m.clone() for m in first]
        model(torch.randn_like(images))
        again = model(images)
    _require(torch.equal(images, kept), "the images were overwritten", "do not write in place to what comes in")
    for a, b, c in zip(first, copies, again, strict=True):
        _require(
            torch.equal(a, b), "a second call changed the maps of the first", "return no buffer that is used again"
        )
        _require(torch.equal(b, c), "the same images gave different maps", "draw nothing at random in eval mode")


def check_drop_path(build: Build) -> None:
    """Drop path rises with depth, does not depend on what is pruned, and is off in eval mode."""
    model = build(drop_path_rate=0.5).eval()
    images = torch.randn(8, model.in_chans, 64, 64)  # so many that chance will not make two calls equal
    with torch.no_grad():
        for a, b in zip(model(images), model(images), strict=True):
            _require(
                torch.equal(a, b),
                "with drop_path_rate=0.5, two calls in eval mode differ",
                "drop paths only where self.training is true, as timm.layers.DropPath does",
            )
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    _require(rates == sorted(rates), f"drop path rates do not ascend: {rates}", "use Backbone.drop_path_rates")
    part = build(drop_path_rate=0.5, out_indices=(0,))
    pruned = [m.drop_prob for m in part.modules() if isinstance(m, DropPath)]
    _require(
        pruned == rates[: len(pruned)],
        f"with out_indices=(0,) drop path rates change from {rates} to {pruned}",
        "compute them from the whole depth, with Backbone.drop_path_rates",
    )


def check_gradients(build: Build) -> None:
    """Gradients of the maps reach every parameter that learns."""
    model = build()
    _disturb(model)  # branches whose last norm starts at zero let no gradient through at first
    sum(m.square().mean() for m in model(_images(model, 70, 90))).backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # A bias may have none for a reason: one that shifts all logits of a softmax alike changes nothing.
    missing = [n for n, p in learning.items() if p.grad is None or (p.ndim > 1 and not p.grad.any())]
    _require(
        not missing,
        f"{len(missing)} of {len(learning)} parameters get no gradient: {_some(missing)}",
        "build no part that the maps do not use: distributed training waits for its gradient",
    )


def check_frozen_stages(build: Build) -> None:
    """What `frozen_stages` freezes neither learns nor drifts, and the rest learns."""
    for frozen in (0, 1):
        model = build(frozen_stages=frozen, drop_path_rate=0.1)
        parts = [part for group in model.freezable()[: frozen + 1] for part in group]
        held = {id(p) for part in parts for p in _parameters(part)}
        names = {n for n, p in model.named_parameters() if id(p) in held}
        names |= {
            f"{n}.{b}"
            for n, m in model.named_modules()
            if any(m is inner for part in parts if isinstance(part, nn.Module) for inner in part.modules())
            for b, _ in m.named_buffers(recurse=False)
        }
        before = copy.deepcopy(model.state_dict())
        model.train()
        learning = [p for p in model.parameters() if p.requires_grad]
        _require(
            bool(learning) and bool(held),
            f"frozen_stages={frozen} freezes {len(held)} parameters, and leaves {len(learning)}",
            "let freezable() return the stem, then one entry per stage",
        )
        sum(m.square().mean() for m in model(_images(model, 64, 64))).backward()
        torch.optim.SGD(learning, lr=0.1).step()
        after = model.state_dict()
        moved = [n for n in names & after.keys() if not torch.equal(before[n], after[n])]
        _require(
            not moved,
            f"frozen_stages={frozen} froze {len(names)} tensors, and {len(moved)} of them moved: {_some(moved)}",
            "let freezable() name the modules that hold them, and keep no statistics outside of them",
        )
        others = [n for n, p in model.named_parameters() if p.requires_grad]
        _require(
            any(not torch.equal(before[n], after[n]) for n in others),
            f"with frozen_stages={frozen} nothing learns",
            "let freezable() return the stem, then one entry per stage",
        )


def check_norm_eval(build: Build) -> None:
    """With `norm_eval`, BatchNorm statistics stay as they are in training."""
    model = build(norm_eval=True).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad():
        model(_images(model, 64, 64))
    moved = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
    _require(
        not moved, f"norm_eval=True, and these statistics moved: {_some(moved)}", "override train() only to extend"
    )


def check_state_dict(build: Build) -> None:
    """Saved and loaded into a fresh model, a state gives the same maps."""
    model = build()
    _disturb(model)
    model.train()
    with torch.no_grad():
        model(_images(model, 64, 64))  # statistics move
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    images = _images(model, 64, 64)
    with torch.no_grad():
        for a, b in zip(model.eval()(images), other.eval()(images), strict=True):
            _require(
                torch.equal(a, b),
                "a model with the loaded state gives other maps",
                "keep all that decides the maps in parameters and persistent buffers",
            )


def check_in_chans(build: Build) -> None:
    """Images with other than three channels are taken where `in_chans` says so."""
    for channels in (1, 5):
        model = build(in_chans=channels).eval()
        with torch.no_grad():
            maps = model(torch.randn(1, channels, 40, 40))
        widths = [m.shape[1] for m in maps]
        _require(widths == model.out_channels, f"in_chans={channels}: maps of widths {widths}", "use self.in_chans")


def check_checkpointing(build: Build) -> None:
    """Activation checkpointing changes no gradient."""
    gradients = []
    for checkpointing in (False, True):
        model = build(checkpointing=checkpointing, drop_path_rate=0.2)
        with _seeded(1):
            sum(m.square().mean() for m in model(torch.randn(2, model.in_chans, 64, 64))).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        what = f"with checkpointing=True, the gradient of {name} differs"
        _require_close(gradients[1][name], gradient, what, tolerance=1e-4)


def check_layer_decay(build: Build) -> None:
    """timm's layer-wise lr decay covers each parameter once, lowest in the stem; norms and biases do not decay."""
    model = build()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    _require(
        sorted(n for n, _ in groups) == sorted(names.values()),
        f"{len(names)} parameters are in {len(groups)} places of the optimizer",
        "let group_matcher()'s expressions match each parameter's name",
    )
    scale = {n: group["lr_scale"] for n, group in groups}
    stem = {names[id(p)] for part in model.freezable()[0] for p in _parameters(part)}
    if stem and len(model.freezable()) > 1:
        _require(
            {scale[n] for n in stem} == {min(scale.values())} and len(set(scale.values())) > 2,
            f"the stem's lr scales are {sorted({scale[n] for n in stem})}, all scales {sorted(set(scale.values()))}",
            "let group_matcher() sort the stem first and the blocks in the order in which they run",
        )
    decaying = [n for n, group in groups if group["weight_decay"] and n.endswith("bias")]
    _require(not decaying, f"weight decay on {_some(decaying)}", "name such parameters in no_weight_decay()")


def check_dtypes(build: Build) -> None:
    """bfloat16, float16 and float64 models return finite maps of their dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = build().eval().to(dtype)
        with torch.no_grad():
            maps = model(_images(model, 64, 64).to(dtype))
        kinds = {m.dtype for m in maps}
        _require(kinds == {dtype}, f"a model in {dtype} returns {kinds}", "make tensors with the dtype of the images")
        _require(all(bool(m.isfinite().all()) for m in maps), f"in {dtype} maps are not finite", "")


def check_devices(build: Build) -> None:
    """The model runs where it is moved to, and nothing of it is left behind."""
    model = build().eval()
    images = _images(model, 97, 161)
    with torch.no_grad():
        expected = model(images)
        devices = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]
        for device in devices:
            maps = copy.deepcopy(model).to(device)(images.to(device))
            kinds = {m.device.type for m in maps}
            _require(kinds == {device}, f"on {device} the maps are on {kinds}", "make tensors on the images' device")
            if device == "cuda":
                for a, b in zip(expected, maps, strict=True):  # convolutions may run in TF32
                    _require_near(b.cpu(), a, 1e-2, "maps on the GPU differ from those on the CPU")


def check_autocast(build: Build) -> None:
    """Under autocast to bfloat16, maps stay close to those in float32."""
    model = build().eval()
    images = _images(model, 128, 128)
    with torch.no_grad():
        maps = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
    for a, b in zip(maps, mixed, strict=True):
        _require_near(b.float(), a, 0.1, "under autocast the maps are far from those in float32")


def check_copies(build: Build) -> None:
    """Deep copies and pickles give the same maps."""
    model = build().eval()
    images = _images(model, 50, 60)
    with torch.no_grad():
        maps = model(images)
        for how, other in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
            same = all(torch.equal(a, b) for a, b in zip(maps, other(images), strict=True))
            _require(same, f"a {how} gives other maps", "keep nothing in the model that refers to the original")


def check_classifier(build: Build) -> None:
    """`features_only=False` is a classifier with timm's interface."""
    try:
        model = build(features_only=False, num_classes=7).eval()
    except InputError as error:
        raise _Skipped(str(error)) from None
    images = _images(model, 70, 90)
    with torch.no_grad():
        logits = model(images)
        _require(logits.shape == (2, 7), f"expected logits of (2, 7), got {tuple(logits.shape)}", "")
        again = model.forward_head(model.forward_features(images))
        _require_close(again, logits, "forward_head(forward_features(x)) differs from forward(x)")
        model.reset_classifier(3)
        shape = tuple(model(images).shape)
        _require(shape == (2, 3), f"after reset_classifier(3), logits are {shape}", "")
        model.reset_classifier(0)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        _require_close(model(images), pooled, "after reset_classifier(0), the forward should return pooled features")


def check_export(build: Build) -> None:
    """`torch.export` gives one program for any batch, height and width."""
    model = build().eval()
    if model.size_divisor > 1 and not hasattr(torch.compiler, "is_exporting"):
        raise _Skipped("torch 2.6 cannot prove that a symbolic padding is not negative")
    height, width = (torch.export.Dim(n, min=65, max=2048) for n in ("height", "width"))
    shapes = {"images": {0: torch.export.Dim("batch", max=64), 2: height, 3: width}}
    program = torch.export.export(model, (_images(model, 200, 333),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for batch, *size in [(1, 224, 224), (3, 97, 161), (2, 128, 300)]:
            images = torch.randn(batch, model.in_chans, *size)
            for a, b in zip(model(images), program(images), strict=True):
                _require_close(b, a, f"the exported program differs from eager at {(batch, *size)}", tolerance=1e-4)


def check_compile(build: Build) -> None:
    """`torch.compile` takes the forward without a graph break and gives the same maps."""
    model = build().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in [(224, 224), (97, 161), (128, 300)]:
            images = _images(model, *size)
            for a, b in zip(model(images), compiled(images), strict=True):
                _require_close(b, a, f"the compiled model differs from eager at {size}", tolerance=1e-4)


def check_two_processes(build: Build) -> None:
    """Under DistributedDataParallel, two processes agree on every gradient."""
    import tempfile

    model = build()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/rendezvous", pickle.dumps(model), queue)
        processes = torch.multiprocessing.spawn(_train_on_one_of_two, arguments, nprocs=2, join=False)
        while not processes.join():
            pass
        sums = [queue.get(), queue.get()]
    _require(
        math.isclose(*sums, rel_tol=1e-6) and sums[0] > 0,
        f"the sums of all gradients are {sums[0]} and {sums[1]}",
        "use every parameter in every forward",
    )


#: Every check by name, in the order in which they run.
CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and name not in ("check_backbone", "check_plugin")
}
#: Those that take a minute or more.
SLOW_CHECKS = ("compile", "two_processes")


# --- how they run -------------------------------------------------------------------------------------------


def _subject(backbone: str | nn.Module | Build) -> tuple[str, Build]:
    """Its name, and a function that builds it anew, with the same random numbers each time."""
    if isinstance(backbone, str):
        return backbone, _same_every_time(partial(build_backbone, backbone))
    if isinstance(backbone, nn.Module):

        def build(**options: Any) -> Backbone:
            if options:
                raise _Skipped(f"a module cannot be built with {options}; pass a name or a function instead")
            return copy.deepcopy(backbone)

        return type(backbone).__name__, build
    return getattr(backbone, "__name__", repr(backbone)), _same_every_time(backbone)


def _same_every_time(make: Build) -> Build:
    def build(**options: Any) -> Backbone:
        with _seeded(0):
            return make(**options)

    return build


def _run(name: str, check: str, subject: Any, expected: str | None) -> CheckResult:
    start = time.perf_counter()
    outcome, message = "passed", ""
    try:
        with _seeded(0):
            CHECKS[check](subject) if check in CHECKS else subject()
    except _Skipped as skipped:
        outcome, message = "skipped", str(skipped)
    except CheckFailed as failure:
        outcome, message = "failed", str(failure)
    except Exception as error:  # whatever the backbone raises
        outcome, message = "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if expected is not None:
        outcome, message = {
            "failed": ("expected", f"{expected} ({message})"),
            "passed": ("failed", f"expected to fail ({expected}), and passed; take it off expected_failures"),
        }.get(outcome, (outcome, message))
    return CheckResult(name, check, outcome, message, round(time.perf_counter() - start, 2))


def _check_or_skip(check: str, backbone: str | nn.Module | Build) -> None:
    """One check as pytest wants it: failures raise, and what does not apply is skipped."""
    import pytest

    _, build = _subject(backbone)
    try:
        with _seeded(0):
            CHECKS[check](build)
    except _Skipped as skipped:
        pytest.skip(str(skipped))


def _check_plugin_loads(plugin: Any) -> None:
    _require(plugin.status == "ok", f"plugin {plugin.namespace} is {plugin.status}: {plugin.error}", "")


def _check_no_torch(plugin: Any) -> None:
    code = f"import sys, {plugin.module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # what this process finds, that one does
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    _require(
        done.returncode == 0,
        f"importing {plugin.module} " + (f"failed: {done.stderr}" if done.stderr else "imports torch"),
        "keep the top module to specs, and the model behind their entry",
    )


def _check_spec(info: Any) -> None:
    build = partial(build_backbone, info.canonical_name)
    with torch.device("meta"):
        build()  # compares channels and strides
        if info.params is None:
            return
        try:
            count = _count(build(features_only=False))
        except InputError:
            return
    _require(
        abs(count / 1e6 - info.params) <= max(0.01, 0.001 * info.params),
        f"the spec says {info.params} M parameters, and the classifier has {count:,}",
        "correct params",
    )


def _train_on_one_of_two(rank: int, address: str, pickled: bytes, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(pickle.loads(pickled))
    torch.manual_seed(rank)
    sum(m.square().mean() for m in model(torch.randn(2, model.module.in_chans, 64, 64))).backward()
    queue.put(sum(p.grad.double().abs().sum().item() for p in model.parameters()))
    torch.distributed.destroy_process_group()


# --- small things -------------------------------------------------------------------------------------------


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _images(model: Backbone, height: int, width: int) -> Tensor:
    return torch.randn(2, model.in_chans, height, width)


def _disturb(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.01)


def _expected_shapes(model: Backbone, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    return [
        (batch, c, math.ceil(height / s), math.ceil(width / s))
        for c, s in zip(model.out_channels, model.strides, strict=True)
    ]


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _fail(what: str, remedy: str) -> NoReturn:
    raise CheckFailed(what + (f". To mend it, {remedy}." if remedy else "."))


def _require(holds: bool, what: str, remedy: str) -> None:
    if not holds:
        _fail(what, remedy)


def _require_close(ours: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    _require(ours.shape == expected.shape, f"{what}: shapes {tuple(ours.shape)} and {tuple(expected.shape)}", "")
    worst = (ours - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    _require(worst <= tolerance, f"{what} by {worst:.1e} of the largest value, {tolerance:.0e} at most", "")


def _require_near(ours: Tensor, expected: Tensor, share: float, what: str) -> None:
    off = ((ours - expected).norm() / expected.norm()).item()
    _require(off <= share, f"{what}: by {off:.1%}, {share:.0%} at most", "")
