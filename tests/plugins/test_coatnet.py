"""CoAtNet equals timm's on the same weights; its tables fit any map."""

import pytest
import timm
import torch
from timm.models.maxxvit import checkpoint_filter_fn

from backbones import InputError, build_backbone
from backbones.weights import load_weights
from backbones_coatnet import coatnet
from backbones_coatnet.coatnet import TIMM

# with 1000 classes
PARAMETERS = {
    "coatnet_0": 25_036_820,
    "coatnet_1": 42_225_776,
    "coatnet_2": 74_684_744,
    "coatnet_3": 166_966_264,
    "coatnet_4": 275_425_288,
    "coatnet_nano_rw": 15_141_244,
    "coatnet_0_rw": 27_435_562,
    "coatnet_1_rw": 41_721_502,
    "coatnet_2_rw": 73_868_400,
    "coatnet_3_rw": 165_173_428,
    "coatnet_bn_0_rw": 27_435_562,
    "coatnet_rmlp_nano_rw": 15_145_116,
    "coatnet_rmlp_0_rw": 27_446_074,
    "coatnet_rmlp_1_rw": 41_691_982,
    "coatnet_rmlp_1_rw2": 41_724_622,
    "coatnet_rmlp_2_rw": 73_881_264,
}
# Between them: hidden head, both ways to stride, MLP biases.
QUICK = ("coatnet_0", "coatnet_nano_rw", "coatnet_rmlp_nano_rw")
VARIANTS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in PARAMETERS
    if name != "coatnet_bn_0_rw"
]


