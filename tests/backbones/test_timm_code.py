"""Code that people wrote for timm's models runs on backbones as it stands."""

import argparse
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from segmentation_models_pytorch.encoders import timm_universal
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint, model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, freeze, get_state_dict
from torch import nn
from torch.nn import functional as F

from backbones import build_backbone, wrap
from backbones.weights import load_weights

CREATE = {"timm": timm.create_model, "ours": build_backbone}


class FPN(nn.Module):
    """A feature pyramid network as users of timm write it."""

    def __init__(self, create, name, dim=16, out_indices=(1, 2, 3)):
        super().__init__()
        self.backbone = create(name, pretrained=False, features_only=True, out_indices=out_indices, in_chans=3)
        levels = self.backbone.feature_info.get_dicts(keys=["num_chs", "reduction"])
        self.strides = [level["reduction"] for level in levels]
        self.lateral = nn.ModuleList(nn.Conv2d(level["num_chs"], dim, 1) for level in levels)
        self.smooth = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, images):
        maps = [conv(x) for conv, x in zip(self.lateral, self.backbone(images), strict=True)]
        for finer, coarser in zip(maps[-2::-1], maps[:0:-1], strict=True):
            finer += F.interpolate(coarser, size=finer.shape[-2:])
        return [self.smooth(x) for x in maps]


def test_a_pyramid_network_gives_the_same_on_ours_and_on_timms(randomise):
    theirs, ours = (randomise(FPN(create, "pvt_v2_b0")) for create in CREATE.values())
    load_weights(ours.backbone, theirs.backbone.state_dict())
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "backbone" not in k}, strict=False)
    assert ours.strides == theirs.strides == [8, 16, 32]
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        for mine, timms in zip(ours(images), theirs(images), strict=True):
            assert timms.std() > 0.01
            torch.testing.assert_close(mine, timms, atol=1e-4, rtol=1e-4)


def test_feature_info_answers_as_timms():
    theirs, ours = (create("pvt_v2_b0", features_only=True, out_indices=(0, 2)) for create in CREATE.values())
    for info in (theirs.feature_info, ours.feature_info):
        assert info.channels() == [32, 160]
        assert info.channels()[-1] == 160
        assert info.channels(3) == 256
        assert info.channels([1, 3]) == [64, 256]
        assert info.reduction() == [4, 16]
        assert info.reduction(-1) == 32
        assert tuple(info.out_indices) == (0, 2)
        assert len(info) == 4
        assert info[1]["num_chs"] == info.info[1]["num_chs"] == info.get("num_chs", 1) == 64
        assert info.get_dicts(["num_chs"]) == [{"num_chs": 32}, {"num_chs": 160}]
        assert info.get_dicts()[1]["index"] == 2
        assert len(info.module_name()) == 2


