"""ViT, DeiT and DeiT III equal timm's and torchvision's on the same weights, whatever their key layout."""

import re

import pytest
import timm
import torch
import torchvision
from timm.layers import resample_abs_pos_embed
from timm.models import deit, vision_transformer
from torchvision.models.vision_transformer import ConvStemConfig

from backbones import InputError, WeightsError, backbone_info, build_backbone
from backbones.weights import load_weights
from backbones_vit.vit import VisionTransformer

# with 1000 classes
PARAMETERS = {
    "vit_tiny_patch16": 5_717_416,
    "vit_small_patch8": 22_055_272,
    "vit_small_patch16": 22_050_664,
    "vit_small_patch32": 22_878_952,
    "vit_base_patch8": 86_576_872,
    "vit_base_patch16": 86_567_656,
    "vit_base_patch32": 88_224_232,
    "vit_large_patch14": 304_203_752,
    "vit_large_patch16": 304_326_632,
    "vit_large_patch32": 306_535_400,
    "vit_huge_patch14": 632_045_800,
    "deit_tiny_patch16": 5_717_416,
    "deit_small_patch16": 22_050_664,
    "deit_base_patch16": 86_567_656,
    "deit_tiny_distilled_patch16": 5_910_800,
    "deit_small_distilled_patch16": 22_436_432,
    "deit_base_distilled_patch16": 87_338_192,
    "deit3_small_patch16": 22_059_496,
    "deit3_medium_patch16": 38_849_512,
    "deit3_base_patch16": 86_585_320,
    "deit3_large_patch16": 304_374_760,
    "deit3_huge_patch14": 632_126_440,
}
QUICK = ("vit_tiny_patch16", "vit_small_patch32", "deit_tiny_distilled_patch16", "deit3_small_patch16")
UNTRIED = ("vit_huge_patch14", "deit3_huge_patch14")  # 2.5 GB each, and nothing that the others have not
VARIANTS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PARAMETERS if name not in UNTRIED
]
TINY = "vit_tiny_patch16"
DISTILLED = "deit_tiny_distilled_patch16"
SMALL = {"depth": 3, "img_size": 64, "num_classes": 10}


def from_timm(name, **options):
    return timm.create_model(f"{name}_224", **{"num_classes": 1000} | options)


def small(**options):
    """Our model, small enough for many tests."""
    return VisionTransformer(dim=48, heads=3, **SMALL | {"features_only": False} | options).eval()


def small_timm(**options):
    return vision_transformer.VisionTransformer(embed_dim=48, num_heads=3, **SMALL | options)


def small_torchvision(**options):
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=10, **options
    )


def count(model):
    return sum(p.numel() for p in model.parameters())


def load_all(model, state):
    """Load a state that must fit entirely, but for what classification checkpoints lack by nature."""
    report = load_weights(model, state)
    assert report.share == 1
    assert not report.mismatched
    assert not [key for key in report.missing if not key.startswith("pyramid.")]
    return report


@pytest.fixture(scope="module")
def tiny(randomise):
    """timm's ViT-Ti/16 as a reference for any image size."""
    return randomise(from_timm(TINY, dynamic_img_size=True, dynamic_img_pad=True))


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit_tiny.pth"
    torch.save(tiny.state_dict(), path)
    return path


# Parity


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name):
    with torch.device("meta"):
        assert count(from_timm(name)) == PARAMETERS[name]
        assert count(build_backbone(name, features_only=False)) == PARAMETERS[name]
    assert backbone_info(name).params == pytest.approx(PARAMETERS[name] / 1e6, abs=0.0051)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_timm(name, randomise, assert_equals_reference):
    reference = randomise(from_timm(name, dynamic_img_size=True, dynamic_img_pad=True))
    classifier = build_backbone(name, features_only=False).eval()
    backbone = build_backbone(name, pyramid="plain").eval()
    assert not load_all(classifier, reference.state_dict()).unexpected
    load_all(backbone, reference.state_dict())
    for size in [(224, 224), (200, 331)]:
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            features, expected = reference.forward_intermediates(images, indices=1)
            assert_equals_reference(f"{name} logits", classifier(images), reference(images))
            assert_equals_reference(f"{name} features", classifier.forward_features(images), features)
            pooled = classifier.forward_head(features, pre_logits=True)
            assert_equals_reference(f"{name} pre-logits", pooled, reference.forward_head(features, pre_logits=True))
            (ours,) = backbone(images)
            assert_equals_reference(f"{name} stride {backbone.strides[0]}", ours, expected[0])


