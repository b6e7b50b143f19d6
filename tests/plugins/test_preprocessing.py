"""What images weights were trained on is said as timm says it, under every name and tag that timm has."""

from types import SimpleNamespace

import pytest
import timm
from timm.data import resolve_data_config

from backbones import backbone_info, build_backbone, list_backbones
from backbones.registry import resolve
from backbones.weights import describe

SPECS = [resolve(name) for name in list_backbones()]
NAMES = [name for spec in SPECS for name in (spec.name, *spec.aliases) if timm.get_pretrained_cfg(name)]
TAGGED = [(spec, row) for spec in SPECS for row in spec.weights if row.timm_name]


def config(cfg, test):
    return resolve_data_config(pretrained_cfg=cfg, use_test_size=test)


def described(spec, row=None):
    model = SimpleNamespace(in_chans=3, pretrained_cfg={})
    describe(model, spec, row)
    return model.pretrained_cfg


def test_timm_has_most_of_our_names():
    assert len(NAMES) > 90
    assert len(TAGGED) > 180
    assert not [spec.name for spec in SPECS if spec.timm_name and not timm.is_model(spec.timm_name)]


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_timms_means_timms_default_weights_and_preprocessing(name, test):
    theirs = timm.get_pretrained_cfg(name).to_dict()
    cfg = described(resolve(name))
    assert config(cfg, test) == config(theirs, test)
    for key in ("pool_size", "test_input_size", "test_crop_pct"):
        assert cfg.get(key) == theirs.get(key)
    if rows := resolve(name).weights:
        assert rows[0].timm_name == f"{name}.{theirs['tag']}"


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize(("spec", "row"), TAGGED, ids=[row.timm_name for _, row in TAGGED])
def test_weights_of_timm_are_described_as_timm_does(spec, row, test):
    theirs = timm.get_pretrained_cfg(row.timm_name, allow_unregistered=False)
    assert config(described(spec, row), test) == config(theirs.to_dict(), test)
    assert row.classes == theirs.num_classes
    assert theirs.hf_hub_id in ("timm/", row.source.removeprefix("hf-hub:"))
    if theirs.license:
        assert row.license.lower() == theirs.license.lower()


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "vit_base_patch16_384", "convnext_tiny", "timm/test_vit"])
def test_a_model_says_so_before_it_has_weights(name, on_meta):
    model = build_backbone(name)
    theirs = timm.create_model(name.removeprefix("timm/") if name != "vit_tiny_patch16" else "vit_tiny_patch16_224")
    assert resolve_data_config({}, model=model) == resolve_data_config({}, model=theirs)
    assert "tag" not in model.pretrained_cfg or name.startswith("timm/")
    assert str(model.transforms()) == str(timm.data.create_transform(**resolve_data_config({}, model=theirs)))


def test_what_the_user_says_stands(on_meta):
    model = build_backbone("vit_tiny_patch16", pretrained_cfg={"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}, in_chans=3)
    cfg = resolve_data_config({}, model=model)
    assert (cfg["mean"], cfg["std"], cfg["crop_pct"]) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), 0.5)


def test_classes_have_names():
    for classes in (1000, 11821, 21841, 21843):
        names = next(row for _, row in TAGGED if row.classes == classes).categories
        assert len(set(names)) > 0.9 * classes
        assert len(names) == classes
    assert backbone_info("vit_b_16").weights[0].categories[:2] == ("tench", "goldfish")
    with pytest.raises(LookupError, match="'dino' are not known"):
        next(row for row in backbone_info("vit_base_patch8").weights if row.tag == "dino").categories  # noqa: B018
