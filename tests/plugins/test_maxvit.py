"""MaxViT equals timm's and torchvision's on the same weights; maps of any size are padded and masked."""

import pytest
import timm
import torch
import torchvision
from timm.models import maxxvit

from backbones import build_backbone
from backbones.weights import load_weights
from backbones_maxvit.maxvit import TIMM, TORCHVISION, PartitionAttention, cut_into_parts

# with 1000 classes
PARAMETERS = {
    "maxvit_tiny": (30_916_528, "maxvit_tiny_tf_224"),
    "maxvit_small": (68_927_956, "maxvit_small_tf_224"),
    "maxvit_base": (119_467_708, "maxvit_base_tf_224"),
    "maxvit_large": (211_785_560, "maxvit_large_tf_224"),
    "maxvit_xlarge": (474_951_952, "maxvit_xlarge_tf_224"),
    "maxvit_nano_rw": (15_451_148, "maxvit_nano_rw_256"),
    "maxvit_tiny_rw": (29_057_312, "maxvit_tiny_rw_224"),
    "maxvit_rmlp_pico_rw": (7_515_980, "maxvit_rmlp_pico_rw_256"),
    "maxvit_rmlp_nano_rw": (15_501_452, "maxvit_rmlp_nano_rw_256"),
    "maxvit_rmlp_tiny_rw": (29_148_896, "maxvit_rmlp_tiny_rw_256"),
    "maxvit_rmlp_small_rw": (64_895_044, "maxvit_rmlp_small_rw_224"),
    "maxvit_rmlp_base_rw": (116_135_788, "maxvit_rmlp_base_rw_224"),
    "maxvit_t": (30_919_624, None),
}
# Between them: MLP biases, tables, TensorFlow's padding and its hidden head.
QUICK = ("maxvit_rmlp_pico_rw", "maxvit_nano_rw", "maxvit_tiny")
# Under random weights, maps grow until float32 cannot tell 1e-4; with its 475M parameters, xlarge is left out there.
DEEP = ("maxvit_base", "maxvit_large", "maxvit_rmlp_base_rw")
VARIANTS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name, (_, timm_name) in PARAMETERS.items()
    if timm_name and name not in (*DEEP, "maxvit_xlarge")
]


