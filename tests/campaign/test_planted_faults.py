"""The conformance kit finds each planted fault, by the check that is meant for it, with the line that mends it.

`pytest tests/campaign/test_planted_faults.py -m slow -s` runs the whole kit on each, and prints what finds it.
"""

import re

import pytest
from planted import FAULTS, PLUGIN_FAULTS, maps, modules, plugins, randomness, training, values  # noqa: F401
from planted.sound import Sound

import backbones
from backbones.testing import CHECKS, SLOW_CHECKS, check_backbone, check_plugin

SLOW = pytest.mark.slow  # what exports, or imports torch anew, takes seconds


def cases(faults):
    """Of the checks that take seconds, export's are slow tests, and but one of what imports change is a quick one."""
    seen = {"export"}
    for fault in faults:
        marks = SLOW if fault.check in seen else ()
        if fault.check == "imports_change_nothing":
            seen.add(fault.check)
        yield pytest.param(fault, id=fault.what, marks=marks)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what pip would leave behind of each faulty plugin."""
    folder = tmp_path_factory.mktemp("planted")
    for i, fault in enumerate(PLUGIN_FAULTS):
        metadata = folder / f"planted_{i}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: planted_{i}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[backbones]\nplanted_{i} = planted_plugin_{i}\n")
        (folder / f"planted_plugin_{i}.py").write_text(fault.subject)
    return folder


@pytest.fixture
def installed(site, monkeypatch):
    for variable in ("LOAD_PLUGINS", "BLOCK_PLUGINS", "STRICT"):
        monkeypatch.delenv(f"BACKBONES_{variable}", raising=False)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(site))
        backbones.refresh()
        yield
    backbones.refresh()


def told(results):
    return {r.check: r.message for r in results if r.outcome == "failed"}


@pytest.mark.parametrize("fault", cases(FAULTS))
def test_a_fault_is_found_and_told(fault):
    found = told(check_backbone(fault.subject, checks=[fault.check]))
    assert re.search(fault.says, found.get(fault.check, "it passed"))


@pytest.mark.parametrize("fault", cases(PLUGIN_FAULTS))
def test_a_fault_of_a_plugin_is_found_and_told(fault, installed):
    found = told(check_plugin(f"planted_{PLUGIN_FAULTS.index(fault)}", checks=[fault.check]))
    assert re.search(fault.says, found.get(fault.check, "it passed"))


def test_a_sound_backbone_passes():
    assert told(check_backbone(Sound, checks=CHECKS.keys() - {*SLOW_CHECKS, "export"})) == {}


@pytest.mark.slow  # the whole kit, a hundred times
def test_the_whole_kit_finds_them_all(installed, capsys):
    quick = [check for check in CHECKS if check not in SLOW_CHECKS]
    missed = []
    for fault in FAULTS:
        found = told(check_backbone(fault.subject, checks=quick))
        line = found.get(fault.check, "")
        if not re.search(fault.says, line):
            missed.append(fault.what)
        with capsys.disabled():
            print(f"\n{fault.what} | {', '.join(found) or 'nothing'} | {line or 'not found'}", end="", flush=True)
    print(f"\n{len(FAULTS) - len(missed)} of {len(FAULTS)} found by the check that is meant for it")
    assert not missed
