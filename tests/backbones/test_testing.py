"""The conformance kit finds each way to break the promise, by the check that is meant for it."""

import json
import re

import pytest
import torch
from torch import nn

import backbones
from backbones import Backbone, BackboneSpec, InputError, PluginError, registry
from backbones.cli import main
from backbones.discovery import Plugin
from backbones.testing import CHECKS, SLOW_CHECKS, check_backbone, check_plugin, parametrize_backbones


class Good(Backbone):
    """As a plugin author would write it."""

    size_divisor = 8

    def __init__(self, dims=(8, 12), **options):
        super().__init__(channels=dims, strides=(4, 8), **options)
        self.stem = nn.Sequential(nn.Conv2d(self.in_chans, dims[0], 4, 4), nn.BatchNorm2d(dims[0]))
        self.stages = nn.ModuleList(self.wanted(self.stage(*s) for s in ((dims[0], dims[0], 1), (*dims, 2))))

    def stage(self, in_chans, out_chans, stride):
        return nn.Sequential(nn.Conv2d(in_chans, out_chans, stride, stride), nn.BatchNorm2d(out_chans), nn.ReLU())


class WrongStride(Good):
    def stage(self, in_chans, out_chans, stride):
        return super().stage(in_chans, out_chans, 1)


class ChannelsLast(Good):
    def forward(self, images):
        return [m.permute(0, 2, 3, 1) for m in super().forward(images)]


class Floor(Good):
    size_divisor = 1


class SharedBetweenImages(Good):
    def forward_features(self, images):
        return [m - m.mean(0, keepdim=True) for m in super().forward_features(images)]


class FrozenMoves(Good):
    def train(self, mode=True):
        nn.Module.train(self, mode)  # statistics of what is frozen go on moving
        return self


class DropPathInEval(Good):
    def forward_features(self, images):
        return [m * (torch.rand(len(m), 1, 1, 1) >= self.drop_path_rate) for m in super().forward_features(images)]


class UnusedParameter(Good):
    def __init__(self, **options):
        super().__init__(**options)
        self.left_over = nn.Linear(3, 3)


class StateLost(Good):
    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward_features(self, images):
        if self.training:
            self.seen += 1
        return [m + self.seen for m in super().forward_features(images)]


class ChannelsLastParameters(Good):
    def __init__(self, **options):
        super().__init__(**options)
        self.to(memory_format=torch.channels_last)


class WeightWithoutCall(Good):
    def forward_features(self, images):
        conv, norm = self.stem
        x = norm(nn.functional.conv2d(images, conv.weight, conv.bias, conv.stride))
        return [x := stage(x) for stage in self.stages]


class CallsInTrainingAlone(Good):
    def forward_features(self, images):
        conv, norm = self.stem
        x = conv(images)
        if self.training:
            x = norm(x)
        else:
            statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            x = nn.functional.batch_norm(x, *statistics, eps=norm.eps)
        return [x := stage(x) for stage in self.stages]


class Overwrites(Good):
    def stage(self, in_chans, out_chans, stride):
        stage = super().stage(in_chans, out_chans, stride)
        stage[-1].inplace = True
        return stage


class OverwritesWithoutGradients(Good):
    def forward_features(self, images):
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            x = x.mul(2) if torch.is_grad_enabled() else x.mul_(2)
            maps.append(x)
        return maps


class Folds(Good):
    """Keeps weights with the norm folded in, by the version counters of what they are made of."""

    def stage(self, in_chans, out_chans, stride):
        return _Folding(*super().stage(in_chans, out_chans, stride))


class _Folding(nn.Sequential):
    def forward(self, x):
        conv, norm, activation = self
        if self.training or torch.is_grad_enabled():
            return activation(norm(conv(x)))
        made_of = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        versions = [(id(t), t._version) for t in made_of]
        if vars(self).get("versions") != versions:
            self.versions, scale = versions, norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = conv.weight * scale[:, None, None, None]
            self.folded = weight, (conv.bias - norm.running_mean) * scale + norm.bias
        conv(x[..., : conv.stride[0], : conv.stride[1]]), norm(x.new_zeros(1, len(norm.weight), 1, 1))  # seen by hooks
        return activation(nn.functional.conv2d(x, *self.folded, conv.stride))


class ReadsTheNorm(Good):
    def forward_features(self, images):
        x = self.stem(images) * (1 + 0 * self.stem[1].eps)
        return [x := stage(x) for stage in self.stages]


class CountsCalls(Good):
    def forward_features(self, images):
        self.calls = vars(self).get("calls", 0) + 1
        maps = super().forward_features(images)
        return [m + 0 for m in maps] if self.calls > 1 else maps


class CountsTwice(Good):
    def _run(self, stage, x):
        if not (self.checkpointing and self.training):
            return stage(x)
        return torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)


class FoldsTheOriginal(Good):
    def stage(self, in_chans, out_chans, stride):
        return _FoldsTheOriginal(*super().stage(in_chans, out_chans, stride))


class _FoldsTheOriginal(nn.Sequential):
    def __deepcopy__(self, memo):
        return self

    def prepare_for_inference(self):
        self[0].weight.data.mul_(2)
        return self


