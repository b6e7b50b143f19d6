"""Backbones inside models of transformers: registered, saved, loaded and frozen as theirs are, and nothing lost."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoBackbone, AutoConfig, DetrConfig, DetrForObjectDetection

from backbones import build_backbone
from backbones_tasks.transformers import DenseBackbone, DenseBackboneConfig

SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
}
NAMES = ["timm/test_efficientnet", "timm/test_vit_relpos"]


def detr(name, **options):
    config = DetrConfig(backbone_config=DenseBackboneConfig(name=name, **options), **SMALL)
    return DetrForObjectDetection(config).eval()


@pytest.fixture
def checkpoint(tmp_path):
    """Weights that no constructor draws, under the backbone's own names."""
    torch.manual_seed(7)
    model = build_backbone("timm/test_efficientnet")
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_and_loaded_says_the_same(name, tmp_path):
    model = detr(name, options={"frozen_stages": 1})
    model.save_pretrained(tmp_path)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 50, 70)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=0, atol=1e-6)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == frozen


def test_tables_that_no_file_holds_are_among_what_is_tried():
    model = build_backbone("timm/test_vit_relpos")
    assert set(dict(model.named_buffers())) - set(model.state_dict())


def test_auto_backbone_reads_a_folder(tmp_path):
    model = AutoBackbone.from_config(
        DenseBackboneConfig(name="timm/test_vit", out_features=["stage2", "stage4"])
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoBackbone.from_pretrained(tmp_path)
    assert isinstance(loaded, DenseBackbone)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DenseBackboneConfig)
    assert loaded.out_features == ["stage2", "stage4"]
    assert loaded.config.out_indices == [1, 3]
    assert loaded.channels == [32, 64]
    images = torch.rand(1, 3, 45, 60)
    with torch.no_grad():
        output = loaded(images, output_hidden_states=True)
        maps = model(images, return_dict=False)[0]
    assert [tuple(m.shape[1:]) for m in output.feature_maps] == [(32, 6, 8), (64, 2, 2)]
    assert output.hidden_states == output.feature_maps
    assert all(map(torch.equal, maps, output.feature_maps))


def test_weights_stay_as_the_backbone_has_drawn_them():
    torch.manual_seed(3)
    own = build_backbone("timm/test_vit").state_dict()
    torch.manual_seed(3)
    inner = detr("timm/test_vit").model.backbone.model.backbone.state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in own.items())


def test_pretrained_weights_are_loaded_with_a_report_and_without_warnings(checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        model = detr("timm/test_efficientnet", pretrained=str(checkpoint), batch_norm="train")
    assert model.model.backbone.model.load_report.share == 1
    state, inner = torch.load(checkpoint), model.model.backbone.model.backbone.state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in state.items())
    assert caplog.records == []


def test_a_checkpoint_of_another_backbone_gives_the_head_and_pretrained_weights_the_rest(checkpoint, tmp_path):
    model = detr("timm/test_efficientnet", pretrained=str(checkpoint))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    head = {name: value for name, value in state.items() if ".backbone." not in name}
    save_file(head, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)


def test_norms_that_a_head_freezes_keep_their_activation_and_epsilon(checkpoint):
    model = detr("timm/test_efficientnet", pretrained=str(checkpoint))
    own = build_backbone("timm/test_efficientnet", pretrained=str(checkpoint)).eval()
    dense, images = model.model.backbone.model, torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = dense(images).feature_maps
        for ours, theirs in zip(own(images), before, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        dense.train()
        assert all(map(torch.equal, dense(images).feature_maps, before)), "statistics of the batch were used"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in dense.modules())
    trained = detr("timm/test_efficientnet", batch_norm="train").model.backbone.model
    assert any(isinstance(module, nn.BatchNorm2d) for module in trained.modules())


def test_checkpointing_changes_no_gradient():
    model = AutoBackbone.from_config(DenseBackboneConfig(name="timm/test_vit"))
    images = torch.rand(1, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.gradient_checkpointing = enable
        assert model.backbone.checkpointing is enable
        model.zero_grad()
        model(images).feature_maps[-1].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    assert model.is_gradient_checkpointing