@pytest.mark.parametrize("out_norm", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (97, 180)])
def test_every_level_of_taps_takes_its_own_block(size, out_norm, tiny, assert_equals_reference):
    backbone = build_backbone(TINY, pyramid="taps", out_norm=out_norm).eval()
    load_all(backbone, tiny.state_dict())
    seen = []
    backbone.pyramid.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        backbone(images)
        expected = tiny.forward_intermediates(
            images, indices=[3, 5, 7, 11], norm=out_norm, stop_early=True, intermediates_only=True
        )
        for block, ours, theirs in zip((4, 6, 8, 12), seen, expected, strict=True):
            assert_equals_reference(f"block {block}, out_norm={out_norm}", ours, theirs)


@pytest.mark.parametrize("name", [TINY, "deit3_small_patch16"])
def test_gradients_equal_timm(name, randomise):
    reference = randomise(from_timm(name, dynamic_img_size=True))
    model = build_backbone(name, features_only=False).eval()
    load_all(model, reference.state_dict())
    images, upstream = torch.randn(2, 3, 64, 96), torch.randn(2, 1000) / 1000
    (model(images) * upstream).sum().backward()
    (reference(images) * upstream).sum().backward()
    theirs = {k: p.grad for k, p in reference.named_parameters()}
    for key, parameter in model.named_parameters():
        scale = theirs[key].abs().max().clamp(min=1e-3)
        assert (parameter.grad - theirs[key]).abs().max() <= 1e-4 * scale, key


@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_timm():
    """Which random activations are too large to show."""
    model, reference = build_backbone(TINY, features_only=False), from_timm(TINY)
    ours = {key: module.eps for key, module in model.named_modules() if hasattr(module, "eps")}
    assert ours == {key: module.eps for key, module in reference.named_modules() if hasattr(module, "eps")}
    assert len(ours) == 25


@pytest.mark.usefixtures("on_meta")
def test_drop_path_rates_equal_timm():
    reference = from_timm(TINY, drop_path_rate=0.3)
    model = build_backbone(TINY, drop_path_rate=0.3)
    expected = [getattr(block.drop_path1, "drop_prob", 0.0) for block in reference.blocks]
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx(expected)


# The classifiers


@pytest.mark.parametrize("name", [TINY, "deit3_small_patch16"])
def test_global_average_pooling_equals_timm(name, randomise, assert_equals_reference):
    reference = randomise(from_timm(name, global_pool="avg", dynamic_img_size=True, dynamic_img_pad=True))
    model = build_backbone(name, features_only=False, global_pool="avg").eval()
    assert not load_all(model, reference.state_dict()).unexpected
    images = torch.randn(1, 3, 64, 100)
    with torch.inference_mode():
        assert_equals_reference("average pooling", model(images), reference(images))
        features = reference.forward_features(images)
        assert_equals_reference("features before the norm", model.forward_features(images), features)
        ours = model.forward_head(features, pre_logits=True)
        assert_equals_reference("pre-logits", ours, reference.forward_head(features, pre_logits=True))


def test_both_poolings_are_concatenated(randomise):
    model = randomise(small(global_pool="both"))
    tokens = model.forward_features(torch.randn(2, 3, 64, 64))
    pooled = torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), dim=1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(tokens), pooled @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("before", ["token", "avg", "both"])
@pytest.mark.parametrize("after", ["token", "avg", "both"])
@pytest.mark.parametrize("representation_size", [None, 24])
def test_reset_classifier_gives_the_model_that_would_have_been_built(before, after, representation_size, randomise):
    model = small(global_pool=before, representation_size=representation_size)
    model.reset_classifier(7, after)
    randomise(model)
    built = small(global_pool=after, num_classes=7, representation_size=representation_size)
    built.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    assert torch.equal(model(images), built(images))
    model.reset_classifier(0)
    assert torch.equal(model(images), built.forward_head(built.forward_features(images), pre_logits=True))


def test_distilled_heads_train_as_a_pair_and_average_in_eval(randomise, assert_equals_reference):
    reference = randomise(from_timm(DISTILLED))
    model = build_backbone(DISTILLED, features_only=False).eval()
    assert not load_all(model, reference.state_dict()).unexpected
    images = torch.randn(2, 3, 224, 224)
    reference.set_distilled_training()
    with torch.no_grad():
        assert_equals_reference("mean of both heads", model(images), reference(images))
        model.train()
        reference.train()
        for what, ours, theirs in zip(("class", "distillation"), model(images), reference(images), strict=True):
            assert_equals_reference(f"{what} head in training", ours, theirs)


