"""Swin equals timm's and torchvision's on the same weights, and the official dense code on maps of any size."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.swin_transformer import SwinTransformerBlock, checkpoint_filter_fn, window_partition, window_reverse

from backbones import InputError, build_backbone
from backbones.weights import load_weights
from backbones_swin.swin import TIMM, Block, SwinTransformer, Windows

# with 1000 classes
PARAMETERS = {
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
    "swin_large": 196_532_476,
}
VARIANTS = [pytest.param(name, marks=() if name == "swin_tiny" else pytest.mark.slow) for name in PARAMETERS]
NARROW = {"dims": (32, 64, 128, 256), "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8)}
TIMM_NARROW = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def timm_name(name):
    return f"{name}_patch4_window7_224"


@pytest.fixture(scope="module")
def reference(randomise):
    return randomise(timm.create_model(timm_name("swin_tiny")))


@pytest.fixture
def dense_code(monkeypatch):
    """timm's maps with windows as the official dense code has them.

    That one pads before it shifts. timm pads what is shifted already, so that its mask, made for the padded size,
    sits beside the seam wherever the window does not divide the map, and cells from opposite ends attend to each
    other.
    """

    def attend(block, x):
        height, width = x.shape[1:3]
        (wh, ww), (sh, sw) = block.window_size, block.shift_size
        x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        padded = x.shape[1:3]
        x = torch.roll(x, (-sh, -sw), (1, 2))
        mask = block.get_attn_mask(x)
        windows = block.attn(window_partition(x, (wh, ww)).flatten(1, 2), mask=mask)
        x = window_reverse(windows.unflatten(1, (wh, ww)), (wh, ww), *padded)
        return torch.roll(x, (sh, sw), (1, 2))[:, :height, :width]

    def maps(reference, images):
        model = copy.deepcopy(reference)
        model.set_input_size(always_partition=True)
        model.patch_embed.strict_img_size = False
        monkeypatch.setattr(SwinTransformerBlock, "_attn", attend)
        outputs = model.forward_intermediates(images, intermediates_only=True)
        monkeypatch.undo()
        return outputs

    return maps


def official(state):
    """timm's state under the names of the official release, which saves its buffers too."""
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "layers" and rest[1:].startswith(".downsample"):
            key = f"layers.{int(rest[0]) - 1}{rest[1:]}"
        key = key.replace("head.fc.", "head.")
        renamed[key] = value
        if key.endswith("relative_position_bias_table"):
            renamed[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
            renamed[key.replace("attn.relative_position_bias_table", "attn_mask")] = torch.zeros(64, 49, 49)
    return renamed


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=timm_name(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm, dense_code):
    assert_equals_timm(name, timm_name(name), maps=dense_code)  # timm shifts no window in a map of 7 x 7


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm_as_it_is_where_windows_divide_them(name, assert_equals_timm):
    assert_equals_timm(name, timm_name(name), sizes=[(448, 448)], timm_options={"img_size": 448})


@pytest.mark.parametrize("size", [(256, 320), (252, 332), (36, 20), (4, 4)])
def test_maps_of_any_size_equal_the_official_dense_code(size, reference, dense_code, assert_equals_reference):
    backbone = build_backbone("swin_tiny").eval()
    load_weights(backbone, reference.state_dict())
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        for ours, theirs in zip(backbone(images), dense_code(reference, images), strict=True):
            assert_equals_reference(f"{size}", ours, theirs)


@pytest.mark.parametrize(
    ("name", "builder"), [("swin_tiny", "swin_t"), pytest.param("swin_small", "swin_s", marks=pytest.mark.slow)]
)
def test_logits_equal_torchvision(name, builder, randomise, load_pair, assert_equals_reference):
    reference = randomise(torchvision.models.get_model(builder))
    classifier, backbone = load_pair(name, reference)
    assert classifier.load_report.layout == backbone.load_report.layout == "torchvision"
    for size in [(224, 224), (256, 320), (252, 332)]:
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            assert_equals_reference(f"{builder} {size}", classifier(images), reference(images))


@pytest.mark.parametrize("size", [(14, 21), (5, 14), (14, 5), (7, 7), (3, 4)])
@pytest.mark.parametrize("shift", [0, 3])
def test_classifiers_shrink_windows_to_small_maps(size, shift, randomise, assert_equals_reference):
    theirs = randomise(SwinTransformerBlock(32, size, num_heads=2, window_size=7, shift_size=shift))
    ours = randomise(Block(32, 2, Windows(7, shift, shrink=True), 7, 0.0))
    state = ours.state_dict()
    table = state.pop("attn.bias.table").t().unflatten(1, (13, 13))[None]
    offsets = [2 * min(side, 7) - 1 for side in size]
    table = F.interpolate(table, size=offsets, mode="bicubic").flatten(2)[0].t()  # as the official code loads it
    theirs.load_state_dict(state | {"attn.relative_position_bias_table": table})
    x = torch.randn(3, *size, 32)
    with torch.inference_mode():
        assert_equals_reference(f"{size} shift {shift}", ours(x), theirs(x))


@pytest.mark.parametrize("size", [(1, 1), (33, 65), (97, 161)])
def test_classifiers_take_images_of_any_size(size):
    model = build_backbone("swin_tiny", features_only=False, num_classes=5, **NARROW).eval()
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_gradients_equal_timm(randomise, load_pair, assert_gradients_equal):
    size = (224, 448)
    reference = randomise(timm.create_model(timm_name("swin_tiny"), img_size=size, **TIMM_NARROW))
    model, _ = load_pair("swin_tiny", reference, **NARROW)
    assert_gradients_equal(model, reference, TIMM, size=size)


def test_gradients_of_padded_windows_equal_torchvision(randomise, load_pair, assert_gradients_equal):
    reference = torchvision.models.SwinTransformer(
        [4, 4], 32, [2, 2, 2, 2], [1, 2, 4, 8], [7, 7], stochastic_depth_prob=0.0
    )
    model, _ = load_pair("swin_tiny", randomise(reference), **NARROW)
    layout = next(layout for layout in SwinTransformer.key_layouts if layout.name == "torchvision")
    assert_gradients_equal(model, reference, layout, size=(260, 292))


@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm(reference, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone("swin_tiny", features_only=False), reference, TIMM)
    assert all(norm.eps == 1e-5 for norm in build_backbone("swin_tiny", out_norm=True).out_norms.values())


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = timm.create_model(timm_name("swin_tiny"), drop_path_rate=0.3)
    model = build_backbone("swin_tiny", drop_path_rate=0.3)
    expected = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in reference.layers for b in stage.blocks]
    assert [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks] == pytest.approx(expected)