class StartsAtZero(Good):
    def stage(self, in_chans, out_chans, stride):
        stage = super().stage(in_chans, out_chans, stride)
        nn.init.zeros_(stage[1].weight)
        return stage


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


@pytest.mark.parametrize(
    ("wrong", "check", "message"),
    [
        (WrongStride, "shapes", r"map 1 .* is \(2, 12, 32, 48\), which is not stride 8; declare"),
        (ChannelsLast, "shapes", r"got \(2, 32, 48, 8\).*return them channels first"),
        (Floor, "any_size", r"map 0 .* is \(2, 8, 62, 83\), which is not stride 4; .*size_divisor"),
        (SharedBetweenImages, "batch_independence", "an image alone and in a batch differ"),
        (FrozenMoves, "frozen_stages", "of them moved: stem.1.num_batches_tracked"),
        (DropPathInEval, "drop_path", "two calls in eval mode differ.*self.training"),
        (UnusedParameter, "gradients", "2 of 14 parameters get no gradient: left_over.bias, left_over.weight"),
        (StateLost, "state_dict", "with the loaded state gives other maps.*persistent buffers"),
        (
            ChannelsLastParameters,
            "contiguous",
            r"2 of .* are not contiguous: stages.1.0.weight.*out of the constructor",
        ),
        (WeightWithoutCall, "every_module_is_called", "in training mode, 1 of 6 .* never ran: stem.0.*call the module"),
        (CallsInTrainingAlone, "every_module_is_called", "in eval mode, 1 of 6 .* never ran: stem.1.*call the module"),
        (Overwrites, "hooks", r"eval mode under no_grad.*2 modules .* overwritten later: stages.0.1, stages.1.1.*ReLU"),
        (OverwritesWithoutGradients, "hooks", "eval mode under no_grad.*overwritten later: stages.0, .*x = x [+] y"),
        (
            Folds,
            "written_parameters",
            r"after p.data.mul_\(\), maps \[0, 1\] differ from those of a fresh model.*\.data",
        ),
        (ReadsTheNorm, "frozen_norms", "'_Frozen' object has no attribute 'eps'"),
        (CountsCalls, "trace", "gives another graph the second time.*leave something behind"),
        (CountsTwice, "checkpointing", "6 buffers differ .*: stages.0.1.num_batches_tracked.*backbones.layers.Blocks"),
        (FoldsTheOriginal, "for_inference", "changed the model that it was given: its mode, stages.0.0.weight"),
    ],
)
def test_each_broken_promise_is_caught_by_the_check_meant_for_it(wrong, check, message):
    assert re.search(message, failures(wrong, checks=[check]).get(check, "it passed"))


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
    results = {r.check: r for r in check_backbone(Good(), slow=False)}
    assert results["shapes"].outcome == results["copies"].outcome == "passed"
    assert results["in_chans"].outcome == "skipped"
    assert "pass a name or a function" in results["in_chans"].message


def test_checks_leave_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_backbone(Good, slow=False)
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
    results = check_plugin("throwaway-good", slow=False)
    checks = {r.check: r for r in results}
    assert checks["plugin_loads"].outcome == "passed"
    assert checks["top_module_imports_no_torch"].outcome == "passed"
    broken = {r.check: r for r in check_plugin("broken_import", slow=False)}
    assert "No module named 'no_such_library'" in broken["plugin_loads"].message
    with pytest.raises(PluginError, match=r"no plugin comes from 'nobody'; installed: .*dense-backbones"):
        check_plugin("nobody")


def test_the_command_prints_a_table_and_the_number_of_checks(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    entry = f"{__name__}:Good"
    backbones.register(BackboneSpec(name="good", family="Good", entry=entry, channels=(8, 12), strides=(4, 8)))
    assert main(["check", "good", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "local/good"]
    assert ["any_size", "passed"] in [line.split() for line in lines]
    assert lines[-1].startswith(f"{len(CHECKS) - len(SLOW_CHECKS)} checks in ")
    assert lines[-1].endswith(f"{len(CHECKS) - len(SLOW_CHECKS)} passed")


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
        r'^TypeError: .*test_testing.py:\d+, in __init__: self.head = nn.Linear\(8, "ten"\)\)$', first.message
    )
    assert {(r.outcome, r.message) for r in others} == {("skipped", "it cannot be built")}


def test_a_failure_has_the_last_line_of_the_authors_own_code():
    (result,) = check_backbone(RaisesInForward, checks=["batch_independence"])
    line = r"return super\(\).forward_features\(images.reshape\(7, -1\)\)"
    place = rf"\(\S*test_testing.py:\d+, in forward_features: {line}\)$"
    assert re.search("^RuntimeError: .*" + place, result.message)


def test_the_command_takes_failures_that_are_expected(capsys, monkeypatch):
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    for name, model in (("floor", Floor), ("good", Good)):
        entry = f"{__name__}:{model.__name__}"
        backbones.register(BackboneSpec(name=name, family=name, entry=entry, channels=(8, 12), strides=(4, 8)))
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
