"""Plugins that would take the program down, or change it: they are told, and harm nothing."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

import backbones
from backbones import UnknownBackbone
from backbones.guard import guarded

SPEC = "BackboneSpec(name={!r}, family='Net', entry='json:loads', channels=(8,), strides=(4,))"
SOUND = f"""
from backbones import BackboneSpec
BACKBONES_API = 1
def register_backbones():
    return [{SPEC.format("sound_net")}]
"""
HOSTILE = {
    "odd_exception": "class Odd(BaseException): pass\nraise Odd('neither Exception nor SystemExit')",
    "interrupt": "raise KeyboardInterrupt",
    "leaves": "import os\nos._exit(3)",
    "leaves_by_name": "from os import _exit\n_exit(3)",
    "sleeps": "import time\ntime.sleep(1.2)" + SOUND.replace("sound_net", "sleepy_net"),
    "changes": """
import logging, os, tempfile, warnings
import torch
os.chdir(tempfile.gettempdir())
warnings.simplefilter('error')
logging.basicConfig(level=1)
logging.disable(logging.CRITICAL)
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
"""
    + SOUND.replace("sound_net", "changing_net"),
    "finds_all": SOUND.replace("sound_net", "all_net")
    + f"""
def find_backbone(name):
    return {SPEC.format("").replace("''", "name", 1)}
""",
    "half": f"""
from backbones import BackboneSpec
BACKBONES_API = 1
def register_backbones():
    yield {SPEC.format("before")}
    yield "not a spec"
    yield {SPEC.format("between")}
    yield {SPEC.format("before")}
    raise RuntimeError("half-way")
""",
    "sound": SOUND,
}


def install(site, name, source):
    """What pip would leave behind of a plugin of one module."""
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[backbones]\n{name} = throwaway_{name}\n")
    (site / f"throwaway_{name}.py").write_text(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, source in HOSTILE.items():
        install(folder, name, source)
    return folder


@pytest.fixture(scope="module")
def told(site):
    """What commands in a process of its own print to stdout and stderr, and return, with all of them installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    environment.pop("BACKBONES_LOAD_PLUGINS", None)
    code = """
import backbones, contextlib, io, json
from backbones.cli import main
told = {}
for arguments in (["list", "*_net"], ["plugins", "--timing"], ["plugins", "--json"]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    told[" ".join(arguments)] = [code, out.getvalue(), err.getvalue()]
told["build"] = backbones.build_backbone("pvt_v2_b0", out_indices=(0,)).canonical_name
print(json.dumps(told))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def hostile(path_with, site):
    path_with(site)


def test_none_of_them_ends_a_command_or_a_build(told):
    assert told["build"] == "pvt/pvt_v2_b0"
    assert "sound_net" in told["list *_net"][1]
    assert [told[command][0] for command in told if command != "build"] == [0, 0, 0]


def test_each_is_told_with_what_it_did(told):
    records = {p["namespace"]: p for p in json.loads(told["plugins --json"][1])}
    for namespace, error in {
        "odd_exception": "Odd: neither Exception nor SystemExit",
        "interrupt": "it raised KeyboardInterrupt, though nobody pressed Ctrl-C",
        "leaves": "SystemExit: it called os._exit(3)",
        "leaves_by_name": "SystemExit: it called os._exit(3)",
    }.items():
        assert (records[namespace]["status"], error in records[namespace]["error"]) == ("broken", True), namespace
    assert records["sound"]["status"] == "ok"


def test_a_slow_one_is_told_with_its_time(told):
    assert re.search(r"slow to read: .*sleeps \(sleeps\) \d+\.\d s", told["list *_net"][2])
    table = told["plugins --timing"][1]
    assert re.search(r"^sleeps \(sleeps 1\.0\): reading it took \d+\.\d s", table, re.M)
    (row,) = (line for line in table.splitlines() if re.match(r"sleeps +sleeps ", line))
    assert float(row.split()[-1]) >= 1.2


def test_what_it_changed_for_the_whole_program_is_put_back_and_told(hostile, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = (list(warnings.filters), logging.getLogger().level, list(logging.getLogger().handlers))
    record = next(p for p in backbones.plugins() if p.namespace == "changes")
    assert os.getcwd() == str(tmp_path)
    assert (list(warnings.filters), logging.getLogger().level, list(logging.getLogger().handlers)) == before
    assert logging.getLogger().manager.disable == 0
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert record.status == "ok"
    for what in ("the working directory", "the filters of warnings", "the root logger", "torch's default dtype"):
        assert what in record.note


def test_a_catalogue_that_answers_anything_does_not_hide_the_nearest_name(hostile):
    with pytest.raises(UnknownBackbone, match="did you mean 'pvt_v2_b2'"):
        backbones.backbone_info("pvt_v2_b22")
    assert backbones.backbone_info("finds_all/anything").canonical_name == "finds_all/anything"
    assert backbones.backbone_info("all_net").plugin == "finds_all"
    record = next(p for p in backbones.plugins() if p.namespace == "finds_all")
    assert "find_backbone answers any name" in record.note


def test_good_specs_among_bad_ones_stay(hostile):
    assert backbones.list_backbones("half/*") == ["before", "between"]
    record = next(p for p in backbones.plugins() if p.namespace == "half")
    assert record.status == "broken"
    for message in ("gave 'not a spec'", "two of its specs have the name 'before'", "RuntimeError: half-way"):
        assert message in record.error


def test_a_folder_that_hides_the_installed_module_is_named(path_with, tmp_path, monkeypatch):
    metadata = tmp_path / "site" / "hidden-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hidden\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[backbones]\nhidden = throwaway_hidden\n")
    (tmp_path / "work" / "throwaway_hidden").mkdir(parents=True)
    path_with(tmp_path / "site", tmp_path / "work")
    record = next(p for p in backbones.plugins() if p.namespace == "hidden")
    assert record.status == "broken"
    assert str(tmp_path / "work" / "throwaway_hidden") in record.error
    assert "start it from another folder, or rename" in record.error


def test_one_that_is_blocked_on_purpose_is_no_error(hostile, monkeypatch, run_cli, site):
    result = run_cli("plugins", "--json", path=[site], BACKBONES_BLOCK_PLUGINS="sound")
    record = next(p for p in json.loads(result.stdout) if p["namespace"] == "sound")
    assert (record["status"], record["error"]) == ("blocked", "")
    assert record["note"] == "not loaded: BACKBONES_BLOCK_PLUGINS names it"


def test_ctrl_c_is_not_taken_for_a_plugins():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), guarded():
        time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