@pytest.fixture(scope="module")
def reference(randomise):
    return randomise(timm.create_model("maxvit_rmlp_pico_rw_256"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, *PARAMETERS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    timm_name = PARAMETERS[name][1]
    side = int(timm_name[-3:])
    assert_equals_timm(name, timm_name, sizes=[(side, side)])


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw", "maxvit_tiny"])
def test_any_size_that_parts_divide_equals_timm(name, assert_equals_timm):
    timm_name = PARAMETERS[name][1]
    side = int(timm_name[-3:])
    assert_equals_timm(name, timm_name, sizes=[(side, 2 * side)])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_deep_variants_equal_timm_in_float64(name, randomise, load_pair, assert_equals_reference):
    reference = randomise(timm.create_model(PARAMETERS[name][1])).double()
    classifier, backbone = (model.double() for model in load_pair(name, reference))
    images = torch.randn(1, 3, 224, 224).double()
    with torch.inference_mode():
        assert_equals_reference(f"{name} logits", classifier(images), reference(images))
        expected = reference.forward_intermediates(images, intermediates_only=True)[-4:]
        for stride, ours, theirs in zip(backbone.strides, backbone(images), expected, strict=True):
            assert_equals_reference(f"{name} stride {stride}", ours, theirs)


@pytest.fixture(scope="module")
def torchvision_reference(randomise):
    return randomise(torchvision.models.maxvit_t())


def test_torchvision_logits_and_maps_equal(torchvision_reference, assert_equals_reference):
    state = torchvision_reference.state_dict()
    model = build_backbone("maxvit_t", features_only=False).eval()
    backbone = build_backbone("maxvit_t").eval()
    for built in (model, backbone):
        report = load_weights(built, state)
        assert report.layout == "torchvision"
        assert report.share == 1
        assert not report.missing
        assert not report.mismatched
    left_over = {key for key in model.load_report.unexpected if not key.endswith("relative_position_index")}
    assert not left_over
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert_equals_reference("torchvision logits", model(images), torchvision_reference(images))
        x = torchvision_reference.stem(images)
        for stride, ours, block in zip((4, 8, 16, 32), backbone(images), torchvision_reference.blocks, strict=True):
            x = block(x)
            assert_equals_reference(f"torchvision stride {stride}", ours, x)


@pytest.mark.usefixtures("on_meta")
def test_torchvision_norms_have_the_same_epsilons():
    ours = build_backbone("maxvit_t", features_only=False)
    theirs = torchvision.models.maxvit_t()
    names = {f"{key}.": module.eps for key, module in theirs.named_modules() if hasattr(module, "eps")}
    assert {f"{k}.": m.eps for k, m in ours.named_modules() if hasattr(m, "eps")} == TORCHVISION.convert(names)


def test_torchvision_head_keeps_its_lack_of_a_bias():
    model = build_backbone("maxvit_t", features_only=False).eval()
    model.reset_classifier(5)
    assert model.head.bias is None
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw", "maxvit_tiny"])
def test_gradients_equal_timm(name, randomise, load_pair, assert_gradients_equal):
    depths = (1, 1, 2, 1)
    reference = randomise(timm.create_model(PARAMETERS[name][1], img_size=128, depths=depths))
    model, _ = load_pair(name, reference, partition=4, depths=depths)
    # Tables lie the other way round in timm's TensorFlow variants.
    layout = TIMM if name != "maxvit_tiny" else _Flipped()
    assert_gradients_equal(model, reference, layout, size=(128, 128))


class _Flipped:
    def convert(self, state):
        return {
            key: value.flip(1, 2).flatten(1).t() if key.endswith("table") else value
            for key, value in TIMM.convert(state).items()
        }


@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw", "maxvit_tiny", "maxvit_rmlp_base_rw"])
@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(name, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone(name, features_only=False), timm.create_model(PARAMETERS[name][1]), TIMM)


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = timm.create_model("maxvit_rmlp_pico_rw_256", drop_path_rate=0.3)
    model = build_backbone("maxvit_rmlp_pico_rw", drop_path_rate=0.3)
    for ours, theirs in zip(
        (block for stage in model.stages for block in stage),
        (block for stage in reference.stages for block in stage.blocks),
        strict=True,
    ):
        expected = [theirs.conv.drop_path, theirs.attn_block.drop_path1, theirs.attn_grid.drop_path2]
        rates = [part.drop_path.drop_prob for part in (ours.conv, ours.window, ours.grid)]
        assert rates == pytest.approx([getattr(module, "drop_prob", 0.0) for module in expected])


@pytest.mark.usefixtures("on_meta")
def test_weight_decay_spares_what_timm_spares():
    for name in ("maxvit_rmlp_pico_rw", "maxvit_nano_rw"):
        theirs = timm.create_model(PARAMETERS[name][1]).no_weight_decay()
        assert build_backbone(name).no_weight_decay() == set(TIMM.convert(dict.fromkeys(theirs)))


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("size", [(14, 21), (13, 9), (1, 1), (7, 20), (8, 30)])
def test_parts_are_put_back_where_they_came_from(size, grid):
    x = torch.randn(2, *size, 3)
    gather, padding, scatter = cut_into_parts(2, *size, x.device, 7, grid)
    parts = x.flatten(0, 2)[gather]
    assert torch.equal(parts[scatter].view_as(x), x)
    assert not padding[scatter].any()
    assert (~padding).sum() == 2 * size[0] * size[1]
    assert not padding.view(-1, 49).all(1).any()  # no softmax over nothing
    if size == (14, 21):
        partition = maxxvit.grid_partition if grid else maxxvit.window_partition
        assert torch.equal(parts, partition(x, [7, 7]).flatten(0, 2))


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (5, 6), (1, 1)])
def test_gradients_of_parts_are_those_of_finite_differences(grid, size):
    layer = PartitionAttention(32, 4, 1, grid, "gelu", 1e-6, True, False, None, None, 0.0).double()
    x = torch.randn(2, *size, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.attend, x, fast_mode=True)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("size", [(9, 12), (2, 3), (15, 7), (1, 1)])
