"""Imports go one way and in no circle: `lint-imports` says so, and finds what is planted."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (".", "plugins", "tasks")


def lint_imports(root):
    """Exit code and contracts that are broken, of the sources in a folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(root / folder) for folder in SOURCES)}
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, re.findall(r"^(.+) BROKEN$", done.stdout, re.M)


@pytest.fixture
def copy(tmp_path):
    """The sources, copied, so that something can be planted in them."""
    if not (ROOT / "plugins").is_dir():
        pytest.skip("there are no sources beside the tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("backbones", "plugins", "tasks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    return tmp_path


def test_imports_go_one_way_and_in_no_circle(copy):
    assert lint_imports(copy) == (0, [])


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("backbones/backbone.py", "    from .registry import build_backbone", "Nothing is imported in a circle"),
        ("backbones/layers/padding.py", "    from .window import window_partition", "Nothing is imported in a circle"),
        ("plugins/backbones_timm/table.py", "    from .model import TimmBackbone", "Nothing is imported in a circle"),
        ("backbones/saving.py", "    from .hub import from_pretrained", "The core has layers"),
        ("backbones/registry.py", "    import backbones_vit", "Plugins import the core"),
        ("backbones/weights.py", "    from backbones_tasks import build_segmenter", "Plugins import the core"),
        ("plugins/backbones_vit/vit.py", "    from backbones_swin import swin", "Plugins import the core"),
        ("plugins/backbones_swin/swin.py", "    import backbones_tasks", "Plugins import the core"),
        ("tasks/backbones_tasks/models/detector.py", "    from ..training.losses import parse", "Tasks have rooms"),
        ("tasks/backbones_tasks/pictures/colours.py", "    from ..data import images", "Tasks have rooms"),
        ("tasks/backbones_tasks/show/photo.py", "    from ..commands.predict import predict", "Tasks have rooms"),
        ("tasks/backbones_tasks/models/saving.py", "    from .base import recorded", "Nothing is imported in a circle"),
        ("tasks/backbones_tasks/__init__.py", "    import backbones_timm.model", "Tasks know backbones by their names"),
    ],
)
def test_a_planted_import_is_found(copy, file, line, contract):
    with (copy / file).open("a", encoding="utf-8") as source:
        source.write(f"\n\ndef _planted():\n{line}\n")
    code, broken = lint_imports(copy)
    assert code == 1
    assert any(name.startswith(contract) for name in broken), broken


def test_the_contracts_name_every_plugin_of_the_distribution():
    modules = {e.value for e in entry_points(group="backbones") if e.dist.name == "dense-backbones"}
    configuration = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.importlinter]")[2]
    lists = [part for part in configuration.split("[[") if "backbones_vit" in part]
    assert len(lists) >= 4
    for module in modules:
        assert all(re.search(rf"\b{module}\b", part) for part in lists), module
