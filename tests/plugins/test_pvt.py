"""PVTv2 equals timm's on the same weights, in timm's and in the official key layout."""

import pytest
import timm
import torch
from timm.models.pvt_v2 import checkpoint_filter_fn

from backbones import build_backbone
from backbones.weights import load_weights
from backbones_pvt.pvt_v2 import TIMM

# with 1000 classes
PARAMETERS = {
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "pvt_v2_b2_li": 22_553_512,
    "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072,
    "pvt_v2_b5": 81_956_008,
}
QUICK = ("pvt_v2_b0", "pvt_v2_b2_li")
VARIANTS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PARAMETERS]


@pytest.fixture(scope="module")
def reference(randomise):
    return randomise(timm.create_model("pvt_v2_b0"))


def official(state):
    """timm's state under the names of the official release."""
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "patch_embed":
            key = f"patch_embed1.{rest}"
        elif part == "stages":
            index, part, rest = rest.split(".", 2)
            names = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}
            rest = rest.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
            key = f"{names[part]}{int(index) + 1}.{rest}"
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    assert_equals_timm(name, name, sizes=[(224, 224), (250, 333)])


def test_maps_smaller_than_a_reduction_kernel_are_finite():
    backbone = build_backbone("pvt_v2_b0").eval()
    with torch.inference_mode():
        assert all(m.isfinite().all() for m in backbone(torch.randn(1, 3, 9, 40)))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_gradients_equal_timm(name, randomise, load_pair, assert_gradients_equal):
    reference = randomise(timm.create_model(name, depths=(2, 2, 2, 2)))
    model, _ = load_pair(name, reference, depths=(2, 2, 2, 2))
    assert_gradients_equal(model, reference, TIMM)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(name, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone(name, features_only=False), timm.create_model(name), TIMM)


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = timm.create_model("pvt_v2_b0", drop_path_rate=0.3)
    model = build_backbone("pvt_v2_b0", drop_path_rate=0.3)
    expected = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in reference.stages for b in stage.blocks]
    assert [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks] == pytest.approx(expected)


def test_official_layout_loads(reference, assert_equals_reference):
    state = official(reference.state_dict())
    assert checkpoint_filter_fn(state, reference).keys() == reference.state_dict().keys()  # the names are right
    model = build_backbone("pvt_v2_b0", features_only=False).eval()
    report = load_weights(model, state)
    assert report.layout == "official"
    assert report.share == 1
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(2, 3, 70, 90)
    with torch.inference_mode():
        assert_equals_reference("official layout", model(images), reference(images))


def test_detection_checkpoint_loads_its_backbone(reference, tmp_path, assert_equals_reference):
    state = {f"backbone.{k}": v for k, v in official(reference.state_dict()).items() if not k.startswith("head.")}
    neck = {f"neck.fpn_convs.{i}.conv.weight": torch.randn(8, 8, 3, 3) for i in range(5)}
    path = tmp_path / "retinanet_pvt_v2_b0.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": state | neck, "optimizer": {}}, path)
    backbone = build_backbone("pvt_v2_b0", out_indices=(1, 2, 3), pretrained=path).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.share == 1
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        for ours, theirs in zip(backbone(images), reference.forward_intermediates(images)[1][1:], strict=True):
            assert_equals_reference("detection checkpoint", ours, theirs)


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_in_chans_are_adapted_as_timm_does(in_chans, reference, tmp_path, assert_equals_reference):
    path = tmp_path / "rgb.pth"
    torch.save(reference.state_dict(), path)
    theirs = timm.create_model(
        "pvt_v2_b0", pretrained=True, in_chans=in_chans, pretrained_cfg_overlay={"file": str(path)}
    ).eval()
    ours = build_backbone("pvt_v2_b0", in_chans=in_chans, features_only=False, pretrained=path).eval()
    assert list(ours.load_report.resized) == ["stages.0.embed.proj.weight"]
    images = torch.randn(1, in_chans, 64, 64)
    with torch.inference_mode():
        assert_equals_reference(f"{in_chans} channels", ours(images), theirs(images))


def test_reset_classifier():
    model = build_backbone("pvt_v2_b0", features_only=False).eval()
    images = torch.randn(2, 3, 64, 64)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
