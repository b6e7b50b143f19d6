"""Hybrid ViT equals timm's on the same weights; its ResNet makes the fine maps, its transformer the others."""

import copy

import pytest
import timm
import torch
from timm.layers import StdConv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from timm.optim import create_optimizer_v2
from torch import nn

from backbones import InputError, build_backbone
from backbones.weights import load_weights
from backbones_vit.hybrid import HybridVisionTransformer, MaxPool, StdConv

# with 1000 classes
PARAMETERS = {
    "vit_small_r26_s32": 36_431_912,
    "vit_base_r26_s32": 101_383_976,
    "vit_base_r50_s16": 98_659_112,
    "vit_large_r50_s32": 328_994_856,
}
S32, S16 = "vit_small_r26_s32", "vit_base_r50_s16"
VARIANTS = [pytest.param(name, marks=() if name == S32 else pytest.mark.slow) for name in PARAMETERS]
CUT = {"depth": 2, "heads": 3, "dim": 48}  # leaves the whole ResNet and a small transformer


def from_timm(name, **options):
    renamed = {{"dim": "embed_dim", "heads": "num_heads"}.get(key, key): value for key, value in options.items()}
    return timm.create_model(f"{name}_224", **{"num_classes": 1000, "dynamic_img_size": True} | renamed)


def tiny(**options):
    return HybridVisionTransformer(**{"dim": 48, "depth": 4, "heads": 3, "cnn_depths": (1, 1, 1, 1)} | options).eval()


def maps_of_timm(reference, images):
    """Outputs of the ResNet's stages, the transformer's, and of stride 32 what 2x2 max-pooling makes of it."""
    maps, tokens = [], []
    parts = [*reference.patch_embed.backbone.stages, reference.blocks[-1]]
    hooks = [
        part.register_forward_hook(lambda module, inputs, output, into=into: into.append(output))
        for part, into in zip(parts, [*[maps] * (len(parts) - 1), tokens], strict=True)
    ]
    reference.forward_features(images)
    for hook in hooks:
        hook.remove()
    last = tokens[0][:, 1:].transpose(1, 2).unflatten(2, maps[-1].shape[-2:])
    if len(maps) == 4:
        return [*maps[:-1], last]
    return [*maps[:-1], last, nn.functional.max_pool2d(last, 2, ceil_mode=True)]


@pytest.fixture(scope="session")
def damped(randomise):
    """A random reference whose residual branches are small, so that float32 can add up the values of its stages."""

    def draw(reference):
        randomise(reference)
        with torch.no_grad():
            for name, value in reference.named_parameters():
                if ".norm3." in name:
                    value *= 0.2
        return reference

    return draw


@pytest.fixture(scope="module")
def reference(damped):
    return damped(from_timm(S32))


@pytest.fixture(scope="session")
def assert_equals_timm(damped, load_pair, assert_equals_reference):
    def check(name, sizes, **options):
        reference = damped(from_timm(name, **options))
        classifier, backbone = load_pair(name, reference, **options)
        for size in sizes:
            images = torch.randn(1, 3, *size)
            with torch.inference_mode():
                assert_equals_reference(f"{name} logits", classifier(images), reference(images))
                pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
                theirs = reference.forward_head(reference.forward_features(images), pre_logits=True)
                assert_equals_reference(f"{name} pre-logits", pooled, theirs)
                for stride, ours, theirs in zip(
                    backbone.strides, backbone(images), maps_of_timm(reference, images), strict=True
                ):
                    assert_equals_reference(f"{name} stride {stride}", ours, theirs)

    return check


# Parity


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name], timm_name=f"{name}_224")


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, assert_equals_timm):
    assert_equals_timm(name, [(224, 224), (201, 330)])


def test_pyramid_of_stride_16_equals_timm(assert_equals_timm):
    assert_equals_timm(S16, [(224, 224), (77, 130)], **CUT)


def test_average_pooling_equals_timm(assert_equals_timm):
    assert_equals_timm(S32, [(97, 64)], global_pool="avg")


@pytest.mark.parametrize("name", [S32, S16])
def test_gradients_equal_timm(name, randomise, load_pair, assert_gradients_equal):
    reference = randomise(from_timm(name, **CUT))
    model, _ = load_pair(name, reference, **CUT)
    assert_gradients_equal(model, reference)