class Two(nn.Module):
    """Two maps, of strides 4 and 8."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 8, 2, 2)

    def forward(self, images):
        x = self.a(images)
        return [x, self.b(x)]


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_backbone("pvt_v2_b0", out_norm=True, out_indices=(0, 3)),
        lambda: build_backbone("vit_tiny_patch16", out_indices=(0, 3)),
        lambda: wrap(Two(), channels=(4, 8), strides=(4, 8)),
    ],
    ids=["pvt", "vit", "wrapped"],
)
def test_hooks_on_the_modules_that_feature_info_names_see_the_maps(build):
    model = build().eval()
    seen = []
    for name in model.feature_info.module_name():
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    maps = model(torch.randn(1, 3, 64, 96))
    assert len(seen) == len(maps)
    assert all(torch.equal(a, b) for a, b in zip(seen, maps, strict=True))


@pytest.mark.parametrize("depth", [3, 5])
def test_smps_encoder_for_timm_models_takes_ours(depth, monkeypatch):
    """The class behind smp's `tu-` encoders, unchanged, with our builder in the place of timm's."""
    monkeypatch.setattr(timm_universal, "timm", SimpleNamespace(create_model=build_backbone))
    encoder = timm_universal.TimmUniversalEncoder("pvt_v2_b0", pretrained=False, in_channels=4, depth=depth).eval()
    assert encoder.out_channels == [4, 0, 32, 64, 160, 256][: depth + 1]
    assert encoder.output_stride == 2**depth
    with torch.inference_mode():
        maps = encoder(torch.randn(2, 4, 64, 96))
    assert [m.shape[1] for m in maps] == encoder.out_channels
    assert [64 // m.shape[2] for m in maps] == [2**i for i in range(depth + 1)]


def test_smps_encoder_for_timm_models_dilates_ours(monkeypatch):
    monkeypatch.setattr(timm_universal, "timm", SimpleNamespace(create_model=build_backbone))
    encoder = timm_universal.TimmUniversalEncoder("convnext_tiny", pretrained=False, output_stride=16, depths=(1,) * 4)
    assert [64 // m.shape[2] for m in encoder(torch.randn(1, 3, 64, 64))] == [1, 2, 4, 8, 16, 16]


def test_data_config_is_that_of_timms_model():
    for name in ("pvt_v2_b0", "convnext_tiny"):
        with torch.device("meta"):
            ours, theirs = build_backbone(name), timm.create_model(name)
        a, b = (resolve_data_config({}, model=model) for model in (ours, theirs))
        assert {**a, "crop_pct": 0} == {**b, "crop_pct": 0}  # of the evaluation, which our specs do not tell
    assert ours.default_cfg is ours.pretrained_cfg
    assert ours.default_cfg["architecture"] == "convnext_tiny"
    assert ours.default_cfg["num_classes"] == 1000
    assert ours.get_submodule(ours.default_cfg["first_conv"]).in_channels == 3
    config = resolve_data_config({"img_size": 96}, model=ours)
    image = create_transform(**config)(Image.new("RGB", (120, 100), "red"))
    assert image.shape == (3, 96, 96)
    assert image[0].mean() == pytest.approx((1 - IMAGENET_DEFAULT_MEAN[0]) / 0.229, abs=1e-3)


def test_a_training_script_in_timms_manner_runs(tmp_path):
    """The calls of timm's train.py, in its order."""
    model = build_backbone("pvt_v2_b0", features_only=False, num_classes=5, in_chans=3, drop_rate=0.1)
    assert model.num_classes == 5
    assert model.num_features == 256
    model.set_grad_checkpointing(enable=True)
    data_config = resolve_data_config({"img_size": 32}, model=model)
    model.to(memory_format=torch.channels_last)
    model = convert_sync_batchnorm(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    ema = ModelEmaV3(model, decay=0.5)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, warmup_epochs=1)
    args = argparse.Namespace(model="pvt_v2_b0")
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    batch = torch.randn(4, *data_config["input_size"]), torch.tensor([0, 1, 2, 3])
    losses = []
    for epoch in range(epochs):
        model.train()
        for step in range(3):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model_parameters(model, exclude_head=True), 1.0)
            optimizer.step()
            ema.update(model, step=3 * epoch + step)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    assert losses[-1] < losses[0]

    model.eval()
    again = build_backbone("pvt_v2_b0", features_only=False, num_classes=5)
    load_checkpoint(again, tmp_path / "last.pth.tar", use_ema=False)
    ema_again = build_backbone("pvt_v2_b0", features_only=False, num_classes=5).eval()
    load_checkpoint(ema_again, tmp_path / "last.pth.tar", use_ema=True)
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(batch[0]), model(batch[0]))
        torch.testing.assert_close(ema_again(batch[0]), ema.module(batch[0]))
        assert not torch.equal(ema.module(batch[0]), model(batch[0]))
    assert get_state_dict(ema).keys() == model.state_dict().keys()


def test_a_classifier_is_taken_apart_as_timms():
    model = build_backbone("pvt_v2_b0", features_only=False).eval()
    images = torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 2, 2)
    torch.testing.assert_close(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier().out_features == 1000
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7)
    freeze(model, ["stages.0"])
    assert {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad} == {"0"}
