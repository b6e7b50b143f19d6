"""PVTv2 equals timm's on the same weights, in timm's and in the official key layout."""

import pytest
import timm
import torch
from timm.models.pvt_v2 import checkpoint_filter_fn

from backbones import backbone_info, build_backbone
from backbones.weights import load_weights

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


def count(model):
    return sum(p.numel() for p in model.parameters())


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
def test_parameters_are_as_published(name):
    with torch.device("meta"):
        assert count(timm.create_model(name)) == PARAMETERS[name]
        classifier = build_backbone(name, features_only=False)
        assert count(classifier) == PARAMETERS[name]
        assert count(build_backbone(name)) == PARAMETERS[name] - count(classifier.head)
    assert backbone_info(name).params == round(PARAMETERS[name] / 1e6, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, randomise, assert_equals_reference):
    reference = randomise(timm.create_model(name))
    classifier = build_backbone(name, features_only=False).eval()
    backbone = build_backbone(name).eval()
    assert not load_weights(classifier, reference.state_dict()).missing
    assert not load_weights(backbone, reference.state_dict()).missing
    for size in [(224, 224), (250, 333)]:
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            features = reference.forward_features(images)
            expected = reference.forward_intermediates(images, intermediates_only=True)
            assert_equals_reference(f"{name} logits", classifier(images), reference(images))
            assert_equals_reference(f"{name} features", classifier.forward_features(images), features)
            pooled = classifier.forward_head(features, pre_logits=True)
            assert_equals_reference(f"{name} pre-logits", pooled, reference.forward_head(features, pre_logits=True))
            for stride, ours, theirs in zip(backbone.strides, backbone(images), expected, strict=True):
                assert_equals_reference(f"{name} stride {stride}", ours, theirs)


def test_maps_smaller_than_a_reduction_kernel_are_finite():
    backbone = build_backbone("pvt_v2_b0").eval()
    with torch.inference_mode():
        assert all(m.isfinite().all() for m in backbone(torch.randn(1, 3, 9, 40)))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_gradients_equal_timm(name, randomise, assert_equals_reference):
    reference = randomise(timm.create_model(name))
    model = build_backbone(name, features_only=False).eval()
    load_weights(model, reference.state_dict())
    images, upstream = torch.randn(2, 3, 64, 96), torch.randn(2, 1000) / 1000
    (model(images) * upstream).sum().backward()
    (reference(images) * upstream).sum().backward()
    theirs = {k: p.grad for k, p in reference.named_parameters()}
    theirs = model.key_layouts[0].convert(theirs)
    for key, parameter in model.named_parameters():
        scale = theirs[key].abs().max().clamp(min=1e-3)
        assert (parameter.grad - theirs[key]).abs().max() <= 1e-4 * scale, key


@pytest.mark.parametrize("name", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_norms_have_the_epsilon_of_timm(name):
    """Which random activations are too large to show."""
    model, reference = build_backbone(name, features_only=False), timm.create_model(name)
    ours = {f"{key}.": module.eps for key, module in model.named_modules() if hasattr(module, "eps")}
    theirs = {f"{key}.": module.eps for key, module in reference.named_modules() if hasattr(module, "eps")}
    assert ours == model.key_layouts[0].convert(theirs)
    assert {1e-5, 1e-6} == set(ours.values())


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


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_weights_are_those_timm_knows(name):
    for row in backbone_info(name).weights:
        theirs = timm.get_pretrained_cfg(row.source.removeprefix("hf-hub:timm/"), allow_unregistered=False)
        assert theirs.hf_hub_id in ("timm/", row.source.removeprefix("hf-hub:"))
        for field in ("input_size", "mean", "std", "interpolation"):
            assert getattr(row, field) == getattr(theirs, field), (row.tag, field)
