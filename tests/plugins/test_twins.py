"""Twins equals timm's on the same weights, in the key layout that the official release and timm share."""

import pytest
import timm
import torch
import torch.nn.functional as F

from backbones import backbone_info, build_backbone
from backbones.weights import load_weights
from backbones_twins.twins import OFFICIAL

# with 1000 classes
PARAMETERS = {
    "twins_svt_small": 24_060_776,
    "twins_svt_base": 56_070_952,
    "twins_svt_large": 99_271_400,
    "twins_pcpvt_small": 24_106_216,
    "twins_pcpvt_base": 43_828_456,
    "twins_pcpvt_large": 60_989_672,
}
SMALL = ("twins_svt_small", "twins_pcpvt_small")
VARIANTS = [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in PARAMETERS]


@pytest.fixture(scope="module")
def svt(randomise):
    return randomise(timm.create_model("twins_svt_small"))


def timm_stage(reference, i, x):
    """Stage i of timm's model on an image or map that its patches divide."""
    tokens, size = reference.patch_embeds[i](x)
    for j, block in enumerate(reference.blocks[i]):
        tokens = block(tokens, size)
        if j == 0:
            tokens = reference.pos_block[i](tokens, size)
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    assert_equals_timm(name, name, sizes=[(224, 224), (96, 288)])


def test_a_map_that_two_does_not_divide_is_padded(svt, load_pair, assert_equals_reference):
    _, backbone = load_pair("twins_svt_small", svt)
    x = torch.randn(1, 3, 135, 220)  # 34 x 55, 17 x 28, 9 x 14, 5 x 7
    with torch.inference_mode():
        for i, ours in enumerate(backbone(x)):
            side = svt.patch_embeds[i].patch_size[0]
            x = timm_stage(svt, i, F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side)))
            assert_equals_reference(f"padded to {side}", ours, x)


@pytest.mark.parametrize("name", SMALL)
def test_maps_smaller_than_a_reduction_kernel_are_finite(name):
    backbone = build_backbone(name).eval()
    with torch.inference_mode():
        assert all(m.isfinite().all() for m in backbone(torch.randn(1, 3, 9, 40)))


@pytest.mark.usefixtures("on_meta")
def test_svt_attends_in_windows_and_globally_by_turns_and_pcpvt_globally():
    def kinds(name):
        return [[type(b.attn).__name__ for b in stage.blocks] for stage in build_backbone(name).stages]

    both = ["WindowAttention", "SpatialReductionAttention"]
    assert kinds("twins_svt_small") == [both, both, 5 * both, 2 * both]
    assert kinds("twins_pcpvt_small") == [["SpatialReductionAttention"] * depth for depth in (3, 4, 6, 3)]


@pytest.mark.parametrize("name", SMALL)
def test_gradients_equal_timm(name, randomise, load_pair, assert_gradients_equal):
    depths = (2, 2, 2, 2)  # each with a block in windows and one over the whole map, where there are two kinds
    reference = randomise(timm.create_model(name, depths=depths))
    model, _ = load_pair(name, reference, depths=depths)
    assert_gradients_equal(model, reference, OFFICIAL)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(name, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone(name, features_only=False), timm.create_model(name), OFFICIAL)


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = timm.create_model("twins_svt_small", drop_path_rate=0.3)
    model = build_backbone("twins_svt_small", drop_path_rate=0.3)
    expected = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in reference.blocks for b in stage]
    assert [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks] == pytest.approx(expected)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("on_meta")
def test_position_encodings_take_no_weight_decay_as_in_timm(name):
    theirs = OFFICIAL.convert(dict.fromkeys(timm.create_model(name).no_weight_decay()))
    assert build_backbone(name).no_weight_decay() == set(theirs)
    assert len(theirs) == 8


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3)])
def test_detection_checkpoint_of_svt_norms_each_stage_for_the_next(out_indices, svt, tmp_path, assert_equals_reference):
    """Norms of maps that are not asked for are in the way all the same."""
    state = {k: v for k, v in svt.state_dict().items() if not k.startswith(("norm.", "head."))}
    widths = backbone_info("twins_svt_small").channels
    for i, width in enumerate(widths):
        state |= {f"norm_list.{i}.weight": torch.rand(width) + 0.5, f"norm_list.{i}.bias": torch.randn(width)}
    neck = {f"neck.fpn_convs.{i}.conv.weight": torch.randn(8, 8, 3, 3) for i in range(5)}
    path = tmp_path / "retinanet_svt_small.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": {f"backbone.{k}": v for k, v in state.items()} | neck}, path)
    backbone = build_backbone("twins_svt_small", out_indices=out_indices, out_norm=True, pretrained=path).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.share == 1
    assert not backbone.load_report.missing
    x, expected = torch.randn(1, 3, 96, 64), []
    with torch.inference_mode():
        maps = backbone(x)
        for i, width in enumerate(widths):
            weight, bias = state[f"norm_list.{i}.weight"], state[f"norm_list.{i}.bias"]
            x = F.layer_norm(timm_stage(svt, i, x).permute(0, 2, 3, 1), (width,), weight, bias, 1e-6)
            x = x.permute(0, 3, 1, 2)
            expected.append(x)
    for i, ours in zip(out_indices, maps, strict=True):
        assert_equals_reference(f"normed level {i}", ours, expected[i])


def test_classification_checkpoint_fits_a_backbone_with_norms_between_stages(svt, caplog):
    for options in ({"out_norm": True}, {"out_norm": True, "features_only": False}):
        report = load_weights(build_backbone("twins_svt_small", **options), svt.state_dict())
        assert report.share == 1
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_out_norm_of_pcpvt_is_the_maps_own(randomise, assert_equals_reference):
    plain = build_backbone("twins_pcpvt_small").eval()
    normed = build_backbone("twins_pcpvt_small", out_norm=True).eval()
    load_weights(normed, randomise(plain).state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        for ours, x in zip(normed(images), plain(images), strict=True):
            expected = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
            assert_equals_reference("normed", ours, expected)