@pytest.mark.parametrize("name", [S32, S16])
@pytest.mark.usefixtures("on_meta")
def test_norms_and_standardised_weights_have_the_epsilon_of_timm(name, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone(name, features_only=False, **CUT), from_timm(name, **CUT))


def test_drop_path_is_the_transformers_alone():
    reference, model = from_timm(S32, drop_path_rate=0.3), build_backbone(S32, drop_path_rate=0.3)
    expected = [getattr(block.drop_path1, "drop_prob", 0.0) for block in reference.blocks]
    assert [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")] == pytest.approx(expected)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_pad_and_standardise_as_timm_does(kernel, stride, randomise):
    ours, theirs = StdConv(8, 6, kernel, stride), randomise(StdConv2dSame(8, 6, kernel, stride, eps=1e-8))
    ours.load_state_dict(theirs.state_dict())
    ours.to(memory_format=torch.channels_last)
    for height, width in [(1, 2), (3, 4), (5, 8), (7, 7), (16, 33)]:
        images = torch.randn(2, 8, height, width)
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 2), (3, 4), (5, 8), (7, 7), (16, 33)])
def test_pooling_pads_as_timm_does_compiled_or_not(size, monkeypatch):
    images = torch.randn(2, 4, *size).relu()
    expected = MaxPool2dSame(3, 2)(images)
    assert torch.equal(MaxPool()(images), expected)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(MaxPool()(images), expected)


def test_weights_are_standardised_anew_however_they_are_written_and_once_for_inference():
    conv = StdConv(8, 6, 3).eval()
    images = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        before = conv(images)
        conv.weight.data[0] *= torch.linspace(0.5, 2, conv.weight[0].numel()).view_as(conv.weight[0])
        after = conv(images)
        fast = copy.deepcopy(conv).prepare_for_inference()
        assert fast.standardised
        torch.testing.assert_close(fast(images), after)
        torch.testing.assert_close(fast.weight, conv.standardise())
    assert not torch.allclose(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 1:], before[:, 1:])


# Checkpoints


@pytest.mark.parametrize("container", ["", "backbone."])
def test_checkpoint_of_another_size_loads_with_its_positions_resized(container, randomise):
    state = {f"{container}{k}": v for k, v in randomise(from_timm(S32, img_size=384)).state_dict().items()}
    model = build_backbone(S32, features_only=False)
    report = load_weights(model, state)
    assert report.prefix == container
    assert report.share == 1
    assert report.resized == {"pos_embed": ((1, 145, 384), (1, 50, 384))}
    assert not report.missing
    assert not report.unexpected
    assert torch.equal(model.patch_embed.proj.weight, state[f"{container}patch_embed.proj.weight"])


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans_are_adapted_as_timm_does(in_chans, reference, tmp_path, assert_equals_reference):
    path = tmp_path / "rgb.pth"
    torch.save(reference.state_dict(), path)
    theirs = from_timm(S32, pretrained=True, in_chans=in_chans, pretrained_cfg_overlay={"file": str(path)}).eval()
    ours = build_backbone(S32, in_chans=in_chans, features_only=False, pretrained=path).eval()
    assert list(ours.load_report.resized) == ["patch_embed.backbone.stem.conv.weight"]
    images = torch.randn(1, in_chans, 64, 64)
    with torch.inference_mode():
        assert_equals_reference(f"{in_chans} channels", ours(images), theirs(images))


# The pyramid


@pytest.mark.parametrize("out_norm", [False, True])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_maps_of_the_cnn_alone_build_no_transformer(last, out_norm):
    full = tiny()
    part = tiny(out_indices=range(last + 1), out_norm=out_norm)
    assert {name.split(".")[0] for name, _ in part.named_parameters()} == {"patch_embed"}
    assert part.patch_embed.proj is None
    assert len(part.patch_embed.backbone.stages) == last + 1
    assert part.state_dict().keys() <= full.state_dict().keys()
    part.load_state_dict(full.state_dict(), strict=False)
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        for ours, expected in zip(part(images), full(images), strict=False):
            torch.testing.assert_close(ours, expected)


