"""Faults of plugins: what importing them does, and specs that are not true. Each is the source of a plugin's module."""

from . import PLUGIN_FAULTS, Fault

SOURCE = """
{before}
from backbones import BackboneSpec, Weights
BACKBONES_API = 1
def register_backbones():
    return [BackboneSpec(name={name!r}, family="Sound", entry="planted.sound:Sound", channels=(8, 12, 16),
                         strides=(4, 8, 16), {spec})]
"""


def _planted(what, check, says, before="", spec=""):
    name = f"sound_{len(PLUGIN_FAULTS)}"
    PLUGIN_FAULTS.append(Fault(what, SOURCE.format(before=before, name=name, spec=spec), check, says))


# A classifier of 1000 classes has 26,532 parameters and 0.0072 GMACs.
_planted("params are wrong", "spec_matches_model", "says 3.1 M parameters, and the classifier has", spec="params=3.1")
_planted(
    "gmacs are FLOPs",
    "spec_matches_model",
    "says 0.0144 GMACs, and .* a multiply-add is one, and two FLOPs",
    spec="gmacs=0.0144",
)
_planted(
    "channels are wrong",
    "spec_matches_model",
    r"its spec declares \(channels, stride\) .* and the model has",
    spec="aliases=()".replace("aliases=()", "defaults={'dims': (8, 12, 20)}"),
)
_planted(
    "weights lie nowhere",
    "weights_match_model",
    "weights 'in1k' lead nowhere: there is no file /nowhere/weights.pth.*correct their source",
    spec="weights=(Weights(tag='in1k', source='file:///nowhere/weights.pth', layout='own'),)",
)
_planted(
    "weights have a layout that nobody knows",
    "weights_match_model",
    "are of layout 'offical', and the model knows own.*key_layouts",
    spec="weights=(Weights(tag='in1k', source='https://example.org/w.pth', layout='offical'),)",
)
_planted(
    "the import takes seconds",
    "top_module_imports_fast",
    "takes 1.* s, and 1 s at most is to be borne.*importtime",
    before="import time; time.sleep(1.1)",
)
_planted(
    "the import loads torch", "top_module_imports_no_torch", "imports torch.*behind their entry", before="import torch"
)
for what, change, told in (
    ("the default dtype", "import torch; torch.set_default_dtype(torch.float64)", "torch's default dtype or grad mode"),
    ("grad mode", "import torch; torch.set_grad_enabled(False)", "torch's default dtype or grad mode"),
    ("the working directory", "import os, tempfile; os.chdir(tempfile.gettempdir())", "the working directory"),
    ("warnings", "import warnings; warnings.simplefilter('ignore')", "the filters of warnings"),
    ("logging", "import logging; logging.basicConfig(level=10)", "the root logger"),
):
    _planted(
        f"the import changes {what}", "imports_change_nothing", f"changes {told} for the whole program", before=change
    )
