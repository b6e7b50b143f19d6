"""Runs the checks, keeps each result, and makes them tests of pytest."""

import copy
import linecache
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..backbone import Backbone
from ..errors import InputError, PluginError
from ..guard import guarded
from ..registry import backbone_info, build_backbone, list_backbones, plugins
from . import claims, export, honesty, memory, numbers, processes, randomness, shapes, training, weights
from .common import Build, Check, CheckFailed, Skipped, seeded
from .plugins import PLUGIN_CHECKS, SPEC_CHECKS

#: Every check by name, in the order in which they run: each function `check_NAME` of these modules.
CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): function
    for kind in (shapes, numbers, randomness, training, claims, memory, weights, honesty, export, processes)
    for name, function in vars(kind).items()
    if name.startswith("check_")
}
#: Those that take a minute or more, or the network.
SLOW_CHECKS = ("compile", "two_processes", "weights_can_be_had")


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
    checks: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Run every check on one backbone and keep each result.

    Args:
        backbone: a name; a function or class that takes the options common to all backbones; or a module,
            for which checks that need it built with other options are skipped.
        expected_failures: check name to the reason why it may fail. One that passes all the same is a failure.
        slow: also run the checks that take minutes: compile and two processes.
        report: called with each result as it comes.
        checks: names of those to run; all unless given.

    Raises:
        InputError: `expected_failures` or `checks` names no check.
    """
    expected = dict(expected_failures or {})
    wanted = _wanted(CHECKS, checks, expected, slow)
    name, build = _subject(backbone)
    results: list[CheckResult] = []
    for check in wanted:
        if results and results[0].check == "builds" and results[0].outcome in ("failed", "expected"):
            result = CheckResult(name, check, "skipped", "it cannot be built", 0.0)
        else:
            result = _run(name, check, partial(CHECKS[check], build), expected)
        results.append(result)
        if report:
            report(result)
    return results


def parametrize_backbones(
    names: Iterable[str | Build],
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    slow_marks: Any = (),
    slow_checks: Iterable[str] = SLOW_CHECKS,
) -> Any:
    """Decorator for pytest: the test is run once per backbone and check, as `test(name, check)`.

        @parametrize_backbones(["mynet_s"])
        def test_contract(name, check):
            check(name)

    Args:
        names: backbones as `build_backbone` takes them, or functions or classes that build one.
        expected_failures: name to check to reason; those are marked `xfail`, strictly.
        slow_marks: marks of the checks that take minutes, such as `pytest.mark.slow`.
        slow_checks: names of those checks.
    """
    import pytest

    cases = []
    for name in names:
        for check in CHECKS:
            marks = [slow_marks] if check in slow_checks and slow_marks != () else []
            called = _subject(name)[0]
            if reason := (expected_failures or {}).get(called, {}).get(check):
                marks.append(pytest.mark.xfail(reason=reason, strict=True))
            cases.append(pytest.param(name, partial(_check_or_skip, check), id=f"{called}-{check}", marks=marks))
    return pytest.mark.parametrize(("name", "check"), cases)


def check_plugin(
    distribution: str,
    slow: bool = True,
    report: Callable[[CheckResult], None] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Check how a distribution's plugins load, each spec against its model, and the smallest model of each family.

    Args:
        distribution: what was `pip install`ed, or a plugin's namespace.
        slow: as for `check_backbone`.
        report: called with each result as it comes.
        expected_failures: as for `check_backbone`, of the plugin and of all its backbones.
        checks: as for `check_backbone`.

    Raises:
        PluginError: nothing of that name is installed.
        InputError: `expected_failures` or `checks` names no check.
    """
    expected = dict(expected_failures or {})
    wanted = _wanted({**PLUGIN_CHECKS, **SPEC_CHECKS, **CHECKS}, checks, expected, slow)
    owned = [p for p in plugins() if distribution in (p.distribution, p.namespace)]
    if not owned:
        known = ", ".join(sorted({p.distribution for p in plugins() if p.distribution}))
        raise PluginError(f"no plugin comes from {distribution!r}; installed: {known}")
    results = []

    def add(result: CheckResult) -> None:
        results.append(result)
        if report:
            report(result)

    def each(kind: Mapping[str, Callable[[Any], None]], name: str, subject: Any) -> None:
        for check in wanted:
            if check in kind:
                add(_run(name, check, partial(kind[check], subject), expected))

    of_models = [check for check in wanted if check in CHECKS]
    for plugin in owned:
        if plugin.status != "ok":
            each({"plugin_loads": PLUGIN_CHECKS["plugin_loads"]}, plugin.namespace, plugin)
            continue
        each(PLUGIN_CHECKS, plugin.namespace, plugin)
        names = list_backbones(plugin=plugin.namespace)
        for info in map(backbone_info, names):
            each(SPEC_CHECKS, info.canonical_name, info)
        for name in smallest_of_each_family(names) if of_models else ():
            reasons = {check: reason for check, reason in expected.items() if check in CHECKS}
            check_backbone(backbone_info(name).canonical_name, reasons, report=add, checks=of_models)
    return results


