"""`backbones new-plugin` writes a package that works as it is, and harms nothing that is there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from backbones import backbone_info, list_backbones
from backbones.cli import main
from backbones.cli.new_plugin import KINDS, SUFFIXES, find_template, rename, template
from backbones.testing import check_plugin

TEMPLATE = Path(__file__).parents[2] / "examples" / "plugin-template"
ALL_KINDS = (None, *KINDS)
PLUGINS = "import backbones; print([(p.status, p.backbones) for p in backbones.plugins() if p.namespace == 'tiny_net'])"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By kind, a folder with a package `tiny_net` in it and, in `site`, what pip makes of that."""
    kept = {}

    def write(kind):
        if kind in kept:
            return kept[kind]
        folder = kept[kind] = tmp_path_factory.mktemp(kind or "plain")
        options = [f"--{kind}"] if kind else []
        assert main(["new-plugin", "tiny_net", *options, "--out", str(folder / "tiny_net")]) == 0
        flags = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *flags, "--target", "site", "./tiny_net"]
        subprocess.run(command, check=True, timeout=300, cwd=folder)
        return folder

    return write


@pytest.fixture(params=ALL_KINDS, ids=str)
def folder(request, written):
    return written(request.param)


@pytest.fixture
def installed(folder, path_with):
    """The folder, with the package on the path of this process."""
    path_with(folder / "site")
    yield folder
    for name in [name for name in sys.modules if name.startswith("tiny_net")]:
        del sys.modules[name]


def run(*command, folder, cwd):
    """What a process prints that finds what was installed; it fails as the process does."""
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=7200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_installs_lists_and_passes_the_checks(installed):
    assert list_backbones(plugin="tiny_net") == ["tiny_net_m", "tiny_net_s"]
    assert backbone_info("tiny_net_s").canonical_name == "tiny_net/tiny_net_s"
    results = check_plugin("tiny_net", slow=False)
    assert [r for r in results if r.outcome not in ("passed", "skipped")] == []
    skipped = {r.check for r in results if r.outcome == "skipped"}
    # No batch norms and no weights yet; what is wrapped has no classifier.
    assert skipped <= {"frozen_norms", "weights_match_model", "classifier", "global_pools"}
    assert {"tiny_net/tiny_net_s", "tiny_net/tiny_net_m", "tiny_net"} == {r.backbone for r in results}


@pytest.mark.parametrize("place", [".", "tiny_net", "tiny_net/src"], ids=["above", "in", "src"])
def test_it_is_found_where_python_starts_beside_its_folder(folder, place):
    assert run("-c", PLUGINS, folder=folder, cwd=folder / place) == "[('ok', 2)]\n"


@pytest.mark.parametrize("place", [".", "tiny_net"], ids=["above", "in"])
def test_an_editable_install_is_found_where_python_starts_beside_its_folder(written, place, tmp_path):
    folder = written(None)
    code = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    run("-c", code, folder=folder, cwd=folder / "tiny_net")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "editable")  # all that pip does with it
    code = f"import site; site.addsitedir({str(tmp_path / 'editable')!r}); {PLUGINS}; import tiny_net; print(tiny_net)"
    out = run("-c", code, folder=tmp_path, cwd=folder / place)
    assert out.startswith("[('ok', 2)]\n")
    assert str(folder / "tiny_net" / "src") in out


@pytest.mark.slow  # for each kind its own tests, the whole kit with the compiler, and a training
def test_its_own_tests_pass_and_it_is_checked_in_full_and_trains(folder):
    summary = run("-m", "pytest", "-q", "-p", "no:cacheprovider", folder=folder, cwd=folder / "tiny_net").splitlines()[
        -1
    ]
    assert "failed" not in summary
    assert "deselected" in summary
    main = "import sys; from backbones.cli import main; sys.exit(main(sys.argv[1:]))"
    told = run("-c", main, "check", "--plugin", "tiny_net", folder=folder, cwd=folder).splitlines()[-1]
    assert "failed" not in told
    options = ["--backbone", "tiny_net_s", "--trainer.max_steps", "20", "--data.batch_size", "4", "--out", "run"]
    run("-c", main, "fit", "segmentation", *options, folder=folder, cwd=folder)
    assert (folder / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_nothing_of_the_template_is_left_in_it(kind, written):
    folder = written(kind) / "tiny_net"
    files = [p for p in folder.rglob("*") if p.suffix in SUFFIXES and not {"build", "tiny_net.egg-info"} & {*p.parts}]
    texts = {str(path.relative_to(folder)): path.read_text() for path in files}
    assert texts == {rename(path, "tiny_net"): rename(text, "tiny_net") for path, text in template(kind).items()}
    assert not any("mynet" in text.lower() for text in texts.values())
    assert {".github/workflows/test.yml", "README.md", "pyproject.toml", "tests/test_tiny_net.py"} <= texts.keys()
    assert ("class TinyNet(Backbone)" in texts["src/tiny_net/model.py"]) is (kind != "wrap")


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


def test_there_is_one_kind_at_a_time(capsys):
    with pytest.raises(SystemExit):
        main(["new-plugin", "tiny_net", "--wrap", "--columnar"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_the_template_is_found_however_the_package_was_installed(kind):
    """Beside the sources, or where a wheel puts it: the same files."""
    here, found = (
        {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.suffix in SUFFIXES}
        for folder in (each.with_name(each.name + (f"-{kind}" if kind else "")) for each in (TEMPLATE, find_template()))
    )
    assert found == here
    assert found
