"""How the conformance kit runs and reports; what it finds is in `tests/campaign/test_planted_faults.py`."""

import json
import re

import pytest
import torch
from planted.sound import Sound as Good
from torch import nn

import backbones
from backbones import BackboneSpec, InputError, PluginError, registry
from backbones.cli import main
from backbones.discovery import Plugin
from backbones.testing import CHECKS, SLOW_CHECKS, check_backbone, check_plugin, parametrize_backbones


class Floor(Good):
    size_divisor = 1


class StartsAtZero(Good):
    def __init__(self, **options):
        super().__init__(**options)
        for module in self.stages.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.weight)


def failures(backbone, **options):
    return {r.check: r.message for r in check_backbone(backbone, slow=False, **options) if r.outcome == "failed"}


def test_branches_that_start_at_zero_are_no_unused_parameters():
    CHECKS["gradients"](StartsAtZero)


def test_a_good_backbone_passes_every_quick_check():
    results = check_backbone(Good, slow=False)
    unmet = {r.check: r.message for r in results if r.outcome != "passed"}
    assert unmet == {} or (torch.__version__.startswith("2.6") and unmet.keys() == {"export"})  # see its message
    assert [r.check for r in results] == [check for check in CHECKS if check not in SLOW_CHECKS]


@pytest.mark.slow  # the compiler, and two processes that import torch
def test_a_good_backbone_passes_the_slow_checks():
    results = [r for r in check_backbone("pvt_v2_b0") if r.check in SLOW_CHECKS]
    assert [(r.outcome, r.message) for r in results] == [("passed", "")] * 2


def test_a_failure_that_was_announced_is_no_failure_and_a_pass_is():
    (result,) = check_backbone(Floor, {"any_size": "needs 8"}, checks=["any_size"])
    assert result.outcome == "expected"
    assert result.message.startswith("needs 8 (PluginError: Floor: map 0 of images (2, 3, 250, 333)")
    passed = failures(Good, expected_failures={"any_size": "needs 8"}, checks=["any_size"])
    assert "take it off expected_failures" in passed["any_size"]
    with pytest.raises(InputError, match="there is no check 'any_sise'; choose from builds, "):
        check_backbone(Good, {"any_sise": "typo"})
    with pytest.raises(InputError, match="checks: there is no check 'shape'"):
        check_backbone(Good, checks=["shape"])


def test_a_module_is_checked_as_far_as_it_can_be():
    results = {r.check: r for r in check_backbone(Good(), checks=["shapes", "in_chans", "copies"])}
    assert results["shapes"].outcome == results["copies"].outcome == "passed"
    assert results["in_chans"].outcome == "skipped"
    assert "pass a name or a function" in results["in_chans"].message


def test_checks_leave_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_backbone(Good, checks=["gradients", "random_numbers", "rates_of_zero", "drop_path"])
    assert torch.equal(torch.rand(2), expected)


class TestParametrized:
    @parametrize_backbones(["pvt_v2_b0"], slow_marks=pytest.mark.slow)
    def test_every_check_is_a_test(self, name, check):
        if check.args[0] in ("shapes", "feature_info"):
            check(name)

    def test_announced_failures_are_strict(self):
        mark = parametrize_backbones(["a", "b"], {"b": {"export": "no"}})
        marked = [case for case in mark.args[1] if case.marks]
        assert [case.id for case in marked] == ["b-export"]
        assert marked[0].marks[0].kwargs == {"reason": "no", "strict": True}


def test_plugins_are_checked_by_distribution_or_namespace(throwaway):
    named = ["plugin_loads", "top_module_imports_no_torch", "spec_matches_model", "shapes"]
    results = check_plugin("throwaway-good", checks=named)
    checks = {r.check: r for r in results}
    assert checks["plugin_loads"].outcome == "passed"
    assert checks["top_module_imports_no_torch"].outcome == "passed"
    broken = {r.check: r for r in check_plugin("broken_import", checks=named)}
    assert "No module named 'no_such_library'" in broken["plugin_loads"].message
    with pytest.raises(PluginError, match=r"no plugin comes from 'nobody'; installed: .*dense-backbones"):
        check_plugin("nobody")


def test_the_command_prints_a_table_and_the_number_of_checks(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    maps = {"channels": (8, 12, 16), "strides": (4, 8, 16)}
    backbones.register(BackboneSpec(name="good", family="Good", entry="planted.sound:Sound", **maps))
    monkeypatch.setattr("backbones.testing.running.CHECKS", {n: CHECKS[n] for n in ("any_size", *SLOW_CHECKS[:2])})
    assert main(["check", "good", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "local/good"]
    assert ["any_size", "passed"] in [line.split() for line in lines]
    assert lines[-1].startswith("1 checks in ")
    assert lines[-1].endswith(" s: 1 passed")


class Unbuildable(Good):
    def __init__(self, **options):
        super().__init__(**options)
        self.head = nn.Linear(8, "ten")


class RaisesInForward(Good):
    def forward_features(self, images):
        return super().forward_features(images.reshape(7, -1))


def test_what_cannot_be_built_is_told_once():
    first, *others = check_backbone(Unbuildable, slow=False)
    assert (first.check, first.outcome) == ("builds", "failed")
    assert re.search(
        r'^TypeError: .*test_testing.py:\d+, in __init__: self.head = nn.Linear\(8, "ten"\)\)', first.message
    )
    assert {(r.outcome, r.message) for r in others} == {("skipped", "it cannot be built")}


def test_a_failure_has_the_last_line_of_the_authors_own_code():
    (result,) = check_backbone(RaisesInForward, checks=["batch_independence"])
    line = r"return super\(\).forward_features\(images.reshape\(7, -1\)\)"
    place = rf"\(\S*test_testing.py:\d+, in forward_features: {line}\)"
    assert re.search(f"^RuntimeError: .*{place}. What was promised: An image's maps do not", result.message)


def test_the_command_takes_failures_that_are_expected(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    for name, model in (("floor", Floor), ("good", Good)):
        entry = f"{model.__module__}:{model.__name__}"
        maps = {"channels": (8, 12, 16), "strides": (4, 8, 16)}
        backbones.register(BackboneSpec(name=name, family=name, entry=entry, **maps))
    monkeypatch.setattr("backbones.testing.running.CHECKS", {n: CHECKS[n] for n in ("shapes", "any_size")})
    assert main(["check", "floor", "--expect", "any_size=needs 8", "--json"]) == 0
    assert [r["outcome"] for r in json.loads(capsys.readouterr().out)] == ["passed", "expected"]
    assert main(["check", "good", "floor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["backbone", "check", "outcome"],
        ["local/floor", "any_size", "failed"],
    ]
    assert main(["check", "floor", "--expect", "any_size"]) == 2
    assert "write CHECK=REASON" in capsys.readouterr().err


def test_the_command_fails_where_a_check_does(capsys, throwaway):
    assert main(["check", "--plugin", "broken_import", "--json"]) == 1
    (loads, *_) = json.loads(capsys.readouterr().out)
    assert (loads["check"], loads["outcome"]) == ("plugin_loads", "failed")
    assert main(["check"]) == 2
    assert "name the backbones to check" in capsys.readouterr().err