def test_out_norm_is_the_final_norm_of_the_transformers_maps(randomise):
    plain = randomise(tiny(cnn_depths=(1, 1, 1)))
    normed = tiny(cnn_depths=(1, 1, 1), out_norm=True, out_indices=(0, 2))
    normed.load_state_dict(plain.state_dict(), strict=False)
    randomise(normed.norm)
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        fine, _, coarse, _ = plain(images)
        ours = normed(images)
        torch.testing.assert_close(ours[0], fine)
        torch.testing.assert_close(ours[1].permute(0, 2, 3, 1), normed.norm(coarse.permute(0, 2, 3, 1)))


@pytest.mark.parametrize(
    ("pyramid", "channels", "index"),
    [("simple", [12, 24, 48, 48], 2), ("taps", [48] * 4, 2), ("plain", [48], 0)],
)
def test_pyramids_of_the_plain_vit_take_the_transformers_maps(pyramid, channels, index, randomise):
    options = {"cnn_depths": (1, 1, 1), "taps": (1, 2, 4, 4)}
    model = randomise(tiny(pyramid=pyramid, **options))
    stages = tiny(**options)
    load_weights(stages, {k: v for k, v in model.state_dict().items() if not k.startswith("pyramid.")})
    assert model.out_channels == channels
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[index], stages(images)[2])
        sizes = [tuple(m.shape[-2:]) for m in model(images[..., :58, :90])]
    assert sizes == [(-(-58 // stride), -(-90 // stride)) for stride in model.strides]


def test_windows_leave_the_maps_of_the_cnn_as_they_are():
    model = tiny(cnn_depths=(1, 1, 1), window_size=4, global_blocks=(3,))
    plain = tiny(cnn_depths=(1, 1, 1))
    load_weights(model, plain.state_dict())
    images = torch.randn(1, 3, 100, 130)
    with torch.no_grad():
        maps, expected = model(images), plain(images)
    assert [m.shape for m in maps] == [m.shape for m in expected]
    assert [torch.equal(a, b) for a, b in zip(maps, expected, strict=True)] == [True, True, False, False]


# Fine-tuning


def test_parts_freeze_from_the_stem_to_the_transformer():
    def learning(frozen):
        model = tiny(frozen_stages=frozen)
        return {n.removeprefix("patch_embed.backbone.") for n, p in model.named_parameters() if p.requires_grad}

    everything = learning(-1)
    assert not any(n.startswith("stem.") for n in learning(0))
    for frozen in (1, 2, 3):
        left = {n for n in everything if n.startswith("stages.")} & learning(frozen)
        assert {n.split(".")[1] for n in left} == {str(i) for i in range(frozen, 4)}
        assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"} <= learning(frozen)
    assert learning(4) == set()


def test_layer_decay_falls_from_the_head_to_the_stem():
    model = tiny(features_only=False, cnn_depths=(1, 2, 1, 1))
    optimizer = create_optimizer_v2(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    cnn = "patch_embed.backbone"
    ordered = [
        ("head.weight",),
        ("norm.weight", "blocks.3.mlp.fc1.weight"),
        *((f"blocks.{i}.mlp.fc1.weight",) for i in (2, 1, 0)),
        ("patch_embed.proj.weight", "cls_token", "pos_embed"),
        (f"{cnn}.stages.3.blocks.0.conv1.weight",),
        (f"{cnn}.stages.2.blocks.0.norm1.weight",),
        (f"{cnn}.stages.1.blocks.1.conv2.weight",),
        (f"{cnn}.stages.1.blocks.0.conv3.weight", f"{cnn}.stages.1.blocks.0.downsample.conv.weight"),
        (f"{cnn}.stages.0.blocks.0.conv1.weight",),
        (f"{cnn}.stem.conv.weight",),
    ]
    for layers, group in enumerate(ordered):
        assert {scale[name] for name in group} == {0.5**layers}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cnn_depths": ()}, r"cnn_depths=\(\) must be one to four positive numbers"),
        ({"cnn_depths": (1, 0)}, r"cnn_depths=\(1, 0\) must be one to four positive numbers"),
        ({"pyramid": "fancy"}, "'stages', 'simple', 'taps' and 'plain'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)
