"""Types that hold: mypy finds nothing in the sources, and a user's program is typed by what it imports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import backbones
import backbones_tasks

ROOT = Path(__file__).parents[1]

PROGRAM = """\
import torch
from backbones import (
    Backbone, backbone_info, build_backbone, for_inference, from_pretrained, list_backbones, plugins, wrap
)
from backbones_tasks import build_classifier, build_detector, build_multitask, build_segmenter
from backbones_tasks import from_pretrained as task_from_pretrained
from torch import nn

images = torch.randn(1, 3, 64, 64)
backbone = build_backbone("pvt_v2_b0", out_indices=(1, 2, 3), pretrained=False)
reveal_type(backbone)  # Backbone
reveal_type(backbone(images))  # list[Tensor] | Tensor
reveal_type(backbone.feature_info)  # FeatureInfo
reveal_type(backbone.out_channels)  # list[int]
reveal_type(backbone.strides)  # list[int]
reveal_type(backbone.spec)  # BackboneInfo
reveal_type(backbone.canonical_name)  # str
reveal_type(backbone.load_report)  # LoadReport
reveal_type(backbone.train())  # Backbone
reveal_type(backbone.get_classifier())  # Module
reveal_type(backbone.no_weight_decay())  # set[str]
reveal_type(backbone.save_pretrained("folder"))  # Path
reveal_type(list_backbones("pvt*"))  # list[str]
reveal_type(backbone_info("pvt_v2_b0"))  # BackboneInfo
reveal_type(backbone_info("pvt_v2_b0").weights)  # tuple[Weights, ...]
reveal_type(backbone_info("pvt_v2_b0").channels)  # tuple[int, ...]
reveal_type(plugins())  # list[PluginInfo]
reveal_type(wrap(nn.Identity(), channels=[3], strides=[1]))  # Backbone
reveal_type(for_inference(backbone))  # Backbone
reveal_type(for_inference(backbone, dtype=torch.bfloat16))  # Backbone
reveal_type(from_pretrained("folder"))  # Backbone
segmenter = build_segmenter("upernet", backbone="pvt_v2_b0", num_classes=2)
reveal_type(segmenter)  # Segmenter
reveal_type(segmenter(images))  # Tensor | tuple[Tensor, Tensor]
reveal_type(for_inference(segmenter))  # Segmenter
reveal_type(segmenter.save_pretrained("folder"))  # Path
reveal_type(segmenter.metadata)  # dict[str, Any]
classifier = build_classifier(backbone="pvt_v2_b0", num_classes=2)
reveal_type(classifier)  # Classifier
reveal_type(classifier(images))  # Tensor | tuple[Tensor, Tensor]
detector = build_detector("fcos", backbone=backbone, num_classes=2)
reveal_type(detector)  # Detector
reveal_type(detector([images[0]]))  # dict[str, Tensor] | list[dict[str, Tensor]]
reveal_type(build_multitask("pvt_v2_b0", {"seg": {"task": "segmentation", "num_classes": 2}}))  # MultiTaskModel
reveal_type(task_from_pretrained("folder"))  # HoldsBackbone


class Mine(Backbone):
    def __init__(self) -> None:
        super().__init__(channels=(8, 16), strides=(4, 8))
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.stages = nn.ModuleList(self.wanted([nn.Identity(), nn.Conv2d(8, 16, 2, 2)]))


reveal_type(Mine()(images))  # list[Tensor] | Tensor
"""

WRONG = """\
from backbones import build_backbone, build_backbones
from backbones_tasks import build_segmentor

build_backbone(18)
build_backbone("pvt_v2_b0")(3)
"""


pytestmark = pytest.mark.slow  # mypy reads torch for a minute, where it has not yet


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What mypy says, in another folder, of programs that use what is installed."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "wrong.py").write_text(WRONG)
    # It sees no editable install by itself.
    folders = {str(Path(module.__file__).parents[1]) for module in (backbones, backbones_tasks)}
    path = os.pathsep.join(sorted(folder for folder in folders if "site-packages" not in folder))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "."],
        cwd=folder,
        env=os.environ | {"MYPYPATH": path, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def plain(text):
    """A revealed type without the modules that define its parts."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def test_a_users_program_has_no_error_and_no_any(said):
    assert "program.py" in said
    assert not re.search(r"program\.py:\d+: error: ", said), said
    found = {int(n): plain(t) for n, t in re.findall(r'program\.py:(\d+): note: Revealed type is "(.*)"', said)}
    told = {n: line.partition("# ")[2] for n, line in enumerate(PROGRAM.splitlines(), 1) if "reveal_type" in line}
    assert found == told
    assert not [t for t in found.values() if "Any" in t and t != "dict[str, Any]"]


@pytest.mark.parametrize(
    ("line", "error"), [(1, "attr-defined"), (2, "attr-defined"), (4, "arg-type"), (5, "arg-type")]
)
def test_names_that_are_not_there_and_wrong_arguments_are_errors(line, error, said):
    assert re.search(rf"wrong\.py:{line}: error: .*\[{error}\]", said), said


def test_mypy_finds_nothing_in_the_sources():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
