"""Every lower bound in pyproject.toml is a version that works: the lowest are installed, and all tasks tried."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

# It installs 6 GB from a package index and takes ten minutes.
slow = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Extras that are installed after the others were tried, because transformers raises the version of one that all use.
LATER = ("transformers", "test")
RAISED = "huggingface-hub"

SHAPES = {"size": 64, "train": 4, "val": 4}
TASKS = {
    task: [*(f"--data.shapes.{key}={value}" for key, value in SHAPES.items()), "--data.batch_size=4"]
    for task in ("segmentation", "classification", "detection")
}
HEADS = {"seg": {"task": "segmentation"}, "det": {"task": "detection"}}
DATA = {name: {"batch_size": 4, "shapes": SHAPES} for name in HEADS}
TASKS["multitask"] = [f"--model.heads={json.dumps(HEADS)}", f"--data.heads={json.dumps(DATA)}"]


def floors(*extras):
    """Lowest version of each package that the bare install and some extras ask for."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    found = {}
    for requirement in map(Requirement, lines):
        (specifier,) = requirement.specifier
        assert specifier.operator == ">=", f"{requirement} has no lower bound that can be tried"
        assert found.setdefault(canonicalize_name(requirement.name), specifier.version) == specifier.version, (
            f"{requirement}: two bounds"
        )
    return found


def test_every_requirement_has_one_lower_bound():
    assert len(floors(*EXTRAS)) > 15


def run(*command, folder):
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a venv, the sources, and an image to label."""
    if sys.version_info >= (3, 13):
        pytest.skip("the lowest versions have no wheels for this Python")
    folder = tmp_path_factory.mktemp("lowest")
    for name in ("backbones", "plugins", "tasks", "examples", "tests"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    (folder / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photos" / "noise.png")
    run(sys.executable, "-m", "venv", "venv", folder=folder)
    yield folder
    shutil.rmtree(folder)  # 6 GB


def install(folder, versions, *extras):
    """pip with these versions; returns what is in the venv then."""
    (folder / "constraints.txt").write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--no-cache-dir", "-c", "constraints.txt", f"./source[{','.join(extras)}]", folder=folder)
    installed = json.loads(run(*pip, "list", "--format=json", folder=folder))
    return {canonicalize_name(row["name"]): Version(row["version"].partition("+")[0]) for row in installed}


@pytest.fixture(scope="module")
def lowest(workshop):
    """The venv's commands, with the lowest versions of all that the tasks can use."""
    extras = [extra for extra in EXTRAS if extra not in LATER]
    versions = floors(*extras)
    installed = install(workshop, versions, *extras)
    assert {name: installed[name] for name in versions} == {name: Version(v) for name, v in versions.items()}
    return workshop / "venv" / "bin"


@slow
def test_every_task_trains_measures_predicts_is_shared_and_exported(lowest, workshop):
    backbones = lowest / "backbones"
    assert "pvt_v2_b0" in run(backbones, "list", folder=workshop)
    for task, options in TASKS.items():
        options = [*options, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", f"--out={task}"]
        run(backbones, "fit", task, *options, folder=workshop)
        run(backbones, "validate", task, "--ckpt_path=best", f"--out={task}", folder=workshop)
        checkpoint = workshop / task / "checkpoints" / "best.ckpt"
        labels = f"{task}-labels"
        run(backbones, "predict", task, "--ckpt", checkpoint, "--images=photos", f"--out={labels}", folder=workshop)
        assert any((workshop / labels).rglob("*")), f"{task} predicts nothing"
        run(backbones, "share", checkpoint, f"--out={task}-shared", folder=workshop)
    for subject in ("segmentation", "classification"):
        # What pads cannot be traced for any size by torch 2.6, and ONNX takes a newer one: see the README.
        command = [backbones, "export", workshop / subject / "checkpoints" / "best.ckpt"]
        traced = ["--format=torch-export", "--size", "64", "64", "--fixed-size", f"--out={subject}.pt2"]
        run(*command, *traced, folder=workshop)
        assert (workshop / f"{subject}.pt2").stat().st_size > 1e6


@slow
def test_backbones_are_checked_drawn_and_timed(lowest, workshop):
    run(lowest / "backbones", "check", "pvt_v2_b0", "--quick", folder=workshop)
    run(lowest / "backbones", "show", "pyramid", "pvt_v2_b0", "photos/noise.png", "--out=maps.png", folder=workshop)
    run(lowest / "backbones", "bench", "pvt_v2_b0", "--size", "64", "--vs", "timm", "--seconds", "0.1", folder=workshop)
    code = """
import torch, backbones_tasks.smp, segmentation_models_pytorch as smp
from backbones import build_backbone
model = smp.Unet("backbones-pvt_v2_b0", encoder_weights=None, classes=21).eval()
assert model(torch.rand(1, 3, 64, 64)).shape == (1, 21, 64, 64)
assert len(build_backbone("timm/resnet18")(torch.rand(1, 3, 64, 64))) == 4
"""
    run(lowest / "python", "-c", code, folder=workshop)


@slow
def test_the_lowest_transformers_and_test_tools_work(lowest, workshop):
    versions = floors(*EXTRAS)
    del versions[RAISED]
    installed = install(workshop, versions, *EXTRAS)
    assert {name: installed[name] for name in versions} == {name: Version(v) for name, v in versions.items()}
    code = """
import torch, transformers
from backbones import build_backbone
transformers.Dinov2Config(num_hidden_layers=2, hidden_size=32, num_attention_heads=2).save_pretrained("model")
assert len(build_backbone("transformers/./model")(torch.rand(1, 3, 64, 64))) == 4
"""
    run(lowest / "python", "-c", code, folder=workshop)
    source = workshop / "source"
    run(lowest / "ruff", "check", ".", folder=source)
    run(lowest / "pytest", "tests/backbones/test_specs.py", "tests/backbones/test_layers.py", folder=source)
