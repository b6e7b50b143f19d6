"""Parts of architectures by option: equal to timm's and torchvision's with the same options and weights."""

import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer, interpolate_embeddings

from backbones import InputError, WeightsError, backbone_info, build_backbone, for_inference
from backbones.weights import load_weights

SMALL = {"dim": 48, "depth": 2, "heads": 3, "patch_size": 8, "img_size": 32}
OF_TIMM = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
OF_TORCHVISION = {"hidden_dim": 48, "num_layers": 2, "num_heads": 3, "patch_size": 8, "mlp_dim": 192}


def vit(**options):
    return build_backbone("vit_tiny_patch16", features_only=False, num_classes=7, **SMALL | options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False},
        {"norm_layer": "rmsnorm"},
        {"norm_layer": partial(nn.LayerNorm, eps=0.1), "qk_norm": True},
        {"act_layer": "relu"},
        {"act_layer": nn.Tanh},
        {"embed_layer": partial(PatchEmbed, norm_layer=nn.LayerNorm)},
    ],
    ids=str,
)
def test_parts_of_vit_are_those_of_timm(options, randomise, assert_equals_reference):
    reference = randomise(timm.models.VisionTransformer(num_classes=7, **OF_TIMM, **options)).eval()
    model = vit(**options)
    report = load_weights(model, reference.state_dict())
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_equals_reference(str(options), model(images), reference(images))
    assert build_backbone("vit_tiny_patch16", **SMALL, **options)(images)[0].shape[2:] == (8, 8)


def test_qk_scale_multiplies_logits_of_attention(randomise):
    model, scaled = randomise(vit()), vit(qk_scale=2 * 16**-0.5)
    state = model.state_dict()
    for name in state:
        if ".attn.qkv." in name:  # queries of twice the length
            state[name][:48] *= 2
    scaled.load_state_dict(model.state_dict())
    for name in state:
        if ".attn.qkv." in name:
            scaled.state_dict()[name][:48] /= 2
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scaled(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"norm_layer": "nonsense"}, "norm_layer='nonsense'"),
        ({"act_layer": "nonsense"}, "act_layer='nonsense'"),
        ({"embed_layer": nn.Conv2d}, "is called as timm's"),
        ({"embed_layer": PatchEmbed, "conv_stem": (8, 16, 48)}, "leave out conv_stem"),
        ({"conv_stem": [{"out_channels": 8, "kernels": 5}]}, "conv_stem: .*kernels"),
        ({"conv_stem": [{"out_channels": 8, "kernel_size": 4, "stride": 1}]}, "would shrink the map"),
        ({"conv_stem": [(8, 2)]}, "strides must multiply to patch_size=8"),
        ({"interpolation": "nonsense"}, "interpolation='nonsense' is unknown"),
    ],
)
def test_parts_that_cannot_be_are_named(option, message):
    with pytest.raises(InputError, match=message):
        vit(**option)


STEM = [
    ConvStemConfig(out_channels=8, kernel_size=5, stride=2),
    ConvStemConfig(out_channels=16, kernel_size=3, stride=2, activation_layer=nn.SiLU),
    ConvStemConfig(out_channels=24, kernel_size=2, stride=2),
]


def test_convolutional_stem_of_any_kernel_equals_torchvision(randomise, assert_equals_reference):
    net = VisionTransformer(image_size=32, num_classes=7, conv_stem_configs=STEM, **OF_TORCHVISION)
    reference = randomise(net).eval()
    as_dicts = [{"out_channels": 8, "kernel_size": 5}, {"out_channels": 16, "activation_layer": "silu"}, STEM[2]]
    images = torch.randn(2, 3, 32, 32)
    for conv_stem in (STEM, as_dicts):
        model = vit(conv_stem=conv_stem)
        report = load_weights(model, reference.state_dict())
        assert report.share == 1
        assert not report.missing
        assert not report.unexpected
        with torch.no_grad():
            assert_equals_reference("conv stem", model(images), reference(images))
    with pytest.raises(WeightsError, match="does not fit"):
        load_weights(vit(conv_stem=(8, 16, 24)), reference.state_dict())


