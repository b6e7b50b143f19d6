"""What the specs of every plugin we ship say is what the models are."""

import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backbones import backbone_info, build_backbone, building, list_backbones
from backbones.cli import main
from backbones.cli.bench import Case, timing
from backbones.specs import read_results
from backbones.testing import smallest_of_each_family

NAMES = list_backbones()


FAMILIES = smallest_of_each_family(NAMES)
VARIANTS = [pytest.param(name, marks=() if name in FAMILIES else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_channels_strides_and_parameters_are_as_listed(name, count):
    info = backbone_info(name)
    with torch.device("meta"):
        backbone = build_backbone(name)
        classifier = build_backbone(name, features_only=False)
    assert tuple(backbone.out_channels) == info.channels
    assert tuple(backbone.strides) == info.strides == (4, 8, 16, 32)
    assert round(count(classifier) / 1e6, 2) == info.params


@pytest.mark.parametrize("name", VARIANTS)  # counting takes a second or two for the large ones
def test_multiply_adds_are_as_listed(name):
    case = Case(name=name, options={"features_only": False}, size=(224, 224))
    assert timing._gmacs(case) == pytest.approx(backbone_info(name).gmacs, abs=0.006)


@pytest.mark.parametrize("name", FAMILIES)
def test_options_are_those_of_the_model(name):
    info = backbone_info(name)
    module, _, attribute = info.entry.partition(":")
    assert set(info.options) <= building._options(getattr(import_module(module), attribute))


@pytest.mark.parametrize("name", NAMES)
def test_whoever_uses_a_backbone_finds_its_source_and_licence(name):
    info = backbone_info(name)
    assert info.paper.startswith("https://")
    assert info.license
    assert info.summary
    assert all(row.license for row in info.weights)


def test_published_results_are_of_backbones_that_there_are():
    files = sorted(Path(__file__).parents[2].glob("plugins/*/results.csv"))
    told = {name: rows for file in files for name, rows in read_results(file).items()}
    assert {name: backbone_info(name).results for name in told} == told
    assert sum(map(len, told.values())) > 200
    for rows in told.values():
        for row in rows:
            box, mask = row.metrics.get("box_ap", 100), row.metrics.get("mask_ap", 0)
            assert 15 < min(row.metrics.values()) <= max(row.metrics.values()) < 80
            assert mask < box
            assert row.schedule
            assert row.pretrain


@pytest.mark.parametrize(
    ("name", "task", "method", "metrics"),
    [
        ("pvt_v2_b2", "detection", "RetinaNet", {"box_ap": 44.6}),
        ("swin_tiny", "segmentation", "UPerNet", {"miou": 44.51, "miou_ms": 45.81}),
        ("convnext_base", "segmentation", "UPerNet", {"miou": 49.1, "miou_ms": 49.9}),
        ("vit_base_patch16", "detection", "Mask R-CNN, ViTDet", {"box_ap": 51.6, "mask_ap": 45.9}),
    ],
)
def test_results_of_dense_tasks_are_as_published(name, task, method, metrics, capsys):
    rows = [row for row in backbone_info(name).results if (row.task, row.method) == (task, method)]
    assert metrics in [row.metrics for row in rows]
    assert main(["info", name]) == 0
    printed = capsys.readouterr().out
    assert all(f"{value:.4g}" in printed for value in metrics.values())
    assert rows[0].source in printed


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request):
    return build_backbone(request.param).eval()


@pytest.mark.slow  # some 250 images, the largest with half a million pixels
@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700))
def test_maps_of_any_size_are_as_promised(backbone, height, width):
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, height, width))
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in (4, 8, 16, 32)]
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *s) for c, s in zip(backbone.out_channels, sizes, strict=True)]
    assert all(m.isfinite().all() for m in maps)
