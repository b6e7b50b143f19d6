"""`backbones new-plugin` writes a package that works as it is, and harms nothing that is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from backbones import backbone_info, list_backbones
from backbones.cli import main
from backbones.cli.new_plugin import find_template, rename
from backbones.testing import check_plugin

TEMPLATE = Path(__file__).parents[2] / "examples" / "plugin-template"
SUFFIXES = (".py", ".md", ".toml")


@pytest.fixture
def new_plugin(tmp_path, monkeypatch, path_with):
    """A package `tiny_net`, written, installed into a folder of its own and put on the path."""
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "tiny_net"]) == 0
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", "site", "./tiny_net"]
    subprocess.run(command, check=True, timeout=300)
    path_with(tmp_path / "site")
    yield tmp_path / "tiny_net"
    for name in [name for name in sys.modules if name.startswith("tiny_net")]:
        del sys.modules[name]


def test_it_installs_lists_and_passes_the_checks(new_plugin):
    assert list_backbones(plugin="tiny_net") == ["tiny_net_m", "tiny_net_s"]
    assert backbone_info("tiny_net_s").canonical_name == "tiny_net/tiny_net_s"
    results = check_plugin("tiny_net", slow=False)
    assert [r for r in results if r.outcome != "passed"] == []
    assert {"tiny_net/tiny_net_s", "tiny_net/tiny_net_m", "tiny_net"} == {r.backbone for r in results}


def test_nothing_of_the_template_is_left_in_it(new_plugin):
    files = [path for path in new_plugin.rglob("*") if path.suffix in SUFFIXES and "build" not in path.parts]
    written = {str(path.relative_to(new_plugin)): path.read_text() for path in files}
    theirs = [path for path in TEMPLATE.rglob("*") if path.suffix in SUFFIXES]
    assert written == {
        rename(str(path.relative_to(TEMPLATE)), "tiny_net"): rename(path.read_text(), "tiny_net") for path in theirs
    }
    assert not any("mynet" in text.lower() for text in written.values())
    assert "class TinyNet(Backbone)" in written["tiny_net/model.py"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My Net", "cannot be a package's name"),
        ("class", "cannot be a package's name"),
        ("json", "cannot be a package's name"),
        ("torch", "there is a module 'torch' already"),
    ],
)
def test_names_that_cannot_be_are_refused(name, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", name]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    assert main(["new-plugin", "tiny_net", "--out", str(tmp_path)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_template_is_found_however_the_package_was_installed():
    """Beside the sources, or where a wheel puts it: the same files."""
    here, found = (
        {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.suffix in SUFFIXES}
        for folder in (TEMPLATE, find_template())
    )
    assert found == here