@pytest.mark.parametrize("size", [48, 24])
def test_positions_between_those_of_a_table_are_torchvisions_timms_or_official(size, randomise):
    model = randomise(vit(interpolation="torchvision"))
    state = {"encoder.pos_embedding": model.pos_embed.detach()}
    theirs = interpolate_embeddings(size, 8, state)["encoder.pos_embedding"]
    side = size // 8
    torch.testing.assert_close(model.positions(side, side).detach(), theirs, atol=1e-5, rtol=1e-5)
    patches = model.pos_embed.detach()[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    for options, how in (
        ({}, {"mode": "bicubic", "antialias": True}),
        ({"antialias": False}, {"mode": "bicubic"}),
        ({"interpolation": "official"}, {"mode": "bicubic"}),
        ({"interpolation": "bilinear", "antialias": False}, {"mode": "bilinear"}),
    ):
        other = vit(**options)
        other.load_state_dict(model.state_dict())
        expected = F.interpolate(patches, size=(side, side), **how).flatten(2).transpose(1, 2)
        torch.testing.assert_close(other.positions(side, side)[:, 1:].detach(), expected, atol=1e-5, rtol=1e-5)


def test_published_weights_of_torchvision_imply_its_way_to_resize_positions():
    rows = {row.tag: row.options.get("interpolation") for row in backbone_info("vit_base_patch16").weights}
    assert {how for tag, how in rows.items() if tag.startswith("IMAGENET1K")} == {"torchvision"}
    assert rows["dino"] is None


@pytest.mark.parametrize("scale", [None, 0, 0.5])
def test_layer_scales_of_convnext_are_as_asked(scale, randomise, assert_equals_reference):
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    reference = randomise(timm.models.ConvNeXt(ls_init_value=scale, num_classes=7, **options)).eval()
    model = build_backbone("convnext_tiny", features_only=False, num_classes=7, layer_scale=scale, **options).eval()
    gammas = [p for name, p in model.named_parameters() if name.endswith("gamma")]
    assert all((gamma == scale).all() for gamma in gammas)
    assert len(gammas) == (0 if scale is None else 4)
    load_weights(model, reference.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_equals_reference(f"layer_scale={scale}", model(images), reference(images))


def test_windows_of_twins_may_differ_by_stage(randomise, assert_equals_reference):
    options = {"depths": (2, 2, 2, 2)}
    reference = randomise(timm.create_model("twins_svt_small", wss=(7, 14, 7, 7), **options)).eval()
    model = build_backbone("twins_svt_small", features_only=False, window_size=(7, 14, 7, 7), **options).eval()
    load_weights(model, reference.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_equals_reference("windows", model(images), reference(images))
    with pytest.raises(InputError, match="window_size"):
        build_backbone("twins_svt_small", window_size=(7, 7))


def test_windows_and_grids_of_maxvit_may_differ():
    options = {"depths": (1, 1, 1, 1), "window_size": 4, "grid_size": 8}
    model = build_backbone("maxvit_rmlp_pico_rw", position_hidden=None, **options)
    block = model.stages[2][0]
    assert (block.window.size, block.grid.size) == (4, 8)
    assert block.window.attn.rel_pos.table.shape[0] == 7 * 7
    assert block.grid.attn.rel_pos.table.shape[0] == 15 * 15
    assert [m.shape[-1] for m in model.eval()(torch.randn(1, 3, 50, 50))] == [13, 7, 4, 2]
    same = build_backbone("maxvit_rmlp_pico_rw", depths=(1, 1, 1, 1), partition=8, position_hidden=None)
    assert same.stages[0][0].window.size == same.stages[0][0].grid.size == 8


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_patches_of_mobilevit_may_be_larger(name, randomise, assert_equals_reference):
    reference = randomise(timm.create_model(name)).eval()
    for module in reference.modules():
        if hasattr(module, "patch_area"):
            module.patch_size, module.patch_area = ((4, 4) if isinstance(module.patch_size, tuple) else 4), 16
    model = build_backbone(name, features_only=False, patch_size=4).eval()
    load_weights(model, reference.state_dict())
    images = torch.randn(1, 3, 256, 128)
    with torch.no_grad():
        assert_equals_reference("patches", model(images), reference(images))
        assert_equals_reference("patches, fast", for_inference(model)(images), reference(images))
    with pytest.raises(InputError, match="patch_size=0"):
        build_backbone(name, patch_size=0)


def test_swin_has_absolute_positions_and_unnormed_patches_if_asked(randomise):
    options = {"depths": (1, 1, 1, 1), "out_indices": (0,)}
    model = randomise(build_backbone("swin_tiny", ape=True, img_size=32, **options)).eval()
    plain = build_backbone("swin_tiny", **options).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "stem.pos_embed"})
    images = torch.randn(1, 3, 64, 32)
    table = model.stem.pos_embed.detach().transpose(1, 2).unflatten(2, (8, 8))
    with torch.no_grad():
        positions = F.interpolate(table, size=(16, 8), mode="bicubic")
        torch.testing.assert_close(model.stem(images), plain.stem(images) + positions, atol=1e-5, rtol=1e-5)
    # as the official code names it: of the classifier (1, cells, C), of the dense code (1, C, rows, columns)
    for spelling in (model.stem.pos_embed.detach(), table):
        state = {**model.state_dict(), "absolute_pos_embed": spelling}
        del state["stem.pos_embed"]
        other = build_backbone("swin_tiny", ape=True, img_size=32, **options)
        load_weights(other, state)
        assert torch.equal(other.stem.pos_embed, model.stem.pos_embed)
    with pytest.raises(WeightsError, match="ape=True"):
        load_weights(plain, state)
    bare = build_backbone("swin_tiny", patch_norm=False, **options)
    assert "stem.norm.weight" not in bare.state_dict()
    assert math.prod(bare(images)[0].shape[2:]) == 16 * 8
