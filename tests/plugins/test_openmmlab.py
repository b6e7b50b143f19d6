"""Checkpoints of mmsegmentation, mmdetection and mmpretrain, whose own models name and order parameters their way."""

import re

import pytest
import timm
import torch
from torch import nn

from backbones import WeightsError, build_backbone
from backbones.weights import load_weights


def unfolded(value):
    """Rows of a patch merging as nn.Unfold stacks the cells; timm's are (cell, channel), columns before rows."""
    cells = value.unflatten(-1, (2, 2, -1))  # (..., column, row, channel)
    return torch.stack([cells[..., c, r, :] for r in (0, 1) for c in (0, 1)], dim=-1).flatten(-2)


def stacked(state, dense):
    """Queries, keys and values in the one `in_proj` of nn.MultiheadAttention, wherever there is a `q`."""
    converted = {}
    for key, value in state.items():
        if ".attn.kv." in key:
            continue
        if ".attn.q." in key:
            value = torch.cat([value, state[key.replace(".q.", ".kv.")]])
            key = re.sub(r"\.attn\.q\.", ".attn.attn.in_proj_", key)
        elif f"{key.partition('.attn.')[0]}.attn.q.weight" in state:
            key = key.replace(".attn.proj.", ".attn.attn.out_proj.")
        if dense and re.search(r"mlp\.fc\d\.weight", key):
            value = value[:, :, None, None]
        converted[key] = value
    return converted


def rename(state, *renames):
    converted = {}
    for key, value in state.items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        converted[key] = value
    return converted


def swin(state):
    state = {
        k: unfolded(v) if re.search(r"downsample\.(norm|reduction)", k) else v
        for k, v in state.items()
        if not k.startswith(("norm.", "head."))
    }
    return rename(
        state,
        (r"^patch_embed\.proj", "patch_embed.projection"),
        *((rf"^layers\.{i}\.downsample", f"stages.{i - 1}.downsample") for i in (1, 2, 3)),
        (r"^layers", "stages"),
        (r"\.attn\.", ".attn.w_msa."),
        (r"\.mlp\.fc1", ".ffn.layers.0.0"),
        (r"\.mlp\.fc2", ".ffn.layers.1"),
    )


def pvt(state):
    state = stacked({k: v for k, v in state.items() if not k.startswith("head.")}, dense=True)
    return rename(
        state,
        (r"^patch_embed", "stages.0.downsample"),
        (r"^stages\.(\d)\.downsample\.proj", r"layers.\1.0.projection"),
        (r"^stages\.(\d)\.downsample", r"layers.\1.0"),
        (r"^stages\.(\d)\.blocks", r"layers.\1.1"),
        (r"^stages\.(\d)\.norm", r"layers.\1.2"),
        (r"\.mlp\.fc1", ".ffn.layers.0"),
        (r"\.mlp\.dwconv", ".ffn.layers.1"),
        (r"\.mlp\.fc2", ".ffn.layers.4"),
    )


def twins(state):
    state = stacked({k: v for k, v in state.items() if not k.startswith(("head.", "norm."))}, dense=False)
    return rename(
        state,
        (r"^patch_embeds\.(\d)\.proj", r"patch_embeds.\1.projection"),
        (r"^pos_block\.(\d)\.proj\.0", r"position_encodings.\1.proj"),
        (r"^blocks", "layers"),
        (r"\.mlp\.fc1", ".ffn.layers.0.0"),
        (r"\.mlp\.fc2", ".ffn.layers.1"),
    )


def convnext(state):
    state = {k: v for k, v in state.items() if not k.startswith("head.")}
    state = {k: v[:, :, None, None] if re.search(r"mlp\.fc\d\.weight", k) else v for k, v in state.items()}
    return rename(
        state,
        (r"^stem", "downsample_layers.0"),
        (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"^stages\.(\d)\.blocks", r"stages.\1"),
        (r"\.conv_dw", ".depthwise_conv"),
        (r"\.mlp\.fc(\d)", r".pointwise_conv\1"),
    )


