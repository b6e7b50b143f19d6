"""What the README tells people to type works as it stands."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import backbones
from backbones import registry
from backbones.cli import main
from backbones.discovery import Plugin

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(containing: str, language: str = "python") -> str:
    """The one fenced block of the README that holds this text."""
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in b]
    return found


def test_detector_of_the_readme_trains():
    names = {"__name__": "readme"}
    exec(block("FasterRCNN").replace(", pretrained=True", "").replace("pvt_v2_b2", "pvt_v2_b0"), names)
    target = {"boxes": torch.tensor([[20.0, 30, 200, 120]]), "labels": torch.tensor([3])}
    model = names["model"]
    model.transform.min_size, model.transform.max_size = (160,), 200
    sum(model([torch.rand(3, 150, 220)], [target]).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_models_of_the_readme_take_any_size():
    code = block("build_classifier(").replace("vit_base_patch16", "vit_tiny_patch16").replace("pvt_v2_b2", "pvt_v2_b0")
    imports, *calls = [line for line in code.splitlines() if line]
    assert len(calls) == 3
    names = {}
    exec(imports, names)
    segmenter, detector, classifier = (eval(call, names).eval() for call in calls)
    detector.transform.min_size = (64,)
    image = torch.rand(1, 3, 50, 71)
    with torch.no_grad():
        assert segmenter(image).shape == (1, 150, 50, 71)
        assert detector(list(image))[0].keys() == {"boxes", "labels", "scores", "masks"}
        assert classifier(image).shape == (1, 100)


def test_plugin_of_the_readme_is_a_backbone(tmp_path, monkeypatch):
    package = tmp_path / "mynets"
    package.mkdir()
    (package / "__init__.py").write_text(block("# mynets/__init__.py"))
    (package / "mynet.py").write_text(block("# mynets/mynet.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    plugin = importlib.import_module("mynets")
    assert plugin.BACKBONES_API == 1
    (spec,) = plugin.register_backbones()
    backbones.register(spec)
    model = backbones.build_backbone("mynet_s", out_indices=(1, 3))
    assert [tuple(m.shape) for m in model(torch.rand(2, 3, 50, 71))] == [(2, 64, 7, 9), (2, 256, 2, 3)]


@pytest.mark.parametrize(
    ("section", "last"), [("Train something now", "backbones fit segmentation"), ("Run the tests", "pytest -n auto")]
)
def test_each_of_the_two_commands_is_complete_by_itself(section, last):
    """A fresh machine needs nothing else; `.ci/run` takes what the section's one block of bash says."""
    (command,) = re.findall(r"```bash\n(.*?)```", README.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)
    assert command.count("\n") == 1
    venv, activate, install, run = command.strip().split(" && ")
    assert (venv, activate, run) == ("python3 -m venv .venv", ". .venv/bin/activate", last)
    assert re.fullmatch(r"pip install (-e )?'\.\[train(,test)?\]'", install)
    assert f'"{section}"' in (ROOT / ".ci" / "run").read_text()


def test_table_of_families_is_what_the_command_prints(capsys):
    (table,) = re.findall(r"<!-- backbones list --markdown -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert main(["list", "--markdown", "--plugin", "dense-backbones"]) == 0
    assert table == capsys.readouterr().out, "run `backbones list --markdown` and put its output into the README"


def test_smp_model_of_the_readme_segments():
    names = {}
    exec(block("backbones_tasks.smp").replace('"imagenet"', "None").replace("b2", "b0"), names)
    with torch.no_grad():
        assert names["model"].eval()(torch.rand(1, 3, 64, 96)).shape == (1, 21, 64, 96)


def test_saving_of_the_readme_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"backbone": backbones.build_backbone("edgevit_xxs")}
    exec(block("save_pretrained"), names)
    assert [tuple(m.shape) for m in names["backbone"](torch.rand(1, 3, 50, 71))] == [(1, 288, 2, 3)]
