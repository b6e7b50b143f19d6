"""How a plugin loads, and whether its specs tell the truth."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..backbone import Backbone
from ..counting import gmacs
from ..errors import InputError
from ..registry import PluginInfo, backbone_info, build_backbone, list_backbones
from ..specs import BackboneInfo, Weights
from ..weights import leads_nowhere
from .common import Skipped, count_parameters, fail, require, some

#: Seconds that importing a plugin's top module may take: whoever lists backbones waits for all of them.
_LONGEST = 1.0


def check_loads(plugin: PluginInfo) -> None:
    """It loads, and every spec of it is one."""
    require(
        plugin.status == "ok",
        f"plugin {plugin.namespace} is {plugin.status}: {plugin.error}",
        "see `backbones plugins --errors` for the traceback",
    )


def check_no_torch(plugin: PluginInfo) -> None:
    """Its top module, which every `backbones list` reads, imports no torch."""
    done = _python(f"import sys, {plugin.module}; sys.exit('torch' in sys.modules)")
    require(
        done.returncode == 0,
        f"importing {plugin.module} " + (f"failed: {done.stderr}" if done.stderr else "imports torch"),
        "keep the top module to specs, and the model behind their entry",
    )


def check_fast(plugin: PluginInfo) -> None:
    """Its top module, which every `backbones list` waits for, is imported in a second."""
    seconds = _imported("", [plugin.module])[0]
    if seconds > _LONGEST:  # once more: files were read from the disk, and the machine may have been busy
        seconds = min(seconds, _imported("", [plugin.module])[0])
    require(
        seconds <= _LONGEST,
        f"importing {plugin.module} takes {seconds:.1f} s, and {_LONGEST:.0f} s at most is to be borne",
        "leave files, the network and large libraries to the module behind the specs' entry; "
        "`python -X importtime` tells what takes how long",
    )


def check_imports(plugin: PluginInfo) -> None:
    """Importing its modules changes nothing for the whole program: its directory, warnings, log, dtype, ..."""
    entries = {backbone_info(name).entry.partition(":")[0] for name in list_backbones(plugin=plugin.namespace)}
    libraries = "import timm, torch, backbones, backbones.testing"  # what these change is not the plugin's
    for modules in ([plugin.module], sorted(entries)):
        _, changed = _imported(libraries, modules)
        require(
            not changed,
            f"importing {some(modules)} changes {' and '.join(changed)} for the whole program",
            "leave that to the program; within a function, a context manager such as warnings.catch_warnings() takes "
            "it back",
        )


def check_spec(info: BackboneInfo) -> None:
    """Channels, strides, parameters and multiply-adds are those of the model."""
    build = partial(build_backbone, info.canonical_name)
    with torch.device("meta"):
        build()  # compares channels and strides
        if info.params is None and info.gmacs is None:
            return
        try:
            model = build(features_only=False)
        except InputError:
            return
    count = count_parameters(model) / 1e6
    require(
        info.params is None or abs(count - info.params) <= max(0.01, 0.001 * info.params),
        f"the spec says {info.params} M parameters, and the classifier has {count:.2f} M",
        "correct params",
    )
    if info.gmacs is None:
        return
    found = _gmacs(model, build)
    twice = abs(found - info.gmacs / 2) <= 0.05 * found
    require(
        abs(found - info.gmacs) <= max(0.006, 0.05 * found),
        f"the spec says {info.gmacs} GMACs, and the classifier has {found:.4g} for an image of 224 x 224",
        "correct gmacs" + (": a multiply-add is one, and two FLOPs" if twice else ""),
    )


def check_weights(info: BackboneInfo) -> None:
    """Published weights have a layout and channels that the model knows, and files that are on this machine exist."""
    if not info.weights:
        raise Skipped("it lists no weights")
    with torch.device("meta"):
        model = build_backbone(info.canonical_name)
    layouts = {model.own_layout, *(layout.name for layout in model.key_layouts)}
    for row in info.weights:
        require(
            row.layout in layouts,
            f"weights {row.tag!r} are of layout {row.layout!r}, and the model knows {', '.join(sorted(layouts))}",
            "give the layout in key_layouts or own_layout whose names the file has",
        )
        require(
            row.input_size[0] == model.in_chans,
            f"weights {row.tag!r} are for images of {row.input_size[0]} channels, and the model has {model.in_chans}",
            "correct input_size, or the model's default in_chans",
        )
        _require_source(row, online=False)


def check_sources(info: BackboneInfo) -> None:
    """Published weights are where they are said to be: the hub, or the server, is asked."""
    if not info.weights:
        raise Skipped("it lists no weights")
    for row in info.weights:
        try:
            _require_source(row, online=True)
        except OSError as error:
            raise Skipped(f"whether {row.source} is there cannot be told: {error}") from None


def _require_source(row: Weights, online: bool) -> None:
    wrong = leads_nowhere(row, online)
    require(not wrong, f"weights {row.tag!r} lead nowhere: {wrong}", "correct their source")


def _gmacs(model: Backbone, build: Any) -> float:
    """Of the classifier, on the meta device where it runs there."""
    try:
        return gmacs(model.eval(), torch.empty(1, model.in_chans, 224, 224, device="meta"))
    except (RuntimeError, NotImplementedError):  # it looks at values
        return gmacs(build(features_only=False).eval(), torch.zeros(1, model.in_chans, 224, 224))


#: Checks of a plugin, and of each of its specs, by name, in the order in which they run.
PLUGIN_CHECKS: dict[str, Callable[[PluginInfo], None]] = {
    "plugin_loads": check_loads,
    "top_module_imports_no_torch": check_no_torch,
    "top_module_imports_fast": check_fast,
    "imports_change_nothing": check_imports,
}
SPEC_CHECKS: dict[str, Callable[[BackboneInfo], None]] = {
    "spec_matches_model": check_spec,
    "weights_match_model": check_weights,
    "weights_can_be_had": check_sources,
}

_IMPORT = """
import contextlib, json, time
from backbones import hookspecs, specs
from backbones.guard import guarded
{before}
with guarded() as changed:
    began = time.perf_counter()
    for module in {modules}:
        with contextlib.suppress(Exception):  # is told by another check
            __import__(module)
    seconds = time.perf_counter() - began
print(json.dumps([seconds, changed]))
"""


def _imported(before: str, modules: list[str]) -> tuple[float, list[str]]:
    """How many seconds it takes a fresh process to import modules, and what that changes for the whole program."""
    done = _python(_IMPORT.format(before=before, modules=modules))
    if done.returncode:
        fail(f"importing {some(modules)} ends the process: {done.stderr}", "let it import")
    seconds, changed = json.loads(done.stdout.splitlines()[-1])
    return seconds, changed


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process, which finds what this one finds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
