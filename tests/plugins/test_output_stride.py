"""`output_stride` 8 and 16 of every family: sizes as told, the same weights, what they see in the same places."""

import math
from functools import partial

import pytest
import torch

from backbones import build_backbone, list_backbones
from backbones.layers import LogPositionBias
from backbones.testing import check_backbone, smallest_of_each_family
from backbones_torchvision.table import MODELS

FAMILIES = smallest_of_each_family(list_backbones())
TORCHVISION = [
    f"torchvision/{name}"
    for name in {model.family: name for name, model in sorted(MODELS.items(), key=lambda m: -m[1].params)}.values()
]
PLAIN = ("vit_tiny_patch16", "deit_tiny_patch16", "deit3_small_patch16")
QUICK = ("pvt_v2_b0", "edgevit_xxs", "torchvision/mobilenet_v2", "torchvision/resnet18")


@pytest.mark.parametrize("output_stride", [8, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [*FAMILIES, *QUICK[2:], *(pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION)]
)
@pytest.mark.usefixtures("on_meta")
def test_maps_and_weights_are_those_told(name, output_stride):
    published, model = build_backbone(name), build_backbone(name, output_stride=output_stride).eval()
    assert model.strides == [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    maps = model(torch.randn(1, 3, 97, 33))
    assert [m.shape[1] for m in maps] == model.out_channels
    assert [m.shape[2:] for m in maps] == [(math.ceil(97 / s), math.ceil(33 / s)) for s in model.strides]
    shapes, dense = ({k: v.shape for k, v in m.state_dict().items()} for m in (published, model))
    if name in PLAIN:  # but for the pyramid, which checkpoints lack
        shapes, dense = ({k: v for k, v in s.items() if not k.startswith("pyramid")} for s in (shapes, dense))
    assert dense == shapes


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in [*FAMILIES, *TORCHVISION]
        if name not in PLAIN and not name.startswith("mobilevit")  # timm's, and a rule of its own
    ],
)
def test_every_second_cell_of_a_denser_map_is_that_of_the_published_one(name, output_stride):
    """All but exactly where all layers are convolutions; nearly where keys, windows and tables are denser too."""
    if ("mobilenet_v3" in name and output_stride == 16) or (name == "convnext_tiny" and output_stride == 8):
        pytest.skip("torchvision's own way to dilate, and timm's, which move a kernel by a cell")
    published = build_backbone(name).eval()
    model = build_backbone(name, output_stride=output_stride).eval()
    model.load_state_dict(published.state_dict())
    images = torch.randn(1, 3, 97, 130)
    exact = name.startswith("torchvision/") and "swin" not in name
    with torch.inference_mode():
        for i, (dense, expected) in enumerate(zip(model(images), published(images), strict=True)):
            step = max(1, published.strides[i] // output_stride)
            both = torch.stack([dense[..., ::step, ::step].flatten(), expected.flatten()])
            assert torch.corrcoef(both)[0, 1] > (0.9999 if exact else 0.9)


def test_patches_that_overlap_have_their_middles_where_cells_are():
    """Of an image that is one ramp, a patch's mean is the value in the middle of its cell."""
    model = build_backbone("vit_tiny_patch16", output_stride=8, depth=4, pyramid="plain")
    with torch.no_grad():
        model.patch_embed.proj.weight.fill_(1 / (3 * 16 * 16))
        model.patch_embed.proj.bias.zero_()
        ramp = torch.arange(64.0).expand(1, 3, 64, 64) + 0.5
        patches = model.patch_embed(ramp)
    assert patches.shape == (1, 8, 8, 192)
    torch.testing.assert_close(patches[0, 4, 1:-1, 0], torch.arange(12.0, 60, 8))


@pytest.mark.parametrize(("patch_size", "output_stride", "stride"), [(14, 8, 7), (14, 16, 14), (32, 8, 8), (8, 16, 8)])
def test_patches_lie_no_farther_apart_than_the_output_stride(patch_size, output_stride, stride):
    options = {"patch_size": patch_size, "output_stride": output_stride, "depth": 4, "img_size": 2 * patch_size}
    model = build_backbone("vit_tiny_patch16", pyramid="plain", **options).eval()
    assert model.strides == [stride]
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 61, 40))[0].shape[2:] == (math.ceil(61 / stride), math.ceil(40 / stride))


def test_a_convolutional_stem_keeps_its_last_strides_out():
    model = build_backbone("vit_tiny_patch16", conv_stem=(24, 48, 96, 192), output_stride=8, depth=4).eval()
    convs = [step[0] for step in model.patch_embed.convs]
    assert [(conv.stride[0], conv.dilation[0]) for conv in convs] == [(2, 1), (2, 1), (2, 1), (1, 1)]
    with torch.inference_mode():
        assert [m.shape[2:] for m in model(torch.randn(1, 3, 64, 64))] == [(16, 16), (8, 8), (8, 8), (8, 8)]


def test_windows_hold_more_cells_and_biases_are_those_of_the_same_offsets():
    swin = build_backbone("swin_tiny", output_stride=16)
    assert [stage.blocks[0].attn.windows.size for stage in swin.stages] == [7, 7, 7, 14]
    assert swin.stages[3].blocks[1].attn.windows.shift == 6
    twins = build_backbone("twins_svt_small", output_stride=8)
    assert [stage.blocks[0].attn.window_size for stage in twins.stages] == [7, 7, 14, 28]
    published, dense = LogPositionBias(2), LogPositionBias(2, dilation=2)
    dense.load_state_dict(published.state_dict())
    with torch.no_grad():
        every_second = dense.eval().by_offset(14, 14)[:, 1::2, 1::2]
        torch.testing.assert_close(every_second, published.eval().by_offset(7, 7))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["shapes", "any_size", "gradients", "checkpointing", "for_inference", "export"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_maps_keep_the_contract(name, check):
    (result,) = check_backbone(partial(build_backbone, name, output_stride=8), checks=[check])
    assert result.outcome == "passed", result.message
