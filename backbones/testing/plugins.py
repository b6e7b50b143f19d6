"""How a plugin loads, and whether its specs tell the truth."""

import os
import subprocess
import sys
from functools import partial

import torch

from ..errors import InputError
from ..registry import PluginInfo, build_backbone
from ..specs import BackboneInfo
from .common import count_parameters, require


def check_loads(plugin: PluginInfo) -> None:
    require(plugin.status == "ok", f"plugin {plugin.namespace} is {plugin.status}: {plugin.error}", "")


def check_no_torch(plugin: PluginInfo) -> None:
    code = f"import sys, {plugin.module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # what this process finds, that one does
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    require(
        done.returncode == 0,
        f"importing {plugin.module} " + (f"failed: {done.stderr}" if done.stderr else "imports torch"),
        "keep the top module to specs, and the model behind their entry",
    )


def check_spec(info: BackboneInfo) -> None:
    build = partial(build_backbone, info.canonical_name)
    with torch.device("meta"):
        build()  # compares channels and strides
        if info.params is None:
            return
        try:
            count = count_parameters(build(features_only=False))
        except InputError:
            return
    require(
        abs(count / 1e6 - info.params) <= max(0.01, 0.001 * info.params),
        f"the spec says {info.params} M parameters, and the classifier has {count:,}",
        "correct params",
    )
