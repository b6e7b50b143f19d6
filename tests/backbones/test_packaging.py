"""What is declared, what is installed and what is in the folders are the same."""

import ast
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from backbones.cli.new_plugin import SUFFIXES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py"))


def installed(group):
    return {e.name: e.value for e in distribution("dense-backbones").entry_points if e.group == group}


def imports(folder):
    """Top-level names of all modules that the Python files of a folder import, and from which file."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.partition(".")[0], path


def test_plugins_are_declared_installed_and_present():
    declared = PROJECT["entry-points"]["backbones"]
    assert declared == {name.removeprefix("backbones_"): name for name in PLUGINS}
    assert installed("backbones") == declared


def test_commands_are_declared_installed_and_present():
    declared = PROJECT["entry-points"]["backbones.commands"]
    assert installed("backbones.commands") == declared
    for value in declared.values():
        assert find_spec(value.partition(":")[0])
    assert installed("console_scripts") == PROJECT["scripts"]


def test_the_installed_version_is_the_declared_one():
    assert distribution("dense-backbones").version == PROJECT["version"]


def test_dependencies_go_one_way():
    own = {"backbones", "backbones_tasks", *PLUGINS}
    folders = {"backbones": ROOT / "backbones", "backbones_tasks": ROOT / "tasks" / "backbones_tasks"}
    folders |= {name: ROOT / "plugins" / name for name in PLUGINS}
    for package, folder in folders.items():
        allowed = {package} | ({"backbones"} if package != "backbones" else set())
        wrong = [f"{path.relative_to(ROOT)} imports {name}" for name, path in imports(folder) if name in own - allowed]
        assert not wrong


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_is_read_without_torch(name):
    code = f"import sys, {name}; {name}.register_backbones(); print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_it_works_from_the_repository_and_from_elsewhere(where, tmp_path):
    code = "import backbones; print([(p.namespace, p.status) for p in backbones.plugins()])"
    folder = ROOT if where == "root" else tmp_path
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    expected = [(name.removeprefix("backbones_"), "ok") for name in PLUGINS]
    assert run.stdout == f"{expected}\n"


def test_the_wheel_holds_the_three_roots_and_their_types(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("backbones", "plugins", "tasks", "examples"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, "-w", tmp_path, source], check=True, timeout=120)
    (wheel,) = tmp_path.glob("dense_backbones-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for root, package in [(".", "backbones"), ("tasks", "backbones_tasks"), *(("plugins", p) for p in PLUGINS)]:
        folder = ROOT / root
        expected = {str(p.relative_to(folder)) for p in (folder / package).rglob("*.py")} | {f"{package}/py.typed"}
        assert expected <= names
    templates = [path for folder in (ROOT / "examples").glob("plugin-template*") for path in folder.rglob("*")]
    shipped = {name.partition("/dense-backbones/")[2] for name in names if "/plugin-template" in name}
    assert shipped == {str(p.relative_to(ROOT / "examples")) for p in templates if p.suffix in SUFFIXES}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "backbones",
        "backbones_tasks",
        "dense_backbones",
        *PLUGINS,
    }
