"""Discovery: what is installed is found, named without surprise and built; what is broken harms nothing else."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import backbones
from backbones import (
    AmbiguousBackbone,
    Backbone,
    BackboneError,
    BackboneSpec,
    InputError,
    MissingDependency,
    PluginError,
    UnknownBackbone,
    hookspecs,
    registry,
)
from backbones.discovery import Plugin

ROOT = Path(__file__).parents[2]
THROWAWAY = Path(__file__).parent / "throwaway"

# namespace: status, and what its traceback says
FAULTS = {
    "asks_back": ("broken", "asks for backbones while it is being read"),
    "broken_import": ("broken", "ModuleNotFoundError: No module named 'no_such_library'"),
    "exits": ("broken", "SystemExit: throwaway plugin wants out"),
    "invalid_spec": ("broken", "InvalidSpec: BackboneSpec 'short': strides=(4,) is wrong; give as many as channels"),
    "leads_nowhere": ("broken", "there is no module 'throwaway_leads_nowhere.missing'"),
    "misspelt_hook": ("broken", "unknown hook 'find_backbones'"),
    "no_api": ("incompatible", "states no API version; write `BACKBONES_API = 1`"),
    "no_hook": ("broken", "define register_backbones()"),
    "not_a_spec": ("broken", "register_backbones gave 'resnet50'; give a BackboneSpec"),
    "raising_catalogue": ("broken", "RuntimeError: no catalogue today"),
    "raising_hook": ("broken", "RuntimeError: this hook raises"),
    "same_name_twice": ("broken", "two of its specs have the name 'twin'"),
    "wrong_api": ("incompatible", "is made for plugin API 99"),
    "wrong_arguments": ("broken", "Argument(s) {'registry'}"),
}
SOUND = {"good", "particular", "rival", "raising_find", "unmarked"}  # as far as reading them goes


@pytest.fixture
def records(throwaway):
    return {(p.namespace, p.distribution): p for p in backbones.plugins()}


@pytest.fixture
def local(monkeypatch):
    """Nothing registered by hand yet, and nothing left of it afterwards."""
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))


# --- reading plugins ----------------------------------------------------------------------------------------


def test_every_throwaway_plugin_is_expected_to_be_sound_or_faulty():
    stems = {path.stem for path in THROWAWAY.glob("*.py") if not path.stem.endswith("_model")}
    assert stems == SOUND | FAULTS.keys() | {"taken_namespace"}


def test_a_hook_needs_no_mark(throwaway):
    assert "unmarked_net" in backbones.list_backbones(plugin="unmarked")


def test_a_misspelt_hook_is_answered_with_those_that_there_are(records):
    record = records["misspelt_hook", "throwaway-misspelt-hook"]
    assert "; the hooks are register_backbones, catalogue, find_backbone" in record.error


@pytest.mark.parametrize("namespace", FAULTS)
def test_a_faulty_plugin_is_reported_with_its_traceback(records, namespace):
    status, message = FAULTS[namespace]
    record = records[namespace, f"throwaway-{namespace.replace('_', '-')}"]
    assert (record.status, record.version) == (status, "1.0")
    assert message in record.error
    assert "Traceback (most recent call last)" in record.traceback
    assert message in record.traceback


def test_plugins_errors_prints_every_traceback(run_cli, throwaway_site):
    result = run_cli("plugins", "--errors", path=[throwaway_site])
    assert result.returncode == 0
    sections = re.split(r"\n\n(?=\w+ \(\S+ \S+\) is \w+:\n)", result.stdout)
    for namespace, (status, message) in FAULTS.items():
        header = f"{namespace} (throwaway-{namespace.replace('_', '-')} 1.0) is {status}:\nTraceback (most recent call"
        section = next(s for s in sections if s.startswith(header))
        assert message in section


def test_faulty_plugins_leave_the_others_working(throwaway, records):
    assert {key for key, record in records.items() if record.status == "ok"} == {
        (p.namespace, p.distribution) for p in records.values() if p.distribution == "dense-backbones"
    } | {(namespace, f"throwaway-{namespace.replace('_', '-')}") for namespace in SOUND}
    assert backbones.build_backbone("pvt_v2_b0", out_indices=(0,)).canonical_name == "pvt/pvt_v2_b0"
    assert backbones.build_backbone("good/good_net").canonical_name == "good/good_net"


def test_a_plugin_with_one_bad_entry_keeps_its_other_backbones(throwaway):
    assert backbones.build_backbone("some_class").out_channels == [8, 16]
    for name in ("no_module", "no_class"):
        with pytest.raises(PluginError, match=r"'leads_nowhere' \(throwaway-leads-nowhere 1.0\), cannot be imported"):
            backbones.build_backbone(name)


def test_both_bad_entries_of_a_plugin_are_reported(records):
    record = records["leads_nowhere", "throwaway-leads-nowhere"]
    assert record.backbones == 3
    assert record.error.count("\n") == 1
    assert "module 'throwaway_leads_nowhere_model' has no 'MissingNet'" in record.error


def test_what_a_plugin_lists_before_and_beside_a_fault_stays(throwaway):
    assert "half_listed" in backbones.list_backbones(plugin="raising_hook")
    assert backbones.list_backbones(plugin="same_name_twice") == ["twin"]


def test_a_namespace_belongs_to_its_first_owner(records):
    record = records["pvt", "throwaway-taken-namespace"]
    assert record.status == "broken"
    assert "plugin 'pvt' (dense-backbones" in record.error
    assert records["pvt", "dense-backbones"].status == "ok"


def test_a_distribution_listed_twice_is_read_once(path_with, throwaway_site, throwaway_projects):
    project = throwaway_projects / "good"
    assert (project / "throwaway_good.egg-info").is_dir()  # what building it left behind
    assert (throwaway_site / "throwaway_good-1.0.dist-info").is_dir()
    path_with(project, throwaway_site)
    assert [p.namespace for p in backbones.plugins()].count("good") == 1
    assert backbones.backbone_info("good_net_wide_32").canonical_name == "good/good_net_wide_32"


def test_two_copies_of_one_distribution_are_read_once(path_with, throwaway_site, tmp_path):
    for name in ("throwaway_good.py", "throwaway_good-1.0.dist-info"):
        copy = shutil.copytree if (throwaway_site / name).is_dir() else shutil.copy
        copy(throwaway_site / name, tmp_path / name)
    path_with(tmp_path, throwaway_site)
    assert [p.namespace for p in backbones.plugins()].count("good") == 1


def test_metadata_of_an_interrupted_uninstall_harms_nothing(path_with, tmp_path):
    metadata = tmp_path / "half_gone-1.0.dist-info"
    metadata.mkdir()
    (metadata / "entry_points.txt").write_text("[backbones]\nhalf = half_gone\n")
    path_with(tmp_path)
    record = next(p for p in backbones.plugins() if p.namespace == "half")
    assert record.status == "broken"
    assert "pvt_v2_b0" in backbones.list_backbones()


def test_a_blocked_plugin_leaves_its_namespace_to_others(throwaway, monkeypatch):
    monkeypatch.setenv("BACKBONES_BLOCK_PLUGINS", "dense-backbones")
    backbones.refresh()
    statuses = {p.distribution: p.status for p in backbones.plugins() if p.namespace == "pvt"}
    assert statuses == {"dense-backbones": "blocked", "throwaway-taken-namespace": "ok"}


def test_plugins_are_read_at_the_first_question_and_once(path_with, throwaway_site, monkeypatch):
    reads = []
    read_plugins = registry.read_plugins
    monkeypatch.setattr(registry, "read_plugins", lambda: reads.append(1) or read_plugins())
    path_with(throwaway_site)
    assert reads == []
    backbones.list_backbones()
    backbones.backbone_info("pvt_v2_b0")
    backbones.plugins()
    assert reads == [1]


def test_refresh_sees_what_was_installed_since(path_with, throwaway_site):
    path_with()
    assert not backbones.list_backbones("good/*")
    path_with(throwaway_site)  # calls refresh
    assert "good/good_net_wide_16" in backbones.list_backbones("good/*")


# --- the environment ----------------------------------------------------------------------------------------


def test_blocked_plugins_are_not_imported(throwaway, monkeypatch):
    monkeypatch.setenv("BACKBONES_BLOCK_PLUGINS", "throwaway_good, vit")
    backbones.refresh()
    statuses = {(p.namespace, p.distribution): (p.status, p.backbones) for p in backbones.plugins()}
    assert statuses["good", "throwaway-good"] == ("blocked", 0)
    assert statuses["vit", "dense-backbones"] == ("blocked", 0)
    assert statuses["pvt", "dense-backbones"][0] == "ok"
    assert "throwaway_good" not in sys.modules
    with pytest.raises(UnknownBackbone, match=r"'vit' .* is blocked"):
        backbones.build_backbone("vit/vit_tiny_patch16")


@pytest.mark.parametrize(("allowed", "third_parties"), [("", set()), ("Throwaway_Good", {"good"})])
def test_the_allowlist_names_the_third_parties_that_are_loaded(throwaway, monkeypatch, allowed, third_parties):
    monkeypatch.setenv("BACKBONES_LOAD_PLUGINS", allowed)
    backbones.refresh()
    loaded = {p.namespace for p in backbones.plugins() if p.status != "blocked"}
    assert loaded == third_parties | {p.namespace for p in backbones.plugins() if p.distribution == "dense-backbones"}


def test_strict_raises_at_the_first_failing_plugin(throwaway, monkeypatch):
    monkeypatch.setenv("BACKBONES_STRICT", "1")
    monkeypatch.setenv("BACKBONES_LOAD_PLUGINS", "throwaway-good,throwaway-raising-hook")
    backbones.refresh()
    for _ in range(2):  # not only the first time
        with pytest.raises(PluginError, match=r"'raising_hook' \(throwaway-raising-hook 1.0\) failed") as caught:
            backbones.list_backbones()
        assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.setenv("BACKBONES_LOAD_PLUGINS", "throwaway-good")
    backbones.refresh()
    assert "good_net" in backbones.list_backbones()


# --- names --------------------------------------------------------------------------------------------------


def test_first_party_bare_names_win(throwaway):
    assert backbones.backbone_info("pvt_v2_b0").canonical_name == "pvt/pvt_v2_b0"
    assert backbones.backbone_info("rival/pvt_v2_b0").distribution == "throwaway-rival"
    assert {"pvt_v2_b0", "rival/pvt_v2_b0"} <= set(backbones.list_backbones())


@pytest.mark.parametrize("name", ["good_net", "good_net_224"])
def test_two_third_parties_with_one_name_are_ambiguous_when_used(throwaway, name):
    assert {"good/good_net", "rival/good_net"} <= set(backbones.list_backbones())
    assert "good_net" not in backbones.list_backbones()
    with pytest.raises(AmbiguousBackbone, match=r"'good/good_net' \(from throwaway-good\) or 'rival/good_net"):
        backbones.build_backbone(name)
    assert backbones.backbone_info(f"good/{name}").canonical_name == "good/good_net"


def test_a_catalogue_is_searched_where_its_namespace_is_named(throwaway):
    assert not [name for name in backbones.list_backbones() if "wide" in name]
    assert not backbones.list_backbones("good_net_wide*")
    wide = ["good/good_net_wide_16", "good/good_net_wide_32"]
    assert backbones.list_backbones("good/*wide*") == backbones.list_backbones("*/good_net_wide*") == wide
    assert backbones.list_backbones("*", plugin="good") == ["good/good_net", *wide]
    assert next(p.backbones for p in backbones.plugins() if p.namespace == "good") == 3
    with pytest.raises(UnknownBackbone, match="did you mean 'good/good_net_wide_32'"):
        backbones.build_backbone("good/good_net_wide32")


def test_a_plugin_with_a_raising_catalogue_keeps_what_it_lists(throwaway):
    assert backbones.list_backbones("raising_catalogue/*") == ["shelved_net"]
    assert backbones.backbone_info("shelved_net").plugin == "raising_catalogue"


def test_a_catalogue_finds_what_it_does_not_list(throwaway):
    assert backbones.backbone_info("good_net_wide_32").channels == (32, 64)
    model = backbones.build_backbone("good/good_net_wide_24")
    assert (model.canonical_name, model.out_channels) == ("good/good_net_wide_24", [24, 48])


def test_a_plugin_may_want_its_namespace_and_answer_for_names_that_it_lacks(throwaway):
    assert backbones.backbone_info("particular/owner/net").canonical_name == "particular/owner/net"
    with pytest.raises(UnknownBackbone, match="there is no backbone 'net'"):
        backbones.backbone_info("net")
    with pytest.raises(UnknownBackbone, match="the owner has no nets"):
        backbones.backbone_info("particular/nets")
    assert next(p.status for p in backbones.plugins() if p.namespace == "particular") == "ok"


def test_a_catalogue_that_raises_is_reported_and_harms_nothing(throwaway):
    with pytest.raises(UnknownBackbone, match=r"'raising_find' .* is broken \(RuntimeError: this catalogue is closed"):
        backbones.backbone_info("no_such_net")
    assert backbones.backbone_info("good_net_wide_32").plugin == "good"
    assert backbones.backbone_info("listed_net").plugin == "raising_find"
    record = next(p for p in backbones.plugins() if p.namespace == "raising_find")
    assert record.status == "broken"
    assert "RuntimeError: this catalogue is closed" in record.traceback


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("pvt_v2_b22", "did you mean 'pvt_v2_b2'"),
        ("PVT_V2_B2", "did you mean 'pvt_v2_b2'"),
        ("pvt/pvt_v2_b9", "did you mean 'pvt/pvt_v2_b"),
        ("timn/pvt_v2_b2", "No plugin has the namespace 'timn'"),
        ("pvt_v2_b2.in1k", r"build_backbone\('pvt_v2_b2', pretrained='in1k'\)"),
        ("zzz", "'broken_import' .* is broken.*run `backbones plugins --errors`"),
    ],
)
def test_an_unknown_name_is_answered_with_what_to_do(throwaway, name, answer):
    with pytest.raises(UnknownBackbone, match=answer):
        backbones.build_backbone(name)


def test_only_plugins_that_might_have_had_it_are_named(throwaway):
    with pytest.raises(UnknownBackbone) as caught:
        backbones.build_backbone("good/missing")
    assert "broken_import" not in str(caught.value)


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(InputError, match="is a string"):
        backbones.build_backbone(50)


def test_lists_are_filtered_and_in_natural_order(throwaway):
    names = backbones.list_backbones("vit_base_*")
    assert names.index("vit_base_patch8") < names.index("vit_base_patch16")
    assert backbones.list_backbones("pvt/*b1") == ["pvt_v2_b1"]
    assert backbones.list_backbones(plugin="throwaway_good") == backbones.list_backbones(plugin="good")
    assert backbones.list_backbones("no such name") == []
    with pytest.raises(PluginError, match=r"no plugin is called 'god'; installed: .*good"):
        backbones.list_backbones(plugin="god")


def test_every_first_party_name_and_alias_leads_to_one_backbone():
    for name in backbones.list_backbones(plugin="dense-backbones"):
        info = backbones.backbone_info(name)
        assert name == info.name
        for alias in (info.canonical_name, *info.aliases):
            found = backbones.backbone_info(alias)
            assert replace(found, weights=()) == replace(info, weights=())
            assert set(found.weights) == set(info.weights)


# --- registering by hand ------------------------------------------------------------------------------------


class TinyNet(Backbone):
    """One strided convolution; `surprise` raises, `extra` is popped as plugin authors like to do."""

    def __init__(self, width=8, surprise=False, **options):
        self.extra = options.pop("extra", None)
        super().__init__(channels=(width,), strides=(4,), **options)
        if surprise:
            raise KeyError("a bug of the plugin")
        self.stem = nn.Identity()
        self.stages = nn.ModuleList([nn.Conv2d(self.in_chans, width, 4, 4)])


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)


def tiny(name="tiny_net", **more):
    fields = {"family": "Tiny", "entry": f"{__name__}:TinyNet", "channels": (8,), "strides": (4,)}
    return BackboneSpec(name=name, **(fields | more))


def test_a_registered_spec_is_listed_and_built(local):
    assert backbones.register(tiny(aliases=("teeny_net",))) == "local/tiny_net"
    assert "tiny_net" in backbones.list_backbones()
    model = backbones.build_backbone("teeny_net", in_chans=5)
    assert isinstance(model, TinyNet)
    assert (model.canonical_name, model.spec.name) == ("local/tiny_net", "tiny_net")
    assert {p.namespace: p.backbones for p in backbones.plugins()}["local"] == 1


def test_registering_again_replaces(local):
    backbones.register(tiny(aliases=("teeny_net",)))
    backbones.register(tiny(summary="better"))
    backbones.refresh()  # keeps what was registered
    assert backbones.backbone_info("tiny_net").summary == "better"
    with pytest.raises(UnknownBackbone):
        backbones.backbone_info("teeny_net")


def test_a_registered_name_does_not_replace_a_first_party_one(local):
    backbones.register(tiny("pvt_v2_b0"))
    assert backbones.backbone_info("pvt_v2_b0").plugin == "pvt"
    assert backbones.list_backbones(plugin="local") == ["local/pvt_v2_b0"]


def test_only_specs_can_be_registered(local):
    with pytest.raises(PluginError, match="give a BackboneSpec"):
        backbones.register("tiny_net")


# --- building -----------------------------------------------------------------------------------------------


def test_options_go_before_defaults_and_defaults_are_never_changed(local):
    backbones.register(tiny(channels=(16,), defaults={"width": 16}))
    assert backbones.build_backbone("tiny_net").out_channels == [16]
    assert backbones.build_backbone("tiny_net", width=24).out_channels == [24]
    assert backbones.backbone_info("tiny_net").defaults == {"width": 16}


def test_a_mutable_default_is_not_shared_between_models(local):
    backbones.register(tiny(defaults={"extra": [1]}))
    backbones.build_backbone("tiny_net").extra.append(2)
    assert backbones.build_backbone("tiny_net").extra == [1]


def test_an_unknown_option_is_answered_with_the_nearest(local):
    backbones.register(tiny())
    with pytest.raises(InputError, match="'local/tiny_net' has no option 'drop_path'; did you mean 'drop_path_rate'"):
        backbones.build_backbone("tiny_net", drop_path=0.1)
    with pytest.raises(InputError, match=r"has no option 'zzz'; it takes .*width"):
        backbones.build_backbone("tiny_net", zzz=1)


def test_an_option_that_no_signature_shows_is_let_through(local):
    backbones.register(tiny())
    assert backbones.build_backbone("tiny_net", extra=7).extra == 7


def test_an_exception_of_the_constructor_passes_through_with_a_note(local):
    backbones.register(tiny())
    with pytest.raises(KeyError, match="a bug of the plugin") as caught:
        backbones.build_backbone("tiny_net", surprise=True)
    if sys.version_info >= (3, 11):
        assert "building backbone 'local/tiny_net' of plugin 'local'" in caught.value.__notes__[0]


def test_a_model_that_is_no_backbone_is_refused(local):
    backbones.register(tiny(entry=f"{__name__}:Linear"))
    with pytest.raises(PluginError, match=r"returned a Linear; subclass backbones.Backbone"):
        backbones.build_backbone("tiny_net")


def test_an_entry_that_cannot_be_called_is_refused(local):
    backbones.register(tiny(entry=f"{__name__}:ROOT"))
    with pytest.raises(PluginError, match="is no class or function"):
        backbones.build_backbone("tiny_net")


def test_a_model_that_is_not_what_its_spec_says_is_refused(local):
    backbones.register(tiny(channels=(12,)))
    with pytest.raises(PluginError, match=r"declares .*\[\(12, 4\)\] .* has \[\(8, 4\)\]"):
        backbones.build_backbone("tiny_net")
    assert backbones.build_backbone("tiny_net", width=16).out_channels == [16]  # as asked for, whatever the spec says


def test_missing_requirements_come_with_the_pip_line(local):
    requires = ("no-such-package>=2; python_version > '3'", "torch", "numpy>=9999", "not-here; python_version < '3'")
    backbones.register(tiny(requires=requires))
    with pytest.raises(MissingDependency) as caught:
        backbones.build_backbone("tiny_net")
    pip_line = re.search(r"`(.*)`", str(caught.value))[1]
    assert pip_line == """pip install 'no-such-package>=2; python_version > '"'"'3'"'"'' 'numpy>=9999'"""


def test_a_dict_of_options_as_configs_hold_it_is_enough(local):
    backbones.register(tiny())
    options = json.loads(json.dumps({"name": "local/tiny_net", "in_chans": 1}))
    assert backbones.build_backbone(**options).in_chans == 1


# --- the whole ----------------------------------------------------------------------------------------------


def test_every_hook_is_documented_with_its_arguments_and_tested():
    hooks = {name: f for name, f in vars(hookspecs).items() if getattr(f, "backbones_spec", None) is not None}
    assert hooks
    readme = (ROOT / "README.md").read_text()
    throwaway = "".join(path.read_text() for path in THROWAWAY.glob("*.py"))
    for name, hook in hooks.items():
        call = f"{name}({', '.join(inspect.signature(hook).parameters)})"
        assert inspect.getdoc(hook)
        assert call in readme, f"README.md does not describe the hook {call}"
        assert f"def {call}:" in throwaway, f"no throw-away plugin has the hook {call}"


def test_every_public_error_is_a_backbone_error():
    errors = [getattr(backbones, name) for name in backbones.__all__]
    errors = [e for e in errors if inspect.isclass(e) and issubclass(e, Exception)]
    assert len(errors) == 9
    assert all(issubclass(e, BackboneError) for e in errors)


def test_every_public_name_is_there_and_typed():
    source = (ROOT / "backbones" / "__init__.py").read_text()
    for name in backbones.__all__:
        assert getattr(backbones, name) is not None
        assert name in dir(backbones)
        assert re.search(rf"\b{name}\b", source.partition("__all__")[0]), f"type checkers do not see {name}"
    with pytest.raises(AttributeError, match="no attribute 'build_bakcbone'"):
        _ = backbones.build_bakcbone


def test_importing_backbones_imports_no_plugin_and_no_torch():
    code = "import backbones, sys; print([m for m in sys.modules if m.partition('.')[0] in %r])"
    heavy = ("torch", "timm", "torchvision", "pluggy", "backbones_pvt", "backbones_vit", "backbones_tasks")
    run = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
