"""Dropout of attention weights, projections and positions: timm's, by timm's names, on all that attend."""

import pytest
import timm
import torch

from backbones import InputError, build_backbone, list_backbones
from backbones.layers import DROPOUTS, Dropout
from backbones.testing import smallest_of_each_family
from backbones.weights import load_weights

FAMILIES = smallest_of_each_family(list_backbones())
POSITIONS = ("deit", "edgevit", "pvt_tiny", "swin", "twins", "vit")  # others have none to drop
QUICK = ("deit_tiny_patch16", "edgevit_xxs", "mobilevit_xxs", "mobilevitv2_050", "pvt_v2_b0")
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
@pytest.mark.usefixtures("on_meta")
def test_each_rate_is_that_of_all_that_it_names(name):
    for option in DROPOUTS:
        if option == "pos_drop_rate":
            takes = name.startswith(POSITIONS)
        else:
            takes = option == "proj_drop_rate" or not name.startswith("convnext")
        if not takes:
            with pytest.raises(InputError, match=f"{option}=0.3"):
                build_backbone(name, **{option: 0.3})
            continue
        found = [m for m in build_backbone(name, **{option: 0.3}).modules() if isinstance(m, Dropout)]
        assert {m.p for m in found if m.option == option} == {0.3}
        assert {m.p for m in found if m.option != option} <= {0.0}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_nothing_is_dropped_in_eval_and_something_in_training(name):
    rates = {option: 0.5 for option in DROPOUTS if option != "pos_drop_rate" or name.startswith(POSITIONS)}
    if name.startswith("convnext"):
        rates.pop("attn_drop_rate")
    model = build_backbone(name, **rates)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, again = (model.eval()(images)[-1] for _ in range(2))
        for module in model.modules():
            if isinstance(module, Dropout):
                module.train()
        one, other = model(images)[-1], model(images)[-1]
    assert torch.equal(maps, again)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("name", ["deit_tiny_patch16", "pvt_v2_b0", "twins_svt_small"])
def test_what_is_dropped_is_what_timm_drops(name):
    """With the same random numbers, the same of all logits; others lay out their tensors in another order."""
    rates = {"attn_drop_rate": 0.2, "proj_drop_rate": 0.3, "pos_drop_rate": 0.1}
    if name.startswith("pvt"):
        del rates["pos_drop_rate"]
    reference = timm.create_model(f"{name}_224" if name.startswith("deit") else name, **rates).train()
    model = build_backbone(name, features_only=False, **rates)
    load_weights(model, reference.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.manual_seed(1)
    expected = reference(images)
    torch.manual_seed(1)
    torch.testing.assert_close(model.train()(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [-0.1, 1.0, "0.1"])
def test_rates_that_are_none_are_errors(rate):
    with pytest.raises(InputError, match="proj_drop_rate"):
        build_backbone("pvt_v2_b0", proj_drop_rate=rate)


def test_timms_models_take_timms_own():
    model = build_backbone("timm/test_vit", attn_drop_rate=0.1, proj_drop_rate=0.2)
    assert model.model.blocks[0].attn.attn_drop.p == 0.1
    assert model.model.blocks[0].attn.proj_drop.p == 0.2
