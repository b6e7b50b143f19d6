"""ConvNeXt equals timm's and torchvision's on the same weights, dilated or not, in every key layout."""

import re

import pytest
import timm
import torch
import torchvision
from timm.models.convnext import checkpoint_filter_fn

from backbones import backbone_info, build_backbone
from backbones.weights import load_weights
from backbones_convnext.convnext import TIMM

# with 1000 classes
PARAMETERS = {
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_xlarge": 350_196_968,
}
QUICK = ("convnext_tiny",)
VARIANTS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PARAMETERS]


@pytest.fixture(scope="module")
def reference(randomise):
    return randomise(timm.create_model("convnext_tiny"))


def official(state):
    """timm's state under the names of the official release."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        key = key.replace("conv_dw.", "dwconv.").replace("mlp.fc", "pwconv").replace(".blocks.", ".")
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        renamed[re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)] = value
    return renamed


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    assert_equals_timm(name, name, sizes=[(224, 224), (160, 288)])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_maps_equal_timm(name, output_stride, assert_equals_timm):
    options = {"output_stride": output_stride}
    assert_equals_timm(name, name, sizes=[(96, 160)], timm_options=options, **options)
    assert build_backbone(name, **options).strides == [min(stride, output_stride) for stride in (4, 8, 16, 32)]


def test_logits_equal_torchvision(randomise, load_pair, assert_equals_reference):
    reference = randomise(torchvision.models.convnext_tiny())
    classifier, backbone = load_pair("convnext_tiny", reference)
    assert classifier.load_report.layout == backbone.load_report.layout == "torchvision"
    gammas = [shape for key, shape in classifier.load_report.resized.items() if key.endswith(".gamma")]
    assert len(gammas) == len(classifier.load_report.resized) == 18  # (C, 1, 1) there, (C,) here
    for size in [(224, 224), (96, 160)]:
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            assert_equals_reference("torchvision logits", classifier(images), reference(images))
            for i, ours in enumerate(backbone(images)):
                theirs = reference.features[: 2 * i + 2](images)
                assert_equals_reference(f"torchvision stride {backbone.strides[i]}", ours, theirs)


def test_a_map_that_two_does_not_divide_is_padded_after_its_norm(reference, load_pair, assert_equals_reference):
    """An odd map keeps its last row and column, beside zeros."""
    _, backbone = load_pair("convnext_tiny", reference)
    images = torch.randn(1, 3, 36, 52)  # 9 x 13, 5 x 7, 3 x 4, 2 x 2
    with torch.inference_mode():
        maps = backbone(images)
        x = reference.stages[0](reference.stem(images))
        assert_equals_reference("stride 4", maps[0], x)
        for ours, stage in zip(maps[1:], list(reference.stages)[1:], strict=True):
            norm, conv = stage.downsample
            x = torch.nn.functional.pad(norm(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            x = stage.blocks(conv(x))
            assert_equals_reference("padded", ours, x)


@pytest.mark.parametrize("output_stride", [8, 32])
def test_gradients_equal_timm(output_stride, randomise, load_pair, assert_gradients_equal):
    options = {"output_stride": output_stride, "depths": (1, 1, 1, 1)}
    reference = randomise(timm.create_model("convnext_tiny", **options))
    model, _ = load_pair("convnext_tiny", reference, **options)
    assert_gradients_equal(model, reference, TIMM)


@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(reference, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone("convnext_tiny", features_only=False), reference, TIMM)


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = timm.create_model("convnext_tiny", drop_path_rate=0.3)
    model = build_backbone("convnext_tiny", drop_path_rate=0.3)
    expected = [getattr(b.drop_path, "drop_prob", 0.0) for stage in reference.stages for b in stage.blocks]
    assert [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks] == pytest.approx(expected)


def test_layer_scale_starts_small_or_as_asked():
    for options, expected in [({}, 1e-6), ({"layer_scale": 1.0}, 1.0)]:
        gamma = build_backbone("convnext_tiny", out_indices=(0,), **options).stages[0].blocks[0].gamma
        torch.testing.assert_close(gamma.detach(), torch.full((96,), expected))


def test_official_layout_loads(reference, assert_equals_reference):
    state = official(reference.state_dict())
    assert checkpoint_filter_fn(state, reference).keys() == reference.state_dict().keys()  # the names are right
    model = build_backbone("convnext_tiny", features_only=False).eval()
    report = load_weights(model, {"model": state})
    assert report.layout == "official"
    assert report.share == 1
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert_equals_reference("official layout", model(images), reference(images))


@pytest.mark.parametrize("spelling", ["official", "OpenMMLab"])
def test_segmentation_checkpoint_loads_its_backbone_and_its_norms(
    spelling, reference, tmp_path, assert_equals_reference
):
    state = {k: v for k, v in official(reference.state_dict()).items() if not k.startswith(("head.", "norm."))}
    if spelling == "OpenMMLab":
        state = {k.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv"): v for k, v in state.items()}
    widths = backbone_info("convnext_tiny").channels
    for i, width in enumerate(widths):
        state |= {f"norm{i}.weight": torch.rand(width) + 0.5, f"norm{i}.bias": torch.randn(width)}
    neck = {"decode_head.conv_seg.weight": torch.randn(8, 8, 1, 1)}
    path = tmp_path / "upernet_convnext_tiny.pth"
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in state.items()} | neck}, path)
    backbone = build_backbone("convnext_tiny", out_indices=(1, 3), out_norm=True, pretrained=path).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.share == 1
    assert not backbone.load_report.missing
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        expected = reference.forward_intermediates(images, intermediates_only=True)
        for i, ours in zip(backbone.out_indices, backbone(images), strict=True):
            x = expected[i].permute(0, 2, 3, 1)
            weight, bias = state[f"norm{i}.weight"], state[f"norm{i}.bias"]
            x = torch.nn.functional.layer_norm(x, widths[i : i + 1], weight, bias, 1e-6).permute(0, 3, 1, 2)
            assert_equals_reference(f"{spelling} level {i}", ours, x)