def test_padding_is_masked(grid, size, randomise):
    """Each part attends among its real cells alone, as if the padding were not there."""
    height, width = size
    layer = randomise(
        PartitionAttention(
            32, 7, 1, grid, "gelu", 1e-6, True, False, position_hidden=None, init_values=None, drop_path=0.0
        )
    )
    x = torch.randn(2, *size, 32)
    rows, columns = -(-height // 7), -(-width // 7)
    attn = layer.attn
    q, k, v = attn.qkv(x).unflatten(-1, (1, 3, 32))[:, :, :, 0].unbind(3)
    table = attn.rel_pos.table[:, 0].unflatten(0, (13, 13))
    expected = torch.empty_like(x)

    def part_and_place(i, count):
        return (i % count, i // count) if grid else (i // 7, i % 7)

    for y in range(height):
        for z in range(width):
            (part_y, place_y), (part_z, place_z) = part_and_place(y, rows), part_and_place(z, columns)
            keys = [
                (a, b)
                for a in range(height)
                for b in range(width)
                if part_and_place(a, rows)[0] == part_y and part_and_place(b, columns)[0] == part_z
            ]
            bias = torch.stack(
                [
                    table[
                        place_y - part_and_place(a, rows)[1] + 6,
                        place_z - part_and_place(b, columns)[1] + 6,
                    ]
                    for a, b in keys
                ]
            )
            key = torch.stack([k[:, a, b] for a, b in keys], dim=1)
            value = torch.stack([v[:, a, b] for a, b in keys], dim=1)
            weights = (torch.einsum("bc,bnc->bn", q[:, y, z], key) * 32**-0.5 + bias).softmax(-1)
            expected[:, y, z] = torch.einsum("bn,bnc->bc", weights, value)
    torch.testing.assert_close(layer.attend(x), attn.proj(expected), atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # from the cache, the second time
        for _ in range(2):
            torch.testing.assert_close(layer.attend(x), attn.proj(expected), atol=1e-5, rtol=1e-5)


def test_weights_of_another_partition_are_resized(randomise):
    source = randomise(timm.create_model("maxvit_tiny_tf_384"))
    model = build_backbone("maxvit_tiny", out_indices=(0,))
    report = load_weights(model, source.state_dict())
    assert report.share == 1
    assert report.resized["stages.0.0.window.attn.rel_pos.table"] == ((2, 23, 23), (169, 2))


def test_weights_of_another_partition_are_exact_where_it_is_built(assert_equals_timm):
    assert_equals_timm("maxvit_nano_rw", "maxvit_nano_rw_256", [(128, 256)], None, {"img_size": 128}, partition=4)


def test_detection_checkpoint_loads_its_backbone(reference, tmp_path, assert_equals_reference):
    state = {f"backbone.{k}": v for k, v in reference.state_dict().items() if not k.startswith(("head.", "norm."))}
    path = tmp_path / "retinanet_maxvit.pth"
    torch.save({"state_dict": state | {"neck.weight": torch.randn(8, 8)}}, path)
    backbone = build_backbone("maxvit_rmlp_pico_rw", out_indices=(1, 2, 3), pretrained=path).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.share == 1
    images = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        expected = reference.forward_intermediates(images, intermediates_only=True)[-3:]
        for ours, theirs in zip(backbone(images), expected, strict=True):
            assert_equals_reference("detection checkpoint", ours, theirs)


def test_names_are_those_that_timm_loads(reference):
    state = reference.state_dict()
    assert maxxvit.checkpoint_filter_fn(state, reference).keys() == state.keys()
    own = build_backbone("maxvit_rmlp_pico_rw", features_only=False).state_dict()
    assert TIMM.convert(state).keys() == own.keys()


def test_reset_classifier_keeps_the_hidden_layer():
    model = build_backbone("maxvit_tiny", features_only=False).eval()
    hidden = model.pre_logits.fc.weight.clone()
    images = torch.randn(1, 3, 32, 32)
    model.reset_classifier(7)
    assert model(images).shape == (1, 7)
    assert torch.equal(model.pre_logits.fc.weight, hidden)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
