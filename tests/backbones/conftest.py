"""Throw-away plugin packages, really built and installed: one for each file in `throwaway/`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import backbones

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
    """A folder with all throw-away plugins installed, to be put on the path."""
    site = tmp_path_factory.mktemp("site")
    flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *flags, "--target", str(site)]
    subprocess.run([*pip, *map(str, sorted(throwaway_projects.iterdir()))], check=True, timeout=300)
    return site


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
def run_cli():
    """Run `backbones ARGUMENTS` in a process of its own, with folders on its path and variables in its environment."""

    def run(*arguments, path=(), **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("BACKBONES_")} | variables
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        code = "import sys; from backbones.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run