@pytest.fixture(scope="module")
def reference(randomise):
    return randomise(timm.create_model("coatnet_nano_rw_224"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=f"{name}_224")


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    assert_equals_timm(name, f"{name}_224")


def test_batch_norms_equal_timm(randomise, load_pair, assert_equals_reference):
    # In float64, because random statistics let the maps grow to hundreds.
    reference = randomise(timm.create_model("coatnet_bn_0_rw_224")).double()
    classifier, backbone = (model.double() for model in load_pair("coatnet_bn_0_rw", reference))
    images = torch.randn(1, 3, 224, 224).double()
    with torch.inference_mode():
        assert_equals_reference("logits", classifier(images), reference(images))
        expected = reference.forward_intermediates(images, intermediates_only=True)[-4:]
        for stride, ours, theirs in zip(backbone.strides, backbone(images), expected, strict=True):
            assert_equals_reference(f"stride {stride}", ours, theirs)


@pytest.mark.parametrize("size", [(256, 256), (192, 320)])
def test_another_image_size_equals_timm_built_for_it(size, assert_equals_timm):
    timm_options = {"img_size": size}
    assert_equals_timm("coatnet_nano_rw", "coatnet_nano_rw_224", [size], None, timm_options, img_size=size)


def test_mlp_biases_need_no_image_size(assert_equals_timm):
    timm_options = {"img_size": (192, 320)}
    assert_equals_timm("coatnet_rmlp_nano_rw", "coatnet_rmlp_nano_rw_224", [(192, 320)], None, timm_options)


@pytest.mark.parametrize("name", ["coatnet_nano_rw", "coatnet_rmlp_nano_rw"])
def test_bands_of_queries_attend_as_the_whole_map_does(name, randomise, monkeypatch):
    model = randomise(build_backbone(name))
    images = torch.randn(2, 3, 100, 180)
    with torch.inference_mode():
        expected = model(images)
        monkeypatch.setattr(coatnet, "WHOLE_BIAS", 0)
        monkeypatch.setattr(coatnet, "BAND_BIAS", 4 * 12 * 84 * 3)  # three rows of stride 16 at a time, of seven
        for ours, whole in zip(model(images), expected, strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_folded_norms_equal_the_norms(randomise):
    for name in ("coatnet_nano_rw", "coatnet_bn_0_rw"):
        model = randomise(build_backbone(name, out_indices=(0, 1)))
        images = torch.randn(1, 3, 61, 75)
        with torch.no_grad():
            folded = model(images)
        for ours, whole in zip(folded, model(images), strict=True):
            assert whole.requires_grad
            torch.testing.assert_close(ours, whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["coatnet_nano_rw", "coatnet_rmlp_nano_rw", "coatnet_0", "coatnet_bn_0_rw"])
def test_gradients_equal_timm(name, randomise, load_pair, assert_gradients_equal):
    options = {"img_size": (64, 96), "depths": (1, 2, 2, 1)}
    reference = randomise(timm.create_model(f"{name}_224", **options))
    model, _ = load_pair(name, reference, **options)
    assert_gradients_equal(model, reference, TIMM)


@pytest.mark.parametrize("name", ["coatnet_nano_rw", "coatnet_0", "coatnet_bn_0_rw"])
@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(name, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone(name, features_only=False), timm.create_model(f"{name}_224"), TIMM)


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = timm.create_model("coatnet_nano_rw_224", drop_path_rate=0.3)
    model = build_backbone("coatnet_nano_rw", drop_path_rate=0.3)
    expected = [
        getattr(getattr(block, "drop_path", None) or block.drop_path1, "drop_prob", 0.0)
        for stage in reference.stages
        for block in stage.blocks
    ]
    assert [block.drop_path.drop_prob for stage in model.stages for block in stage] == pytest.approx(expected)


def test_mlp_biases_drop_units_in_training_as_timm_does():
    bias = build_backbone("coatnet_rmlp_nano_rw").stages[2][0].attn.rel_pos
    reference = timm.create_model("coatnet_rmlp_nano_rw_224").stages[2].blocks[0].attn.rel_pos
    assert bias.dropout.p == reference.mlp.drop1.p
    assert not torch.equal(bias(3, 3), bias(3, 3))
    assert torch.equal(bias.eval()(3, 3), bias(3, 3))


@pytest.mark.usefixtures("on_meta")
def test_weight_decay_spares_what_timm_spares():
    for name in ("coatnet_nano_rw", "coatnet_rmlp_nano_rw"):
        theirs = timm.create_model(f"{name}_224").no_weight_decay()
        assert build_backbone(name).no_weight_decay() == set(TIMM.convert(dict.fromkeys(theirs)))


def test_tables_of_another_image_size_are_resized(randomise):
    source = randomise(timm.create_model("coatnet_nano_rw_224", img_size=256))
    model = build_backbone("coatnet_nano_rw")
    report = load_weights(model, source.state_dict())
    assert report.share == 1
    assert set(report.resized) == {n for n, _ in model.named_parameters() if n.endswith("rel_pos.table")}
    assert report.resized["stages.2.0.attn.rel_pos.table"] == ((31 * 31, 4), (27 * 27, 4))


def test_detection_checkpoint_loads_its_backbone(reference, tmp_path, assert_equals_reference):
    state = {f"backbone.{k}": v for k, v in reference.state_dict().items() if not k.startswith(("head.", "norm."))}
    path = tmp_path / "retinanet_coatnet.pth"
    torch.save({"state_dict": state | {"neck.weight": torch.randn(8, 8)}}, path)
    backbone = build_backbone("coatnet_nano_rw", out_indices=(1, 2, 3), pretrained=path).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.share == 1
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = reference.forward_intermediates(images, intermediates_only=True)[-3:]
        for ours, theirs in zip(backbone(images), expected, strict=True):
            assert_equals_reference("detection checkpoint", ours, theirs)


def test_names_are_those_that_timm_loads(reference):
    state = reference.state_dict()
    assert checkpoint_filter_fn(state, reference).keys() == state.keys()
    own = build_backbone("coatnet_nano_rw", features_only=False).state_dict()
    assert TIMM.convert(state).keys() == own.keys()


def test_reset_classifier_keeps_the_hidden_layer():
    model = build_backbone("coatnet_0", features_only=False).eval()
    hidden = model.pre_logits.fc.weight.clone()
    images = torch.randn(1, 3, 64, 64)
    model.reset_classifier(7)
    assert model(images).shape == (1, 7)
    assert torch.equal(model.pre_logits.fc.weight, hidden)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("option", [{"stride_mode": "1x1"}, {"pool": "avg2"}, {"norm": "group"}])
def test_unknown_options_are_named(option):
    with pytest.raises(InputError, match=rf"CoAtNet: {next(iter(option))}=.* is unknown; choose from"):
        build_backbone("coatnet_nano_rw", **option)
