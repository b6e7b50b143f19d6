"""The page of installed plugins, checked anew."""

import re

import pytest

from backbones import PluginError, plugins
from backbones.cli import directory, main
from backbones.testing import CHECKS, CheckResult


@pytest.fixture
def checked(monkeypatch):
    """Which backbones are checked; what the kit is to say of one that it fails."""
    asked, failing = [], {}

    def check(name, slow):
        assert not slow
        asked.append(name)
        broken = failing.get(name, ())
        outcomes = {"builds": "passed", "classifier": "skipped"} | dict.fromkeys(broken, "failed")
        return [CheckResult(name, check, outcome, "", 0.0) for check, outcome in outcomes.items()]

    monkeypatch.setattr(directory, "check_backbone", check)
    return asked, failing


def rows(out):
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert lines[0] == f"| {' | '.join(directory.HEADER)} |"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_page_has_families_backbones_licences_and_the_kits_result(checked, capsys):
    assert main(["plugins", "mobilevit", "--markdown"]) == 0
    asked, _ = checked
    assert asked == ["mobilevit/mobilevit_xxs", "mobilevit/mobilevitv2_050"]
    captured = capsys.readouterr()
    (row,) = rows(captured.out)
    assert row[0] == "`mobilevit`"
    assert row[1].startswith("dense-backbones ")
    assert row[2:4] == [
        "[MobileViT](https://arxiv.org/abs/2110.02178), [MobileViTv2](https://arxiv.org/abs/2206.02680)",
        "10, `mobilevit_xxs` to `mobilevitv2_200`",
    ]
    assert row[4:] == ["Apache-2.0", "16, cvnets-license", "`mobilevit_xxs`, `mobilevitv2_050` pass"]
    assert "checking mobilevit/mobilevit_xxs" in captured.err


def test_of_a_catalogue_the_smallest_is_checked(checked, capsys):
    assert main(["plugins", "torchvision", "--markdown"]) == 0
    asked, _ = checked
    assert asked == ["torchvision/shufflenet_v2_x0_5"]
    (row,) = rows(capsys.readouterr().out)
    assert re.match(r"\d+: \[ConvNeXt\]", row[2])
    assert row[2].endswith(", ...")
    assert re.match(r"\d+, `shufflenet_v2_x0_5` to `", row[3])


def test_what_fails_is_named_and_is_an_exit_code(checked, capsys):
    _, failing = checked
    failing["mobilevit/mobilevitv2_050"] = ("export", "trace")
    assert main(["plugins", "mobilevit", "--markdown"]) == 1
    assert rows(capsys.readouterr().out)[0][-1] == "`mobilevit_xxs` passes; `mobilevitv2_050` fails `export`, `trace`"


def test_a_plugin_that_does_not_work_says_why(checked, throwaway, capsys, monkeypatch):
    monkeypatch.setenv("BACKBONES_BLOCK_PLUGINS", "throwaway-rival")
    for name, verdict, code in [
        ("throwaway-good", "`good_net` passes", 0),
        ("throwaway-broken-import", "broken: ModuleNotFoundError: No module named 'no_such_library'", 1),
        ("throwaway-rival", "blocked: not loaded: BACKBONES_BLOCK_PLUGINS names it", 0),
    ]:
        assert main(["plugins", name, "--markdown"]) == code
        assert rows(capsys.readouterr().out)[0][-1] == verdict


def test_a_throw_away_plugin_is_checked_by_the_kit_itself(throwaway, capsys, monkeypatch):
    monkeypatch.setattr("backbones.testing.running.CHECKS", {n: CHECKS[n] for n in ("builds", "shapes", "any_size")})
    assert main(["plugins", "throwaway-good", "--markdown"]) == 1  # it pads nothing, and floors odd sides
    row = rows(capsys.readouterr().out)[0]
    assert row[2:6] == ["Good", "3, `good_net` to `good_net_wide_32`", "not stated", ""]
    assert row[-1] == "`good/good_net` fails `any_size`"  # another plugin has a good_net, too


def test_plugins_are_chosen_by_namespace_or_distribution(capsys):
    assert [p.namespace for p in plugins("pvt")] == ["pvt"]
    assert {p.distribution for p in plugins("Dense_Backbones")} == {"dense-backbones"}
    assert main(["plugins", "pvt"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(PluginError, match="no plugin is called 'nobody'; installed: coatnet, "):
        plugins("nobody")
