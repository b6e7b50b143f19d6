"""The conformance kit, the paper's figures, and the names of the official code."""

import re

import pytest
import torch

from backbones import build_backbone, list_backbones
from backbones.testing import parametrize_backbones

# VAN's table of ImageNet results: millions of parameters, and billions of multiply-adds.
PAPER = {
    "van_b0": (4.1, 0.9),
    "van_b1": (13.9, 2.5),
    "van_b2": (26.6, 5.0),
    "van_b3": (44.8, 9.0),
    "van_b4": (60.3, 12.2),
    "van_b5": (90.0, 17.2),
    "van_b6": (200, 38.9),
}


@parametrize_backbones(["van_b0"], slow_marks=pytest.mark.slow)
def test_contract(name, check):
    check(name)


@pytest.mark.parametrize("name", list_backbones(plugin="van"))
def test_parameters_are_those_of_the_paper(name):
    with torch.device("meta"):
        model = build_backbone(name, features_only=False)
    params, gmacs = PAPER[name]
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1 if params < 100 else 0) == params
    assert model.spec.params == pytest.approx(count, abs=0.005)
    assert model.spec.gmacs == pytest.approx(gmacs, rel=0.05)


def official_name(name):
    """Ours as the official code has it."""
    name = re.sub(r"^stages\.(\d)\.(embed|blocks|norm)\.", lambda m: _PARTS[m[2]].format(int(m[1]) + 1), name)
    return name.replace(".attn.gate.", ".attn.spatial_gating_unit.").replace(".dwconv.", ".dwconv.dwconv.")


_PARTS = {"embed": "patch_embed{}.", "blocks": "block{}.", "norm": "norm{}."}


def test_official_checkpoints_load_whole(tmp_path):
    model = build_backbone("van_b0", features_only=False)
    state = {official_name(name): value for name, value in model.state_dict().items()}
    assert {"patch_embed1.proj.weight", "block4.1.attn.spatial_gating_unit.conv_spatial.bias"} <= state.keys()
    assert {"block1.0.mlp.dwconv.dwconv.weight", "block3.4.layer_scale_2", "norm2.weight", "head.bias"} <= state.keys()
    torch.save({"state_dict": state}, tmp_path / "van.pth.tar")
    other = build_backbone("van_b0", features_only=False, pretrained=tmp_path / "van.pth.tar")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