def smallest_of_each_family(names: Iterable[str]) -> list[str]:
    """One backbone per family, the one with the fewest parameters: what there is to check in little time."""
    infos = {name: backbone_info(name) for name in names}
    by_size = sorted(infos, key=lambda name: -(infos[name].params or math.inf))
    return sorted({infos[name].family: name for name in by_size}.values())


# --- how they run -------------------------------------------------------------------------------------------


def _subject(backbone: str | nn.Module | Build) -> tuple[str, Build]:
    """Its name, and a function that builds it anew, with the same random numbers each time."""
    if isinstance(backbone, str):
        return backbone, _same_every_time(partial(build_backbone, backbone))
    if isinstance(backbone, nn.Module):

        def build(**options: Any) -> Any:
            if options:
                raise Skipped(f"a module cannot be built with {options}; pass a name or a function instead")
            return copy.deepcopy(backbone)

        return type(backbone).__name__, build
    return getattr(backbone, "__name__", repr(backbone)), _same_every_time(backbone)


def _same_every_time(make: Build) -> Build:
    def build(**options: Any) -> Backbone:
        with seeded(0):
            return make(**options)

    return build


def _wanted(
    known: Mapping[str, Any], checks: Iterable[str] | None, expected: Mapping[str, str], slow: bool
) -> list[str]:
    """Names of the checks to run, in order; `InputError` where a name is none's."""
    chosen = set(known if checks is None else checks)
    for option, named in (("expected_failures", set(expected)), ("checks", chosen)):
        if unknown := named - known.keys():
            raise InputError(f"{option}: there is no check {min(unknown)!r}; choose from {', '.join(known)}")
    return [check for check in known if check in chosen and (slow or check not in SLOW_CHECKS)]


def _run(name: str, check: str, run: partial[None], expected: Mapping[str, str]) -> CheckResult:
    start = time.perf_counter()
    outcome, message = "passed", ""
    try:
        with seeded(0), guarded():  # what one check changes for the whole program must not fail the others
            run()
    except Skipped as skipped:
        outcome, message = "skipped", str(skipped)
    except CheckFailed as failure:
        outcome, message = "failed", " ".join(str(failure).split())
    except Exception as error:  # whatever the backbone raises
        promised = " ".join(str(run.func.__doc__).split())
        told = " ".join(f"{type(error).__name__}: {error}".split())
        outcome, message = "failed", f"{told}{_place(error)}. What was promised: {promised}"
    if check in expected:
        outcome, message = {
            "failed": ("expected", f"{expected[check]} ({message})"),
            "passed": ("failed", f"expected to fail ({expected[check]}), and passed; take it off expected_failures"),
        }.get(outcome, (outcome, message))
    return CheckResult(name, check, outcome, message, round(time.perf_counter() - start, 2))


def _place(error: BaseException) -> str:
    """The last line of the author's own code that an exception went through; empty if there is none."""
    frames = traceback.walk_tb(error.__traceback__)
    theirs = [(frame.f_code, line) for frame, line in frames if not _is_others(frame.f_globals.get("__name__", ""))]
    if not theirs:
        return ""
    code, line = theirs[-1]
    text = linecache.getline(code.co_filename, line).strip()
    return f" ({code.co_filename}:{line}, in {code.co_name}: {text})"


def _is_others(module: str) -> bool:
    """Whether a module is ours, Python's or of a library that authors call."""
    top = module.partition(".")[0]
    return top in ("backbones", "timm", "torch", "torchvision", "transformers") or top in sys.stdlib_module_names


def _check_or_skip(check: str, backbone: str | nn.Module | Build) -> None:
    """One check as pytest wants it: failures raise, and what does not apply is skipped."""
    import pytest

    _, build = _subject(backbone)
    try:
        with seeded(0), guarded():
            CHECKS[check](build)
    except Skipped as skipped:
        pytest.skip(str(skipped))
