"""EfficientFormer equals timm's on the same weights, in timm's and in the official key layout, and at any size."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.efficientformer import Attention, checkpoint_filter_fn

from backbones import InputError, WeightsError, build_backbone
from backbones.weights import load_weights
from backbones_efficientformer.efficientformer import TIMM

# with 1000 classes and both heads
PARAMETERS = {"efficientformer_l1": 12_289_928, "efficientformer_l3": 31_406_000, "efficientformer_l7": 82_229_328}
STAGES = {"efficientformer_l1": (3, 3), "efficientformer_l3": (4, 2), "efficientformer_l7": (6, 0)}
VARIANTS = [pytest.param(name, marks=() if name.endswith("l1") else pytest.mark.slow) for name in PARAMETERS]


@pytest.fixture(scope="module")
def reference(randomise):
    return randomise(timm.create_model("efficientformer_l1"))


@pytest.fixture(scope="module")
def pair(reference, load_pair):
    return load_pair("efficientformer_l1", reference)


def at_size(reference, height, width):
    """timm's model for images of another size: larger bias tables, by |dy| and |dx|, in all that attends."""
    rows, columns = -(-height // 32), -(-width // 32)
    model = copy.deepcopy(reference)
    for block in model.stages[3].blocks:
        old = getattr(block, "token_mixer", None)
        if isinstance(old, Attention):
            block.token_mixer = Attention(old.qkv.in_features, resolution=(rows, columns))
            state = old.state_dict()
            del state["attention_bias_idxs"]
            signed = torch.tensor([abs(d) for d in range(-6, 7)])
            table = state["attention_biases"].reshape(8, 7, 7)[:, signed][:, :, signed]
            table = F.interpolate(table[None], (2 * rows - 1, 2 * columns - 1), mode="bicubic")[0]
            state["attention_biases"] = table[:, rows - 1 :, columns - 1 :].flatten(1)
            block.token_mixer.load_state_dict(state, strict=False)
    return model.eval()


def official(state):
    """timm's state under the names of the official release."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.(conv|norm)(\d)", lambda m: f"patch_embed.{3 * int(m[2]) - 3 + (m[1] == 'norm')}", key)
        key = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"network.{2 * int(m[1])}", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.conv", lambda m: f"network.{2 * int(m[1]) - 1}.proj", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.norm", lambda m: f"network.{2 * int(m[1]) - 1}.norm", key)
        key = re.sub(r"\.ls(\d)\.gamma$", r".layer_scale_\1", key).replace("head_dist.", "dist_head.")
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    assert_equals_timm(name, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_sizes_equal_timm_with_larger_tables(name, randomise, load_pair, assert_equals_reference):
    reference = randomise(timm.create_model(name))
    classifier, backbone = load_pair(name, reference)
    for size in [(256, 320), (160, 128)]:
        other, images = at_size(reference, *size), torch.randn(1, 3, *size)
        with torch.inference_mode():
            assert_equals_reference(f"{name} logits", classifier(images), other(images))
            expected = other.forward_intermediates(images, intermediates_only=True)
            for stride, ours, theirs in zip(backbone.strides, backbone(images), expected, strict=True):
                assert_equals_reference(f"{name} stride {stride}", ours, theirs)


@pytest.mark.parametrize("size", [(250, 333), (97, 33), (7, 300)])
def test_odd_sizes_equal_timm_with_other_tables(size, reference, pair, assert_equals_reference):
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        assert_equals_reference(f"{size}", pair[0](images), at_size(reference, *size)(images))


def test_one_cell_takes_the_bias_of_distance_zero():
    bias = build_backbone("efficientformer_l1").stages[3].blocks[-1].token_mixer.bias
    with torch.no_grad():
        bias.table.normal_()
        assert torch.equal(bias(1, 1).flatten(), bias.table[:, 0])


@pytest.mark.parametrize(("name", "counts"), STAGES.items())
def test_the_last_blocks_of_the_last_stage_attend(name, counts):
    with torch.device("meta"):
        model = build_backbone(name)
    pools = [sum(type(block).__name__ == "PoolBlock" for block in stage.blocks) for stage in model.stages]
    attends = [sum(hasattr(block, "token_mixer") for block in stage.blocks) for stage in model.stages]
    assert (pools[0], pools[3]) == counts
    assert attends == [0, 0, 0, {"l1": 1, "l3": 4, "l7": 8}[name[-2:]]]


def test_gradients_equal_timm(reference, load_pair, assert_gradients_equal):
    model, _ = load_pair("efficientformer_l1", reference)
    assert_gradients_equal(model, copy.deepcopy(reference), TIMM, size=(224, 224))


def test_training_equals_timm(reference, load_pair, assert_equals_reference):
    """Batch statistics, and the pair of heads, where nothing can be folded."""
    model, _ = load_pair("efficientformer_l1", reference)
    theirs = copy.deepcopy(reference)
    theirs.distilled_training = True
    images = torch.randn(2, 3, 224, 224)
    for ours, expected in zip(model.train()(images), theirs.train()(images), strict=True):
        assert_equals_reference("training", ours, expected)


def test_drop_path_drops_both_branches(reference, load_pair):
    _, backbone = load_pair("efficientformer_l1", reference, drop_path_rate=0.5)
    block = backbone.stages[1].blocks[1].train()
    block.drop_path.drop_prob = 1 - 1e-9
    x = torch.randn(2, 96, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(reference, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone("efficientformer_l1", features_only=False), reference, TIMM)


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = timm.create_model("efficientformer_l1", drop_path_rate=0.3)
    model = build_backbone("efficientformer_l1", drop_path_rate=0.3)
    blocks = [b for stage in reference.stages for b in stage.blocks if hasattr(b, "drop_path1")]
    expected = [getattr(b.drop_path1, "drop_prob", 0.0) for b in blocks]
    ours = [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks if hasattr(b, "drop_path")]
    assert ours == pytest.approx(expected)


def test_folded_layer_scales_and_norms_follow_what_is_learnt(reference, load_pair):
    model, _ = load_pair("efficientformer_l1", reference)
    images = torch.randn(1, 3, 64, 64)
    block = model.stages[0].blocks[0]
    with torch.no_grad():
        before = model(images)
        for changed in (block.ls1.gamma, block.ls2.gamma, block.mlp.norm1.running_mean, block.mlp.norm2.running_var):
            changed.mul_(1.5)
            after = model(images)
            with torch.enable_grad():
                torch.testing.assert_close(after, model(images).detach(), atol=1e-4, rtol=1e-4)
            assert not torch.allclose(before, after, atol=1e-3)
            before = after


def test_official_layout_loads(reference, assert_equals_reference):
    state = official(reference.state_dict())
    assert checkpoint_filter_fn(state, reference).keys() == reference.state_dict().keys()  # the names are right
    model = build_backbone("efficientformer_l1", features_only=False).eval()
    report = load_weights(model, state)
    assert report.layout == "official"
    assert report.share == 1
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert_equals_reference("official layout", model(images), reference(images))


def test_detection_checkpoint_loads_its_backbone(reference, tmp_path, assert_equals_reference):
    state = official(reference.state_dict())
    state = {f"backbone.{k}": v for k, v in state.items() if not k.startswith(("head.", "dist_head.", "norm."))}
    norms = {f"backbone.norm{2 * i}": (torch.rand(c) + 0.5, torch.randn(c)) for i, c in enumerate((48, 96, 224, 448))}
    state |= {f"{k}.{n}": v for k, pair in norms.items() for n, v in zip(("weight", "bias"), pair, strict=True)}
    neck = {f"neck.fpn_convs.{i}.conv.weight": torch.randn(8, 8, 3, 3) for i in range(5)}
    path = tmp_path / "mask_rcnn_efficientformer_l1.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": state | neck, "optimizer": {}}, path)
    with pytest.raises(WeightsError, match=r"8 norms of the maps \(out_norms.0.* ignored: build with out_norm=True"):
        build_backbone("efficientformer_l1", pretrained=path, out_indices=(1, 2, 3))
    backbone = build_backbone("efficientformer_l1", pretrained=path, out_indices=(1, 2, 3), out_norm=True).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.share == 1
    assert not backbone.load_report.missing
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = reference.forward_intermediates(images, intermediates_only=True)[1:]
        for level, ours, theirs in zip((1, 2, 3), backbone(images), expected, strict=True):
            weight, bias = norms[f"backbone.norm{2 * level}"]
            theirs = F.layer_norm(theirs.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
            assert_equals_reference("detection checkpoint", ours, theirs)


def test_tables_of_a_larger_grid_are_resized_on_load(reference, pair):
    state = {k: v for k, v in at_size(reference, 448, 448).state_dict().items() if "idxs" not in k}
    model = build_backbone("efficientformer_l1", features_only=False).eval()
    report = load_weights(model, state)
    name = "stages.3.blocks.4.token_mixer.bias.table"
    assert report.resized == {name: ((8, 196), (8, 49))}
    original = pair[0].get_parameter(name)  # there and back again
    assert torch.corrcoef(torch.stack((model.get_parameter(name).flatten(), original.flatten())))[0, 1] > 0.9


def test_heads_are_a_pair_in_training_and_average_in_eval(pair):
    model = copy.deepcopy(pair[0])
    images = torch.randn(2, 3, 64, 64)
    head, head_dist = model.get_classifier()
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        expected = head(pooled), head_dist(pooled)
        torch.testing.assert_close(model(images), (expected[0] + expected[1]) / 2)
        model.head.train()
        model.training = True
        for ours, theirs in zip(model(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_reset_classifier_replaces_both_heads(pair):
    model = copy.deepcopy(pair[0])
    images = torch.randn(2, 3, 64, 64)
    model.reset_classifier(7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_attention_blocks_out_of_range():
    with pytest.raises(InputError, match="attention_blocks=0 must be at least 1"):
        build_backbone("efficientformer_l1", attention_blocks=0)
    shallow = build_backbone("efficientformer_l3", depths=(1, 1, 1, 1)).eval()  # 4 where there are as many
    assert shallow(torch.randn(1, 3, 32, 32))[-1].shape == (1, 512, 1, 1)
