"""A plugin as somebody else would publish it, with a backbone that neither we nor timm have, by the README alone."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import backbones
from backbones import build_backbone, list_backbones
from backbones.testing import check_backbone
from backbones_tasks import build_detector, build_segmenter
from backbones_tasks.training.callbacks import read_metrics

PROJECT = Path(__file__).parents[2] / "examples" / "plugin-van"
COMMAND = "import sys; from backbones.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What pip makes of the project, in a folder of its own that is first on the path."""
    folder = tmp_path_factory.mktemp("site")
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    source = tmp_path_factory.mktemp("source") / "plugin-van"  # pip builds in the folder that it is given
    subprocess.run(["cp", "-r", PROJECT, source], check=True)
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", folder, source]
    subprocess.run(command, check=True, timeout=600)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        backbones.refresh()
        yield folder
    backbones.refresh()


def run(site, cwd, *arguments):
    """What a process prints that finds the package."""
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=7200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_neither_we_nor_timm_have_it_and_it_is_short(site):
    assert not timm.list_models("*van_*")
    assert [name for name in list_backbones("*van_b*") if name in list_backbones(plugin="dense-backbones")] == []
    files = list((PROJECT / "src").rglob("*.py"))
    assert sum(len(file.read_text().splitlines()) for file in files) < 200


def test_every_variant_has_the_parameters_of_the_paper(site):
    paper = {"b0": 4.1, "b1": 13.9, "b2": 26.6, "b3": 44.8, "b4": 60.3, "b5": 90.0, "b6": 199.8}  # the paper has 200
    assert list_backbones(plugin="van") == [f"van_{variant}" for variant in paper]
    for variant, millions in paper.items():
        with torch.device("meta"):
            model = build_backbone(f"van_{variant}", features_only=False)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_it_keeps_the_promise_at_a_small_size(site):
    results = check_backbone(lambda **options: build_backbone("van_b0", depths=(1, 1, 1, 1), **options), slow=False)
    assert [r for r in results if r.outcome != "passed"] == []


@pytest.mark.parametrize("task", ["upernet", "mask_rcnn"])
def test_it_learns_under_heads(site, task):
    if task == "upernet":
        model = build_segmenter(task, backbone="van_b0", num_classes=3, decoder_channels=16)
        model(torch.rand(2, 3, 50, 71)).square().mean().backward()
    else:
        options = {"fpn_channels": 16, "min_size": 64, "max_size": 96}
        model = build_detector(task, backbone="van_b0", num_classes=3, **options)
        boxes = torch.tensor([[4.0, 4, 40, 50]])
        target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 50, 71, dtype=torch.uint8)}
        sum(model([torch.rand(3, 50, 71)] * 2, [target] * 2).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())


@pytest.mark.slow  # the compiler, and two processes
def test_its_own_tests_pass_and_it_is_checked_in_full(site, tmp_path):
    summary = run(site, PROJECT, "-m", "pytest", "-q", "-p", "no:cacheprovider").splitlines()[-1]
    assert "passed" in summary
    assert "failed" not in summary
    told = run(site, tmp_path, "-c", COMMAND, "check", "--plugin", "van").splitlines()[-1]
    assert "failed" not in told


@pytest.mark.slow  # two trainings
@pytest.mark.parametrize(
    ("task", "options"),
    [("segmentation", ["--model.decoder", "upernet"]), ("detection", ["--model.detector", "mask_rcnn"])],
)
def test_it_trains_on_shapes(site, tmp_path, task, options):
    steps = ["--trainer.max_steps", "20", "--data.batch_size", "4", "--out", "run"]
    run(site, tmp_path, "-c", COMMAND, "fit", task, "--backbone", "van_b0", *options, *steps)
    (row,) = read_metrics(tmp_path / "run" / "metrics.csv")
    assert row["step"] == "20"
    assert math.isfinite(float(row["train_loss"]))
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