def test_distilled_heads_are_reset_together():
    model = build_backbone(DISTILLED, features_only=False)
    model.reset_classifier(7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    assert [tuple(logits.shape) for logits in model(torch.randn(2, 3, 32, 32))] == [(2, 7), (2, 7)]
    model.reset_classifier(0)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 192)


def test_pooling_that_the_tokens_do_not_allow_is_refused():
    with pytest.raises(InputError, match=r"global_pool='avg'.*distilled"):
        build_backbone(DISTILLED, features_only=False, global_pool="avg")
    with pytest.raises(InputError, match="class_token=True"):
        small(class_token=False)
    distilled, pooled = small(distilled=True), small(class_token=False, global_pool="avg")
    with pytest.raises(InputError, match=r"global_pool='both'.*distilled"):
        distilled.reset_classifier(7, "both")
    with pytest.raises(InputError, match="class_token=True"):
        pooled.reset_classifier(7, "token")
    assert distilled.global_pool == "token"  # and both work as before
    assert pooled(torch.randn(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("reg_tokens", [0, 4])
def test_class_and_register_tokens_equal_timm(
    reg_tokens, class_token, no_embed_class, randomise, assert_equals_reference
):
    options = {"reg_tokens": reg_tokens, "no_embed_class": no_embed_class, "class_token": class_token}
    options["global_pool"] = "token" if class_token else "avg"
    reference = randomise(small_timm(dynamic_img_size=True, dynamic_img_pad=True, **options))
    model, backbone = small(**options), small(**options, features_only=True, pyramid="plain")
    assert not load_all(model, reference.state_dict()).unexpected
    load_all(backbone, reference.state_dict())
    for size in [(64, 64), (50, 110)]:
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            assert_equals_reference(f"tokens {options}", model(images), reference(images))
            (expected,) = reference.forward_intermediates(images, indices=1, intermediates_only=True)
            assert_equals_reference(f"tokens {options}", backbone(images)[0], expected)


# Positions


@pytest.mark.parametrize("img_size", [384, (256, 192)])
def test_positions_are_resized_as_timm_loads_them(img_size, tiny, tiny_file, assert_equals_reference):
    overlay = {"file": str(tiny_file)}
    theirs = from_timm(TINY, pretrained=True, img_size=img_size, pretrained_cfg_overlay=overlay).eval()
    ours = build_backbone(TINY, features_only=False, img_size=img_size, pretrained=tiny_file).eval()
    height, width = theirs.patch_embed.img_size
    grid = height // 16, width // 16
    resampled = resample_abs_pos_embed(tiny.pos_embed, grid, num_prefix_tokens=1)
    assert ours.load_report.resized == {"pos_embed": ((1, 197, 192), (1, 1 + grid[0] * grid[1], 192))}
    with torch.inference_mode():
        assert_equals_reference(f"positions 14x14 -> {grid}", ours.pos_embed, resampled)
        assert_equals_reference(f"positions as timm loads them, {grid}", ours.pos_embed, theirs.pos_embed)
        images = torch.randn(1, 3, height, width)
        assert_equals_reference(f"logits at {height}x{width}", ours(images), theirs(images))


def test_positions_follow_the_image_at_run_time(tiny, tiny_file, assert_equals_reference):
    model = build_backbone(TINY, features_only=False, pretrained=tiny_file).eval()
    for size in [(384, 384), (256, 192), (192, 256), (50, 333), (16, 16), (384, 384), (224, 224)]:
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            assert_equals_reference(f"logits at {size}", model(images), tiny(images))


def test_positions_of_a_grid_that_is_not_square(randomise, assert_equals_reference):
    reference = randomise(small_timm(**SMALL | {"img_size": (128, 96)}, dynamic_img_size=True, dynamic_img_pad=True))
    model = small(img_size=(128, 96))
    load_all(model, reference.state_dict())
    for size in [(128, 96), (96, 128), (64, 64), (70, 200)]:
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            assert_equals_reference(f"8x6 positions at {size}", model(images), reference(images))


def test_positions_whose_grid_cannot_be_told_are_refused(randomise):
    state = randomise(small(img_size=(128, 96))).state_dict()
    model = small()
    before = model.pos_embed.clone()
    with pytest.raises(WeightsError, match=r"49 rows for 1 tokens.*img_size=\(height, width\)"):
        load_weights(model, state)
    assert torch.equal(model.pos_embed, before)


@pytest.mark.parametrize("img_size", [64, 96])
def test_position_rows_follow_the_tokens(img_size, randomise, assert_equals_reference):
    plain = randomise(small()).state_dict()
    distilled = randomise(small(distilled=True), seed=1).state_dict()
    grid = (img_size // 16,) * 2

    def loaded(state, **options):
        model = small(img_size=img_size, **options)
        load_weights(model, state, strict=False)
        return model.pos_embed.detach()

    def resized(state, prefix):
        return resample_abs_pos_embed(state["pos_embed"][:, prefix:], grid, num_prefix_tokens=0)

    for what, ours, kept, patches in [
        ("DeiT -> distilled", loaded(plain, distilled=True), plain["pos_embed"][:, :1], resized(plain, 1)),
        ("distilled -> DeiT", loaded(distilled), distilled["pos_embed"][:, :1], resized(distilled, 2)),
        ("ViT -> registers", loaded(plain, reg_tokens=3), plain["pos_embed"][:, :1], resized(plain, 1)),
        ("ViT -> DeiT III", loaded(plain, no_embed_class=True), plain["pos_embed"][:, :0], resized(plain, 1)),
    ]:
        rows = ours.shape[1] - patches.shape[1]
        assert torch.equal(ours[:, : kept.shape[1]], kept), what
        assert not ours[:, kept.shape[1] : rows].any(), what  # tokens that the checkpoint did not know
        assert_equals_reference(what, ours[:, rows:], patches)


def test_positions_without_tokens_are_not_mistaken_for_a_smaller_grid(randomise, assert_equals_reference):
    options = {"no_embed_class": True, "reg_tokens": 4}  # 9 positions are 3x3, and with 5 tokens 2x2 were as good
    state = randomise(small(img_size=48, **options)).state_dict()
    model = small(**options)
    load_weights(model, state)
    expected = resample_abs_pos_embed(state["pos_embed"], (4, 4), (3, 3), num_prefix_tokens=0)
    assert_equals_reference("positions 3x3 -> 4x4", model.pos_embed.detach(), expected)


# DINOv2 and what else adds parts to a plain transformer

DINO = {"patch_size": 14, "img_size": 56, "init_values": 1e-5}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True}


def as_dinov2_publishes(state):
    """Keys and tensors of facebookresearch/dinov2: registers have no position, the class token has one."""
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position = torch.randn_like(state["cls_token"])
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat((position, state["pos_embed"]), dim=1)
    return state | {"mask_token": torch.randn(1, state["norm.weight"].numel())}


@pytest.mark.parametrize("options", [DINO, DINO | REGISTERS, {"qk_norm": True}, DINO | REGISTERS | {"qk_norm": True}])
@pytest.mark.parametrize("chunked", [False, True])
def test_layer_scale_registers_and_qk_norm_load_and_equal_timm(options, chunked, randomise, assert_equals_reference):
    reference = randomise(small_timm(**options))
    state = as_dinov2_publishes(reference.state_dict())
    if chunked:
        state = {re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", key): value for key, value in state.items()}
    maps = small(**options, features_only=True, num_classes=0, out_norm=True, pyramid="plain")
    report = load_weights(maps, {"teacher": {f"backbone.{key}": value for key, value in state.items()}})
    assert not report.missing
    assert report.unexpected.keys() == {"mask_token"}
    classifier = small(**options)
    load_weights(classifier, reference.state_dict())
    images = torch.randn(1, 3, 70, 98) if "patch_size" in options else torch.randn(1, 3, 64, 64)
    if reference.patch_embed.img_size != tuple(images.shape[-2:]):
        reference.set_input_size(images.shape[-2:])
    with torch.inference_mode():
        (theirs,) = reference.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        assert_equals_reference("map", maps(images)[0], theirs)
        assert_equals_reference("logits", classifier(images), reference(images))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (DINO, r"6 layer scales \(blocks\.0\.ls1\.gamma.* would be ignored: build with init_values=1e-5"),
        (REGISTERS, r"1 register tokens \(reg_token\) would be ignored: build with reg_tokens and no_embed_class=True"),
        ({"qk_norm": True}, r"12 norms of queries and keys \(.* would be ignored: build with qk_norm=True"),
        ({"distilled": True}, r"parts of a distilled model \(dist_token.* would be ignored: build with distilled=True"),
        ({"depth": 5}, r"24 tensors of blocks 3 to 4 would be ignored: the checkpoint is of a deeper variant"),
        ({"depth": 2}, r"12 tensors of blocks 2 would stay as they are, .*: the checkpoint is of a shallower variant"),
        ({"in_chans": 4}, r"takes 4 channels, and the model's 3: build with in_chans=4"),
    ],
)
def test_what_the_model_lacks_is_named_with_what_takes_it(options, what, randomise):
    state = randomise(small(**options)).state_dict()
    sizes = {key: value for key, value in options.items() if key in ("patch_size", "img_size")}
    model = small(**sizes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=what):
        load_weights(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_rotary_positions_of_dinov3_are_named(randomise):
    state = randomise(small(init_values=1e-5)).state_dict()
    del state["pos_embed"]
    state |= {"storage_tokens": torch.ones(1, 4, 48), "rope_embed.periods": torch.ones(4)}
    with pytest.raises(WeightsError, match=r"2 of DINOv3, whose positions are rotary .*: use timm/vit_..._dinov3"):
        load_weights(small(init_values=1e-5), state)


# Windows


def test_windowed_backbone_leaves_out_tokens_and_their_positions(tiny, tiny_file, randomise, assert_equals_reference):
    backbone = build_backbone(TINY, window_size=14, pyramid="plain", pretrained=tiny_file).eval()
    assert torch.equal(backbone.pos_embed, tiny.pos_embed[:, 1:])
    assert backbone.load_report.share == 1
    assert "cls_token" in backbone.load_report.unexpected
    # Where a window holds the whole map, this is timm's model without a class token.
    reference = from_timm(TINY, class_token=False, global_pool="avg", dynamic_img_size=True).eval()
    reference.load_state_dict({**tiny.state_dict(), "pos_embed": backbone.pos_embed}, strict=False)
    images = torch.randn(1, 3, 224, 160)
    with torch.inference_mode():
        (expected,) = reference.forward_intermediates(images, indices=1, intermediates_only=True)
        assert_equals_reference("windowed, one window", backbone(images)[0], expected)


def test_windows_attend_among_themselves(randomise, assert_equals_reference):
    backbone = randomise(small(features_only=True, pyramid="plain", window_size=3, global_blocks=()))
    torch.nn.init.zeros_(backbone.pos_embed)
    images = torch.randn(1, 3, 96, 192)
    with torch.inference_mode():
        (whole,) = backbone(images)
        for y in (0, 3):
            for x in (0, 3, 6, 9):
                (alone,) = backbone(images[..., 16 * y : 16 * y + 48, 16 * x : 16 * x + 48])
                assert_equals_reference(f"window at {y}, {x}", whole[..., y : y + 3, x : x + 3], alone)


@pytest.mark.usefixtures("on_meta")
def test_global_blocks_default_to_the_last_of_each_quarter():
    backbone = build_backbone(TINY, window_size=7)
    assert [i for i, block in enumerate(backbone.blocks) if not block.window] == [2, 5, 8, 11]


# Key layouts


@pytest.mark.parametrize("representation_size", [None, 24])
@pytest.mark.parametrize("stem", [None, [12, 16, 20, 24], [(12, 4), (16, 2), (20, 2)]])
def test_torchvision_layout_loads(stem, representation_size, randomise, assert_equals_reference):
    steps = [step if isinstance(step, tuple) else (step, 2) for step in stem or ()]
    configs = [ConvStemConfig(width, 3, stride) for width, stride in steps] or None
    reference = randomise(small_torchvision(conv_stem_configs=configs, representation_size=representation_size))
    model = small(conv_stem=stem, representation_size=representation_size)
    report = load_all(model, reference.state_dict())
    assert report.layout == "torchvision"
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        what = f"torchvision, stem {stem}, representation {representation_size}"
        assert_equals_reference(what, model(images), reference(images))
        tokens = reference.encoder.layers(
            torch.cat((reference.class_token.expand(2, -1, -1), reference._process_input(images)), dim=1)
            + reference.encoder.pos_embedding
        )
        backbone = small(conv_stem=stem, features_only=True, pyramid="plain")
        load_all(backbone, reference.state_dict())
        assert_equals_reference(f"{what}, map", backbone(images)[0].flatten(2).mT, tokens[:, 1:])


def test_older_torchvision_layout_loads(randomise, assert_equals_reference):
    reference = randomise(small_torchvision())
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    state = {re.sub(r"mlp\.[03]\.", lambda m: names[m[0]], k): v for k, v in reference.state_dict().items()}
    assert state.keys() != reference.state_dict().keys()
    model = small()
    assert load_all(model, state).layout == "torchvision"
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert_equals_reference("older torchvision", model(images), reference(images))


@pytest.mark.parametrize("name", ["vit_b_16", pytest.param("vit_b_32", marks=pytest.mark.slow)])
def test_torchvision_models_load_under_their_names(name, randomise, tmp_path, assert_equals_reference):
    reference = randomise(torchvision.models.get_model(name))
    torch.save(reference.state_dict(), tmp_path / "torchvision.pth")
    model = build_backbone(name, features_only=False, pretrained=tmp_path / "torchvision.pth").eval()
    assert model.load_report.layout == "torchvision"
    assert model.load_report.share == 1
    assert not model.load_report.missing
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert_equals_reference(f"torchvision {name}", model(images), reference(images))


@pytest.mark.parametrize("in_chans", [3, 4])
def test_deit_release_loads_with_a_flat_patch_projection(in_chans, randomise, tmp_path, assert_equals_reference):
    released = randomise(from_timm("deit_tiny_patch16")).state_dict()
    released["patch_embed.proj.weight"] = released["patch_embed.proj.weight"].flatten(1)
    torch.save({"model": released}, tmp_path / "deit.pth")
    overlay = {"file": str(tmp_path / "deit.pth")}
    theirs = from_timm("deit_tiny_patch16", pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=overlay).eval()
    ours = build_backbone(
        "deit_tiny_patch16", in_chans=in_chans, features_only=False, pretrained=tmp_path / "deit.pth"
    ).eval()
    assert ours.load_report.resized["patch_embed.proj.weight"] == ((192, 768), (192, in_chans, 16, 16))
    images = torch.randn(1, in_chans, 224, 224)
    with torch.inference_mode():
        assert_equals_reference(f"DeiT release, {in_chans} channels", ours(images), theirs(images))


def test_deit3_release_loads(randomise, assert_equals_reference):
    reference = randomise(small_timm(init_values=1e-6, no_embed_class=True))
    released = {re.sub(r"ls([12])\.gamma", r"gamma_\1", k): v for k, v in reference.state_dict().items()}
    filtered = deit.checkpoint_filter_fn({"model": released}, reference, adapt_layer_scale=True)
    assert filtered.keys() == reference.state_dict().keys()  # the names are right
    model = small(init_values=1e-6, no_embed_class=True)
    report = load_all(model, {"model": released})
    assert not report.unexpected
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert_equals_reference("DeiT III release", model(images), reference(images))


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_in_chans_are_adapted_as_timm_does(in_chans, tiny_file, assert_equals_reference):
    overlay = {"file": str(tiny_file)}
    theirs = from_timm(TINY, pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=overlay).eval()
    ours = build_backbone(TINY, in_chans=in_chans, features_only=False, pretrained=tiny_file).eval()
    assert list(ours.load_report.resized) == ["patch_embed.proj.weight"]
    images = torch.randn(1, in_chans, 224, 224)
    with torch.inference_mode():
        assert_equals_reference(f"{in_chans} channels", ours(images), theirs(images))


# Options that cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_stem": [12, 16, 20]}, r"conv_stem=\[12, 16, 20\]: strides must multiply to patch_size=16"),
        ({"conv_stem": [(12, 4), (16, 2)]}, "strides must multiply to patch_size=16"),
        ({"pyramid": "fancy"}, "'simple', 'taps' and 'plain'"),
        ({"pyramid": "taps", "taps": (1, 2, 3)}, "four ascending blocks from 1 to 3"),
        ({"pyramid": "taps", "taps": (1, 2, 3, 4)}, "four ascending blocks from 1 to 3"),
        ({"window_size": 4, "global_blocks": (3,)}, "count from 0 to 2"),
        ({"window_size": 4, "features_only": False}, "window_size=0"),
        ({"img_size": 8}, "smaller than a patch"),
        ({"heads": 5}, "5 heads do not divide a width of 48"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        VisionTransformer(**{"dim": 48, "heads": 3, "depth": 3} | options)
