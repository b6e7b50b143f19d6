"""Blocks that are compiled learn and predict what they would uncompiled, at any size."""

import copy

import pytest
import torch

from backbones import build_backbone, for_inference
from backbones.compiling import compile_blocks

# A minute or two each, most of it the compiler's.
SMALL = {
    "vit_tiny_patch16": {"depth": 4},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "mobilevitv2_050": {"depths": (1, 1, 1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compiled_blocks_learn_what_they_would_uncompiled(name):
    model = build_backbone(name, **SMALL[name]).train()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    for size in ((64, 96), (80, 64)):
        images = torch.randn(2, 3, *size)
        wanted = [torch.randn_like(y) for y in model(images)]  # a mean alone says little: maps are normed
        gradients = []
        for ours in (model, compiled):
            loss = sum((y * part).sum() for y, part in zip(ours(images), wanted, strict=True))
            gradients.append(torch.autograd.grad(loss, list(ours.parameters())))
        largest = max(expected.abs().max() for expected in gradients[0])
        for (key, _), expected, got in zip(model.named_parameters(), *gradients, strict=True):
            assert torch.allclose(got, expected, rtol=1e-3, atol=1e-6 * largest + 1e-4 * expected.abs().max()), key
    assert compiled.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_compiled_models_for_inference_predict_what_they_would_uncompiled(name, dtype):
    model = build_backbone(name, **SMALL[name]).eval()
    fast, compiled = for_inference(model, dtype=dtype), for_inference(model, dtype=dtype, compile=True)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for size in ((64, 96), (81, 64)):
        images = torch.randn(1, 3, *size)
        for expected, got in zip(fast(images), compiled(images), strict=True):
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()
