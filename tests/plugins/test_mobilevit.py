"""MobileViT and MobileViTv2 equal timm's on the same weights; odd maps come back in their own size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.mobilevit import LinearSelfAttention
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

from backbones import build_backbone
from backbones.weights import load_weights
from backbones_mobilevit.common import TIMM
from backbones_mobilevit.mobilevit_v2 import SeparableAttention

# with 1000 classes
PARAMETERS = {
    "mobilevit_xxs": 1_272_024,
    "mobilevit_xs": 2_317_848,
    "mobilevit_s": 5_578_632,
    "mobilevitv2_050": 1_370_593,
    "mobilevitv2_075": 2_866_009,
    "mobilevitv2_100": 4_901_841,
    "mobilevitv2_125": 7_478_089,
    "mobilevitv2_150": 10_594_753,
    "mobilevitv2_175": 14_251_833,
    "mobilevitv2_200": 18_449_329,
}
SMALLEST = ("mobilevit_xxs", "mobilevitv2_050")
QUICK = (*SMALLEST, "mobilevit_xs", "mobilevitv2_100")
VARIANTS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PARAMETERS]
smallest = pytest.mark.parametrize("name", SMALLEST)


def stage_outputs(reference, images):
    """timm's maps at strides 4 to 32, the last before the classifier's 1x1 convolution."""
    return reference.forward_intermediates(images, intermediates_only=True, exclude_final_conv=True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    sizes = [(256, 256), (320, 192)]
    if not name.startswith("mobilevitv2"):
        sizes += [(224, 224), (97, 161)]  # odd maps at stride 32, and at all strides
    assert_equals_timm(name, name, sizes, maps=stage_outputs)


@pytest.mark.parametrize("output_stride", [8, 16])
@smallest
def test_dilated_maps_equal_timm(name, output_stride, assert_equals_timm):
    options = {"output_stride": output_stride}
    assert_equals_timm(name, name, [(128, 192)], maps=stage_outputs, timm_options=options, **options)


def test_odd_maps_of_v2_keep_their_size_and_equal_timm_up_to_there(randomise, load_pair, assert_equals_reference):
    reference = randomise(timm.create_model("mobilevitv2_050"))
    classifier, backbone = load_pair("mobilevitv2_050", reference)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        maps, theirs = backbone(images), stage_outputs(reference, images)[1:]
        for ours, expected in zip(maps[:3], theirs[:3], strict=True):
            assert_equals_reference("before the odd map", ours, expected)
        assert maps[3].shape[2:] == (7, 7)
        assert theirs[3].shape[2:] == (8, 8)  # never resized back
        resized = F.interpolate(theirs[3], size=(7, 7), mode="bilinear", align_corners=True)
        assert_equals_reference("the odd map, resized back", maps[3], resized)
        assert classifier(images).shape == (1, 1000)


@smallest
def test_gradients_equal_timm(name, randomise, load_pair, assert_gradients_equal):
    reference = randomise(timm.create_model(name))
    model, _ = load_pair(name, reference)
    assert_gradients_equal(model, reference, TIMM, size=(64, 128))


@smallest
def test_gradients_in_training_mode_equal_timm(name, randomise, load_pair, assert_gradients_equal):
    reference = randomise(timm.create_model(name))
    model, _ = load_pair(name, reference)
    assert_gradients_equal(model.train(), reference.train(), TIMM, size=(128, 64))


@smallest
@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(name, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone(name, features_only=False), timm.create_model(name), TIMM)


@smallest
@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm_where_there_is_a_residual(name):
    reference = timm.create_model(name, drop_path_rate=0.3)
    theirs = {f"{k}.": m.drop_prob for k, m in reference.named_modules() if hasattr(m, "drop_prob")}
    theirs = {k.replace("drop_path1.", "drop_path."): rate for k, rate in TIMM.convert(theirs).items()}
    model = build_backbone(name, drop_path_rate=0.3)
    ours = {f"{k}.": m.drop_prob for k, m in model.named_modules() if hasattr(m, "drop_prob")}
    assert len(ours) > 9
    assert ours == {k: pytest.approx(theirs.get(k, 0.0)) for k in ours}  # timm has no module where the rate is 0


def test_separable_attention_equals_the_published_form(randomise):
    reference = randomise(LinearSelfAttention(24))
    ours = SeparableAttention(24).eval()
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 24, 6, 10)
    patches = x.unflatten(3, (5, 2)).unflatten(2, (3, 2)).permute(0, 1, 3, 5, 2, 4).reshape(2, 24, 4, 15)
    expected = reference(patches).reshape(2, 24, 2, 2, 3, 5).permute(0, 1, 4, 2, 5, 3).reshape(2, 24, 6, 10)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():  # writes over its values there
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_v2_is_linear_in_pixels():
    def multiply_adds(side):
        with torch.device("meta"):
            model, images = build_backbone("mobilevitv2_050").eval(), torch.randn(1, 3, side, side)
        with FlopCounterMode(display=False) as counter:
            model(images)
        return counter.get_total_flops()

    assert multiply_adds(1024) / multiply_adds(256) == pytest.approx(16, rel=0.01)


@smallest
def test_detection_checkpoint_loads_its_backbone(name, randomise, tmp_path, assert_equals_reference):
    reference = randomise(timm.create_model(name))
    state = {f"backbone.{k}": v for k, v in reference.state_dict().items() if not k.startswith(("head", "final_conv"))}
    neck = {f"neck.fpn_convs.{i}.conv.weight": torch.randn(8, 8, 3, 3) for i in range(5)}
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": state | neck}, path)
    backbone = build_backbone(name, out_indices=(1, 2, 3), pretrained=path).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.layout == "timm"
    assert backbone.load_report.share == 1
    images = torch.randn(1, 3, 64, 128)
    with torch.inference_mode():
        for ours, theirs in zip(backbone(images), stage_outputs(reference, images)[2:], strict=True):
            assert_equals_reference("detection checkpoint", ours, theirs)


@smallest
def test_in_chans_are_adapted_as_timm_does(name, randomise, tmp_path, assert_equals_reference):
    path = tmp_path / "rgb.pth"
    torch.save(randomise(timm.create_model(name)).state_dict(), path)
    theirs = timm.create_model(name, pretrained=True, in_chans=4, pretrained_cfg_overlay={"file": str(path)}).eval()
    ours = build_backbone(name, in_chans=4, features_only=False, pretrained=path).eval()
    assert list(ours.load_report.resized) == ["stem.0.conv.weight"]
    images = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        assert_equals_reference("4 channels", ours(images), theirs(images))


def test_a_checkpoint_of_another_width_does_not_fit():
    from backbones import WeightsError

    with pytest.raises(WeightsError, match="Check that it is of this variant"):
        load_weights(build_backbone("mobilevitv2_050"), timm.create_model("mobilevitv2_075").state_dict())


def test_the_published_expansion_belongs_to_the_classifier():
    assert build_backbone("mobilevit_xxs").out_channels[-1] == build_backbone("mobilevit_xxs").num_features == 80
    model = build_backbone("mobilevit_xxs", features_only=False).eval()
    images = torch.randn(1, 3, 64, 64)
    assert model.forward_features(images).shape == (1, 320, 2, 2)
    model.reset_classifier(7)
    assert model.num_features == model.get_classifier().in_features == 320
    assert model(images).shape == (1, 7)


@smallest
def test_layer_decay_counts_every_transformer(name):
    model = build_backbone(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    block = "stages.2.1"
    order = [f"{block}.local.conv", *(f"{block}.transformer.{i}.norm1" for i in range(4)), "stages.3.0.expand.conv"]
    scales = [scale[f"{part}.weight"] for part in order]
    assert scales == [scales[0] * 2**i for i in range(6)]
    assert scale[f"{block}.project.conv.weight"] == scale[f"{block}.transformer.3.norm1.weight"]