def test_bias_tables_take_no_weight_decay():
    model = build_backbone("swin_tiny", out_indices=(0,))
    assert model.no_weight_decay() == {f"stages.0.blocks.{i}.attn.bias.table" for i in range(2)}


def test_official_layout_loads(reference, assert_equals_reference):
    state = official(reference.state_dict())
    assert checkpoint_filter_fn(state, reference).keys() == reference.state_dict().keys()  # the names are right
    model = build_backbone("swin_tiny", features_only=False).eval()
    report = load_weights(model, {"model": state})
    assert report.layout == "official"
    assert report.share == 1
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert_equals_reference("official layout", model(images), reference(images))


def test_dense_checkpoint_loads_its_backbone_and_norms(reference, tmp_path, dense_code, assert_equals_reference):
    state = {k: v for k, v in official(reference.state_dict()).items() if not k.startswith(("head.", "norm."))}
    norms = {f"norm{i}.{part}": torch.rand(96 * 2**i) for i in range(4) for part in ("weight", "bias")}
    head = {"decode_head.conv_seg.weight": torch.randn(150, 512, 1, 1)}
    path = tmp_path / "upernet_swin_tiny.pth"
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in (state | norms).items()} | head}, path)
    backbone = build_backbone("swin_tiny", out_indices=(1, 2, 3), out_norm=True, pretrained=path).eval()
    report = backbone.load_report
    assert (report.layout, report.prefix, report.share) == ("official", "backbone.", 1)
    assert not report.missing
    assert set(report.unexpected) == {"out_norms.0.weight", "out_norms.0.bias", *head}
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        for i, (ours, theirs) in enumerate(zip(backbone(images), dense_code(reference, images)[1:], strict=True), 1):
            theirs = theirs.permute(0, 2, 3, 1)
            theirs = F.layer_norm(theirs, theirs.shape[3:], norms[f"norm{i}.weight"], norms[f"norm{i}.bias"])
            assert_equals_reference("dense checkpoint", ours, theirs.permute(0, 3, 1, 2))


def test_weights_for_windows_of_12(randomise, load_pair, assert_equals_reference):
    options = {"window_size": 12, "img_size": 384}
    reference = randomise(timm.create_model(timm_name("swin_tiny"), **options, **TIMM_NARROW))
    classifier, _ = load_pair("swin_tiny", reference, window_size=12, **NARROW)
    images = torch.randn(1, 3, 384, 384)
    with torch.inference_mode():
        assert_equals_reference("window 12", classifier(images), reference(images))

    smaller = build_backbone("swin_tiny", **NARROW)
    report = load_weights(smaller, reference.state_dict())
    assert len(report.resized) == 8
    assert report.resized["stages.3.blocks.1.attn.bias.table"] == ((529, 8), (169, 8))
    table = reference.layers[3].blocks[1].attn.relative_position_bias_table.t().unflatten(1, (23, 23))
    table = F.interpolate(table[None], size=(13, 13), mode="bicubic").flatten(2)[0].t()
    torch.testing.assert_close(smaller.stages[3].blocks[1].attn.bias.table, table)


def test_windows_of_less_than_a_cell_are_refused():
    with pytest.raises(InputError, match="window_size=0"):
        build_backbone("swin_tiny", window_size=0)


@pytest.mark.parametrize("training", [True, False])
def test_windows_are_cut_once_per_size(training, monkeypatch):
    cut, sizes = Windows.cut, []
    monkeypatch.setattr(Windows, "cut", lambda self, *size: sizes.append(size[:3]) or cut(self, *size))
    model = build_backbone("swin_tiny", out_indices=(0,), depths=(6, 2, 2, 2)).train(training)
    with torch.set_grad_enabled(training):
        for size in [(64, 64), (64, 64), (96, 64), (64, 64)]:
            model(torch.randn(2, 3, *size))
    assert sizes == [(2, 16, 16), (2, 16, 16), (2, 24, 16), (2, 24, 16)]  # shifted and not, for six blocks


def test_evaluation_before_training_leaves_it_as_it_is():
    model = build_backbone("swin_tiny", out_indices=(0,))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model.eval()(images)[0]
    after = model.train()(images)[0]
    after.sum().backward()
    torch.testing.assert_close(before, after)
    assert model.stages[0].blocks[1].attn.bias.table.grad.any()


@pytest.mark.slow  # export takes half a minute
def test_classifiers_export_for_images_larger_than_the_windows():
    model = build_backbone("swin_tiny", features_only=False, **NARROW).eval()
    sides = {2 + i: torch.export.Dim(name, min=225, max=1024) for i, name in enumerate(("height", "width"))}
    program = torch.export.export(model, (torch.randn(2, 3, 300, 400),), dynamic_shapes={"images": sides}).module()
    for size in [(256, 320), (513, 333)]:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images), atol=1e-4, rtol=1e-4)
