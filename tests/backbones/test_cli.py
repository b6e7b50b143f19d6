"""`backbones list`, `info` and `plugins`: light, quick, quiet, and plain about what is wrong."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from resource import RUSAGE_CHILDREN, getrusage

import pytest

import backbones
from backbones.cli import COMMANDS, main
from backbones.cli.summary import summary

# What no command that only looks things up may import.
HEAVY = ("torch", "torchvision", "timm", "numpy", "pytorch_lightning", "segmentation_models_pytorch")
LIGHT_COMMANDS = (["list"], ["list", "--json"], ["info", "pvt_v2_b0"], ["plugins"], ["plugins", "--errors"], ["--help"])


@pytest.fixture(scope="module")
def cpu_seconds(tmp_path_factory):
    """Of bare Python and of Python that runs a script: the least so far, in up to five starts each."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("pycache"))

    def once(*command):
        before = getrusage(RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True, env=environment)
        after = getrusage(RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def pairs(*command):
        bare, ours = [], []
        for _ in range(5):
            bare.append(once("pass"))
            ours.append(once(*command))
            yield min(bare), min(ours)

    return pairs


@pytest.mark.parametrize("command", LIGHT_COMMANDS, ids=" ".join)
def test_looking_things_up_imports_nothing_heavy(command, tmp_path):
    code = f"""
import sys
from backbones.cli import main
try:
    main({command!r})
finally:
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print("heavy:", heavy, file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout
    assert run.stderr.endswith("heavy: []\n")


@pytest.mark.parametrize("command", LIGHT_COMMANDS, ids=" ".join)
def test_looking_things_up_takes_under_a_fifth_of_a_second(command, cpu_seconds):
    """On a machine where Python itself starts in up to 25 ms; one that shares its cores is given time in proportion."""
    starts = cpu_seconds("import sys; from backbones.cli import main; sys.exit(main())", *command)
    assert any(ours < 0.2 * max(1, bare / 0.025) for bare, ours in starts)


def test_importing_backbones_adds_under_a_tenth_of_a_second(cpu_seconds):
    assert any(ours - bare < 0.1 for bare, ours in cpu_seconds("import backbones"))


def test_list_shows_every_backbone(run_cli):
    result = run_cli("list")
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["name", "family", "params", "(M)", "channels", "strides", "weights", "plugin"]
    assert [line.split()[0] for line in lines] == backbones.list_backbones()
    row = next(line for line in lines if line.startswith("pvt_v2_b0 "))
    for text in ("PVTv2", "3.67", "32 64 160 256", "4 8 16 32", "in1k", "pvt"):
        assert text in row


def test_list_takes_a_part_of_a_name_or_a_pattern(run_cli):
    assert [row["name"] for row in json.loads(run_cli("list", "v2_b0", "--json").stdout)] == ["pvt_v2_b0"]
    assert [row["name"] for row in json.loads(run_cli("list", "pvt*b0", "--json").stdout)] == ["pvt_v2_b0"]
    assert run_cli("list", "*", "--plugin", "pvt").stdout.count("pvt_v2") == 7


def test_list_in_markdown_has_a_row_per_family_from_small_to_large(run_cli):
    header, rule, row = run_cli("list", "pvt_v2*", "--markdown").stdout.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "[PVTv2](https://arxiv.org/abs/2106.13797)"
    assert cells[1].split()[0] == "`pvt_v2_b0`"
    assert cells[1].split()[-1] == "`pvt_v2_b5`"
    assert cells[2] == "3.67 to 81.96"
    assert cells[4:6] == ["4 8 16 32", "32 64 160 256 to 64 128 320 512"]
    assert cells[-2:] == ["7: Apache-2.0", "Apache-2.0"]


def test_list_of_nothing_says_so(run_cli):
    result = run_cli("list", "zzz*")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no backbone matches 'zzz*'" in result.stderr
    assert json.loads(run_cli("list", "zzz*", "--json").stdout) == []
    result = run_cli("list", "pvt_v3_b0")
    assert (result.returncode, result.stdout) == (2, "")
    assert "did you mean 'pvt_v2_b0'" in result.stderr


def test_an_alias_is_understood(run_cli, throwaway_site):
    environment = {"path": [throwaway_site], "BACKBONES_LOAD_PLUGINS": "throwaway-good"}
    result = run_cli("list", "good_net_wide_32", "--json", **environment)
    assert json.loads(result.stdout)[0]["channels"] == [32, 64]
    assert run_cli("info", "good_net_224", **environment).stdout.startswith("good/good_net\n")


def test_info_shows_the_whole_spec(run_cli):
    text = run_cli("info", "pvt/pvt_v2_b0").stdout
    info = backbones.backbone_info("pvt_v2_b0")
    for value in (info.canonical_name, info.summary, info.family, info.paper, info.license, info.entry, info.version):
        assert value in text
    assert f"hf-hub:timm/{info.name}.in1k" in text
    data = json.loads(run_cli("info", "pvt_v2_b0", "--json").stdout)
    assert data == json.loads(json.dumps(info.as_dict()))


def test_plugins_shows_who_provides_what(run_cli):
    rows = json.loads(run_cli("plugins", "--json").stdout)
    assert {row["namespace"]: row["status"] for row in rows} == {p.namespace: "ok" for p in backbones.plugins()}
    header, *lines = run_cli("plugins").stdout.splitlines()
    assert header.split() == ["plugin", "distribution", "version", "backbones", "status"]
    assert ["pvt", "dense-backbones", backbones.__version__, "11", "ok"] in [line.split() for line in lines]


def test_faulty_plugins_are_hinted_at_and_never_in_the_way(run_cli, throwaway_site):
    result = run_cli("list", "--json", path=[throwaway_site])
    assert result.returncode == 0
    assert {row["canonical_name"] for row in json.loads(result.stdout)} >= {"pvt/pvt_v2_b0", "good/good_net"}
    assert "a stray line from a plugin" in result.stderr
    hint = result.stderr.splitlines()[-1]
    assert "broken_import (throwaway-broken-import) is broken, " in hint
    assert "no_api (throwaway-no-api) is incompatible, " in hint
    assert hint.endswith("; run `backbones plugins --errors`")
    summary = run_cli("plugins", path=[throwaway_site])
    assert "ModuleNotFoundError: No module named 'no_such_library'" in summary.stdout
    assert "Traceback" not in summary.stdout + summary.stderr


def test_errors_are_one_line_and_exit_code_2(run_cli, throwaway_site):
    result = run_cli("info", "pvt_v2_b22")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("backbones: error: there is no backbone 'pvt_v2_b22'; did you mean 'pvt_v2_b2'")
    strict = run_cli("list", path=[throwaway_site], BACKBONES_STRICT="1")
    assert strict.returncode == 2
    assert "Traceback" not in result.stderr + strict.stderr


def test_a_closed_pipe_is_quiet():
    code = "import sys; from backbones.cli import main; sys.exit(main(['list', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_help_lists_every_command(run_cli):
    for result in (run_cli("--help"), run_cli()):
        assert result.returncode == 0
        commands = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("    ")}
        assert commands >= {*COMMANDS, "fit", "validate", "test", "predict", "show"}
    for command in COMMANDS:
        assert f"usage: backbones {command}" in run_cli(command, "--help").stdout


def test_help_says_what_the_commands_of_every_package_do(run_cli, throwaway_site):
    shown = run_cli("--help", path=[throwaway_site], COLUMNS="200").stdout
    told = dict(re.findall(r"^    (\S+)\s+(.+)$", shown, re.MULTILINE))
    ours = [e for e in entry_points(group="backbones.commands") if e.dist.name == "dense-backbones"]
    assert len(ours) >= 8
    for entry_point in ours:
        first, *rest = entry_point.load().__doc__.partition("\n")[0].removesuffix(".")
        assert told[entry_point.name] == first.lower() + "".join(rest)
    purpose = "a plugin as it should be, but for a stray print; it lists one backbone and finds others"
    assert told["throwaway-good"] == f"{purpose} (from throwaway-good)"
    assert told["throwaway-broken-import"] == "a plugin whose import fails (from throwaway-broken-import)"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("theirs.commands:run", "run at 100 % of the speed"),
        ("theirs:again", "run at 100 % of the speed"),  # imported there under another name
        ("theirs.commands:ONNX", "ONNX files of all"),
        ("theirs.commands:silent", "commands of theirs"),  # it has no docstring: its module's
        ("theirs.commands.nothing:run", ""),
        ("nobody:run", ""),
    ],
)
def test_a_commands_line_is_read_without_importing_its_package(value, line, tmp_path, monkeypatch):
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("from .commands import run as again\n1 / 0\n")
    functions = 'def run(argv):\n    """Run at 100 % of the speed.\n\n    And more."""\n\ndef silent(argv): ...\n'
    functions += 'class ONNX:\n    """ONNX files of all."""\n'
    (package / "commands.py").write_text(f'"""Commands of theirs."""\n{functions}')
    monkeypatch.syspath_prepend(tmp_path)
    assert summary(EntryPoint("run", value, "backbones.commands")) == line
    assert "theirs" not in sys.modules


def test_version(run_cli):
    assert run_cli("--version").stdout == f"dense-backbones {backbones.__version__}\n"


def test_an_unknown_command_is_refused_with_the_known_ones(run_cli):
    result = run_cli("lits")
    assert result.returncode == 2
    for name in ("lits", "list", "fit"):
        assert name in result.stderr


def test_commands_of_other_packages_get_the_arguments_and_give_the_exit_code(run_cli, throwaway_site):
    result = run_cli("throwaway-good", "--size", "3", path=[throwaway_site])
    assert result.returncode == 3
    assert result.stdout.endswith("good command: ['--size', '3']\n")
    assert "throwaway-good" in run_cli("--help", path=[throwaway_site]).stdout


def test_a_command_that_cannot_be_loaded_is_reported(run_cli, throwaway_site):
    result = run_cli("throwaway-broken-import", path=[throwaway_site])
    assert result.returncode == 2
    assert "command 'throwaway-broken-import' of throwaway-broken-import cannot be loaded" in result.stderr
    assert "Traceback" not in result.stderr


def test_main_can_be_called_from_python(capsys):
    for _ in range(2):
        assert main(("list", "pvt_v2_b0")) == 0
        assert "pvt_v2_b0" in capsys.readouterr().out
    assert main(["info", "nothing_like_it"]) == 2
    assert "there is no backbone" in capsys.readouterr().err
