"""Every family keeps the contract: the conformance kit that third parties use, and what only ours promise."""

import pytest
import torch
from timm.layers import DropPath
from timm.optim import create_optimizer_v2

from backbones import build_backbone, list_backbones
from backbones.testing import CHECKS, SLOW_CHECKS, honesty, parametrize_backbones, smallest_of_each_family

# Whatever is listed is tested: no family can be forgotten.
FAMILIES = [*smallest_of_each_family(list_backbones()), "pvt_v2_b2_li", "deit_tiny_distilled_patch16"]
every_family = pytest.mark.parametrize("name", FAMILIES)


# Of few families, test_honesty.py asks the same by default.
HONEST = [name for name, check in CHECKS.items() if check.__module__ == honesty.__name__]


EXPECTED = {"maxvit_rmlp_pico_rw": {"rates_of_zero": "as published, the MLP of its biases drops an eighth in training"}}


@parametrize_backbones(
    FAMILIES, expected_failures=EXPECTED, slow_marks=pytest.mark.slow, slow_checks=[*SLOW_CHECKS, *HONEST]
)
def test_conformance(name, check):
    check(name)


@every_family
def test_drop_path_rises_to_the_rate_that_is_asked_for(name):
    rates = [m.drop_prob for m in build_backbone(name, drop_path_rate=0.3).modules() if isinstance(m, DropPath)]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.3)
    assert len(set(rates)) > 3


@every_family
def test_layer_decay_tells_blocks_apart_and_leaves_the_head_its_rate(name):
    model = build_backbone(name, features_only=False)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1.0
    assert len(set(scale.values())) > 5


@every_family
def test_maps_come_channels_last(name):
    """So that heads, norms and linear layers read them without a copy."""
    model = build_backbone(name).eval()
    with torch.no_grad():
        for m in model(torch.randn(1, 3, 64, 64)):
            assert m.is_contiguous(memory_format=torch.channels_last)


@every_family
def test_out_norm_gives_each_map_a_norm_of_its_own(name):
    if name.startswith(("vit", "deit")):
        pytest.skip("the final norm of the published model is its only one")
    plain, normed = build_backbone(name).eval(), build_backbone(name, out_norm=True, out_indices=(1, 3)).eval()
    fresh = {key.partition(".")[0] for key in normed.state_dict().keys() - plain.state_dict().keys()}
    assert fresh in ({"out_norms"}, {"stage_norms"})  # the latter in Twins-SVT, where the next stage sees it too
    with torch.no_grad():
        for m in normed(torch.randn(1, 3, 256, 256)):
            torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-4, rtol=0)
