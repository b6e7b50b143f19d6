"""The conformance kit of dense-backbones: `pytest` takes seconds, `pytest -m slow` runs what takes a minute or more."""

import pytest
import torch

from backbones import InputError, backbone_info, build_backbone, list_backbones, plugins
from backbones.testing import parametrize_backbones, smallest_of_each_family

NAMES = list_backbones(plugin="mynet")


@parametrize_backbones(smallest_of_each_family(NAMES), slow_marks=pytest.mark.slow)
def test_contract(name, check):
    check(name)


def test_plugin_loads():
    (plugin,) = (plugin for plugin in plugins() if plugin.namespace == "mynet")
    assert plugin.status == "ok", plugin.error


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_the_parameters_of_its_spec(name):
    with torch.device("meta"):  # takes no memory, however large the variant
        try:
            model = build_backbone(name, features_only=False)
        except InputError:  # it has no classifier
            model = build_backbone(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(backbone_info(name).params, abs=0.005)
