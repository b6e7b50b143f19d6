"""`for_inference` of every family: what the model yields, faster, for any size, and the model is left as it was."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from backbones import build_backbone, for_inference, list_backbones
from backbones.errors import InputError
from backbones.layers import FastConv, FastLinear
from backbones.testing import smallest_of_each_family

CHEAP = ("mobilevitv2_050", "pvt_v2_b0", "timm/resnet10t")
MORE = (
    "coatnet_bn_0_rw",
    "coatnet_rmlp_nano_rw",
    "maxvit_t",
    "pvt_v2_b2_li",
    "timm/efficientnet_b0",
    "timm/mobilenetv3_small_050",
    "timm/resnet26",
    "torchvision/mobilenet_v3_small",
    "torchvision/resnet18",
    "torchvision/resnet50",
    "twins_pcpvt_small",
)
FAMILIES = sorted({*smallest_of_each_family(list_backbones()), *CHEAP, *MORE})
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in FAMILIES]
)


@torch.no_grad()
def worst(model, other, images):
    """The largest difference of maps, over the largest number in the map."""
    pairs = zip(model(images), other(images), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@every_family
def test_maps_are_those_of_the_model_at_any_size_and_the_model_is_left_as_it_was(name, build):
    model = build(name)
    fast, state = for_inference(model), copy.deepcopy(model.state_dict())
    for size in ((64, 64), (70, 101), (64, 64)):
        images = torch.randn(2, 3, *size)
        before = model(images)
        assert worst(model, fast, images) < 1e-4
        assert all(torch.equal(a, b) for a, b in zip(before, model(images), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ours = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in ours for p in fast.parameters())
    assert model.train().training


@every_family
def test_norms_are_folded_and_kernels_are_chosen(name, build):
    model = build(name)
    fast = for_inference(model)
    kinds = [type(module) for module in fast.modules()]
    assert nn.Conv2d not in kinds
    assert nn.Linear not in kinds
    assert FastConv in kinds or FastLinear in kinds
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    left = sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert left < max(1, norms)  # those that stay come before an activation, or after squeeze-excitation


@every_family
def test_bfloat16_is_within_two_percent_or_no_worse_than_autocast(name):
    """On noise and fresh weights, autocast itself is off by up to 4 % in MobileViT, MaxViT and the hybrid."""

    def under_autocast(images):
        with torch.autocast("cpu", torch.bfloat16):
            return [m.float() for m in model(images)]

    model = build_backbone(name).eval()
    fast, images = for_inference(model, dtype=torch.bfloat16), torch.randn(2, 3, 96, 96)
    assert all(p.dtype == torch.bfloat16 for p in fast.parameters())
    assert all(m.dtype == torch.float32 for m in fast(images))
    assert all(m.dtype == torch.bfloat16 for m in fast(images.bfloat16()))
    assert 0 < worst(model, fast, images) < max(0.02, 1.5 * worst(model, under_autocast, images))


@every_family
def test_threads_copies_and_pickles_yield_the_same(name, build):
    fast = for_inference(build(name))
    sizes = [(64, 64), (64, 96), (96, 64), (32, 32)] * 3
    images = [torch.randn(1, 3, *size) for size in sizes]
    expected = [[m.clone() for m in fast(x)] for x in images]
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for model in (fast, copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        with ThreadPoolExecutor(4) as pool:
            for maps, theirs in zip(pool.map(model, images), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(maps, theirs, strict=True))
    with pytest.raises(InputError, match="cannot be trained"):
        copy.deepcopy(fast).train()


def test_training_is_refused_and_eval_is_not(build):
    fast = for_inference(build("pvt_v2_b0"))
    assert isinstance(fast, type(build("pvt_v2_b0")))
    with pytest.raises(InputError, match="cannot be trained"):
        fast.train()
    assert not fast.eval().training
    assert not any(m.requires_grad for m in fast(torch.randn(1, 3, 64, 64, requires_grad=True)))


def test_layers_with_hooks_adapters_or_other_norms_are_left_to_do_their_own(build):
    model = build("mobilevitv2_050")
    images = torch.randn(1, 3, 64, 64)
    plain = model(images)
    norm = model.stem[0].norm
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    model.stages[0][0].expand.norm = nn.GroupNorm(1, model.stages[0][0].expand.norm.num_features)
    assert worst(model, for_inference(model), images) < 1e-4
    assert not torch.allclose(model(images)[-1], plain[-1], atol=1e-3)


def test_layers_that_two_blocks_share_are_folded_for_each(randomise):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            conv = nn.Conv2d(4, 4, 3, padding=1)
            self.a = nn.Sequential(conv, nn.BatchNorm2d(4))
            self.b = nn.Sequential(conv, nn.BatchNorm2d(4))

        def forward(self, x):
            return [self.b(self.a(x))]

    model = randomise(Shared())
    assert worst(model, for_inference(model), torch.randn(1, 4, 8, 8)) < 1e-5


def test_another_dtype_is_refused():
    with pytest.raises(InputError, match="float64"):
        for_inference(nn.Linear(2, 2), dtype=torch.float64)
