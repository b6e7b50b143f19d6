"""Throw-away plugin packages, installed: one for each file in `throwaway/`."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import backbones
from backbones.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

SOURCES = Path(__file__).parent / "throwaway"

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "throwaway-{dashed}"
version = "1.0"
[project.entry-points.backbones]
{namespace} = "throwaway_{stem}"
[project.entry-points."backbones.commands"]
throwaway-{dashed} = "throwaway_{stem}:command"
[tool.setuptools]
py-modules = [{modules}]
"""


@pytest.fixture(scope="session")
def throwaway_projects(tmp_path_factory):
    """A folder with a project per throw-away plugin."""
    folder = tmp_path_factory.mktemp("projects")
    for source in SOURCES.glob("*.py"):
        stem = source.stem.removesuffix("_model")
        project = folder / stem
        project.mkdir(exist_ok=True)
        (project / f"throwaway_{source.name}").write_text(source.read_text())
        modules = ", ".join(f'"throwaway_{path.stem}"' for path in sorted(SOURCES.glob(f"{stem}*.py")))
        namespace = "pvt" if stem == "taken_namespace" else stem
        settings = {"stem": stem, "dashed": stem.replace("_", "-"), "namespace": namespace, "modules": modules}
        (project / "pyproject.toml").write_text(PYPROJECT.format(**settings))
    return folder


@pytest.fixture(scope="session")
def throwaway_site(throwaway_projects, tmp_path_factory):
    """A folder with all throw-away plugins installed, to be put on the path.

    pip installs `good`; of the others, which would take a minute, the same files are written.
    """
    site = tmp_path_factory.mktemp("site")
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *flags, "--target", str(site)]
    subprocess.run([*pip, str(throwaway_projects / "good")], check=True, timeout=300)
    for project in sorted(throwaway_projects.iterdir()):
        if project.name != "good":
            _install(project, site)
    return site


def _install(project, site):
    """What pip would leave behind."""
    declared = tomllib.loads((project / "pyproject.toml").read_text())
    name, version = declared["project"]["name"], declared["project"]["version"]
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = declared["project"]["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *map(" = ".join, points.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    for module in declared["tool"]["setuptools"]["py-modules"]:
        shutil.copy(project / f"{module}.py", site)


@pytest.fixture
def path_with():
    """Put folders before everything else on the path of this process, and read plugins anew."""

    with pytest.MonkeyPatch.context() as patch:

        def add(*folders):
            for folder in reversed(folders):
                patch.syspath_prepend(str(folder))
            backbones.refresh()

        for variable in ("LOAD_PLUGINS", "BLOCK_PLUGINS", "STRICT"):
            patch.delenv(f"BACKBONES_{variable}", raising=False)
        yield add
    for name in [name for name in sys.modules if name.startswith("throwaway_")]:
        del sys.modules[name]
    backbones.refresh()


@pytest.fixture
def throwaway(path_with, throwaway_site):
    """The throw-away plugins, as seen from this process."""
    path_with(throwaway_site)


@pytest.fixture
def run_cli(path_with, monkeypatch, capfd):
    """Run `backbones ARGUMENTS` with folders on the path and variables in the environment."""

    def run(*arguments, path=(), **variables):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            path_with(*path)
            capfd.readouterr()
            try:
                code = main(arguments)
            except SystemExit as stop:  # argparse's
                code = stop.code or 0
            out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run