FAMILIES = {
    "swin_tiny": ("swin_tiny_patch4_window7_224", swin, "norm3"),
    "pvt_v2_b0": ("pvt_v2_b0", pvt, None),
    "twins_svt_small": ("twins_svt_small", twins, "norm_after_stage3"),
    "twins_pcpvt_small": ("twins_pcpvt_small", twins, "norm_after_stage3"),
    "convnext_tiny": ("convnext_tiny", convnext, "norm3"),
}


def reference_of(name, randomise):
    options = {"strict_img_size": False} if name.startswith("swin") else {}
    return randomise(timm.create_model(FAMILIES[name][0], **options))


@pytest.mark.parametrize(
    "name", ["pvt_v2_b0", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n != "pvt_v2_b0")]
)
def test_segmenters_of_openmmlab_load_their_backbone(name, randomise, assert_equals_reference):
    reference = reference_of(name, randomise)
    state = {f"backbone.{k}": v for k, v in FAMILIES[name][1](reference.state_dict()).items()}
    foreign = {"decode_head.conv_seg.weight": torch.ones(19, 8, 1, 1), "auxiliary_head.conv_seg.bias": torch.ones(19)}
    ours = build_backbone(name).eval()
    report = load_weights(ours, {"meta": {"epoch": 12}, "state_dict": state | foreign})
    assert report.layout in ("OpenMMLab", "official")
    assert report.prefix == "backbone."
    assert not report.missing
    assert report.unexpected.keys() == foreign.keys()
    as_timm_publishes = build_backbone(name).eval()
    load_weights(as_timm_publishes, reference.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        for stride, map_, theirs in zip(ours.strides, ours(images), as_timm_publishes(images), strict=True):
            assert_equals_reference(f"{name} stride {stride}", map_, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if row[2]])
def test_classifiers_of_openmmlab_load_with_their_head(name, randomise, assert_equals_reference):
    reference = reference_of(name, randomise)
    theirs = reference.state_dict()
    state = {f"backbone.{k}": v for k, v in FAMILIES[name][1](theirs).items()}
    norm = "head.norm" if name.startswith("convnext") else "norm"
    head = "head" if name.startswith("twins") else "head.fc"
    for kind in ("weight", "bias"):
        state[f"backbone.{FAMILIES[name][2]}.{kind}"] = theirs[f"{norm}.{kind}"]
        state[f"head.fc.{kind}"] = theirs[f"{head}.{kind}"]
    model = build_backbone(name, features_only=False).eval()
    report = load_weights(model, {"state_dict": state})
    assert not report.missing
    assert not report.mismatched
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert_equals_reference(name, model(images), reference(images))
    assert load_weights(build_backbone(name), {"state_dict": state}).share == 1  # its norm is the classifier's alone


def test_norms_of_maps_are_loaded_or_named(randomise):
    state = {f"backbone.{k}": v for k, v in swin(reference_of("swin_tiny", randomise).state_dict()).items()}
    norms = {f"backbone.norm{i}.{kind}": torch.randn(96 << i) for i in range(4) for kind in ("weight", "bias")}
    with pytest.raises(WeightsError, match=r"8 norms of the maps .* would be ignored: build with out_norm=True"):
        load_weights(build_backbone("swin_tiny"), state | norms)
    model = build_backbone("swin_tiny", out_norm=True, out_indices=(1, 3))
    load_weights(model, state | norms)
    for key, value in model.out_norms.state_dict().items():
        assert torch.equal(value, norms[f"backbone.norm{key}"])


def test_patches_merge_in_the_order_of_unfold():
    merging = build_backbone("swin_tiny", out_indices=(0, 1)).stages[1].downsample
    with torch.no_grad():
        for parameter in merging.parameters():
            parameter.normal_()
    rows, weight, bias = (
        unfolded(merging.reduction.weight),
        unfolded(merging.norm.weight),
        unfolded(merging.norm.bias),
    )
    images = torch.randn(2, 96, 8, 6)
    cells = nn.Unfold(2, stride=2)(images).transpose(1, 2)  # as OpenMMLab's own
    theirs = nn.functional.layer_norm(cells, (384,), weight, bias) @ rows.T
    torch.testing.assert_close(merging(images).flatten(2).transpose(1, 2), theirs, atol=1e-4, rtol=1e-4)
