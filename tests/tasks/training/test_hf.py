"""Training of transformers' heads by the commands: what goes by set prediction, and what is logged of it."""

import json

import pytest
import torch
from run_files import rows, same, weights
from small_heads import SMALL

from backbones import build_backbone
from backbones.cli import main
from backbones_tasks.training.detection import DetectionTask
from backbones_tasks.training.recipes import SET_PREDICTION
from backbones_tasks.training.segmentation import SegmentationTask

pytestmark = pytest.mark.usefixtures("workplace")

BACKBONE = "timm/test_resnet"
DATA = ["--data.shapes.size=64", "--data.shapes.train=4", "--data.shapes.val=2", "--data.batch_size=2"]
FEW = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]


def fit(task, head, *options):
    built = "detector" if task == "detection" else "decoder"
    small = json.dumps(SMALL[f"hf/{head}"])
    model = [f"--model.{built}=hf/{head}", f"--model.{built}_options={small}", f"--backbone={BACKBONE}"]
    return main(["fit", task, *DATA, *FEW, *model, *map(str, options)])


def test_sets_are_trained_at_rates_of_their_own_unless_told(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(build_backbone(BACKBONE).state_dict(), file)
    published, small = {"name": BACKBONE, "pretrained": str(file)}, SMALL["hf/rt_detr_v2"]

    def recipe(backbone, **options):
        found = DetectionTask(backbone, "hf/rt_detr_v2", small, num_classes=3, **options).hparams
        return [found[name] for name in ("lr", "weight_decay", "backbone_lr", "layer_decay")]

    assert recipe(BACKBONE) == [SET_PREDICTION.lr, SET_PREDICTION.weight_decay, 1.0, 1.0]
    assert recipe(published) == [SET_PREDICTION.lr, SET_PREDICTION.weight_decay, SET_PREDICTION.published_lr, 1.0]
    assert recipe(published, layer_decay=0.8, lr=1e-5) == [1e-5, SET_PREDICTION.weight_decay, 1.0, 0.8]
    others = DetectionTask(BACKBONE, "fcos", {"fpn_channels": 64}, num_classes=3).hparams
    assert [others[name] for name in ("lr", "weight_decay", "backbone_lr")] == [1e-3, 0.05, 1.0]


def test_gradients_are_cut_to_the_norm_that_heads_are_trained_with(capsys, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, n, **o: norms.append(n) or clip(p, n, **o))
    assert fit("detection", "detr", "--trainer.max_steps=1") == 0
    assert fit("detection", "detr", "--trainer.max_steps=1", "--trainer.gradient_clip_val=0.5") == 0
    assert norms == [SET_PREDICTION.clip, 0.5]
    assert fit("detection", "detr", "--print_groups") == 0
    assert "cut to a norm of 0.1" in capsys.readouterr().out


def test_a_resumed_run_of_a_detector_equals_an_uninterrupted_one_to_the_last_digit(monkeypatch):
    options = ["--model.ema=0.9", "--model.layer_decay=0.9", "--model.freeze_epochs=1"]
    assert fit("detection", "rt_detr_v2", *options, "--out", "whole") == 0
    step = DetectionTask.training_step

    def breaks_off(self, images, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 1):
            raise RuntimeError("power cut")
        return step(self, images, batch_idx)

    monkeypatch.delenv("BACKBONES_RUN", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("detection", "rt_detr_v2", *options, "--out", "cut")
    torch.rand(3)  # a new process has another state
    assert main(["fit", "detection", "--out", "cut", "--ckpt_path", "last"]) == 0
    assert same(weights("whole"), weights("cut"))
    assert rows("whole") == rows("cut")
    parts = {name for name in rows("whole")[-1] if name.startswith("loss_")}
    assert {f"loss_{part}{layer}" for part in ("vfl", "bbox", "giou") for layer in ("", "_aux_0", "_dn_0")} <= parts
    for row in rows("whole"):
        assert float(row["train_loss"]) == pytest.approx(sum(float(row[name]) for name in parts), rel=1e-4)


def test_a_segmenter_of_masks_trains_by_losses_of_its_own(capsys):
    assert fit("segmentation", "mask2former", "--out", "run") == 0
    row = rows("run")[-1]
    parts = [f"loss_{part}{layer}" for part in ("mask", "dice", "cross_entropy") for layer in ("", "_0", "_1")]
    assert float(row["train_loss"]) == pytest.approx(sum(float(row[name]) for name in parts), rel=1e-4)
    assert 0 <= float(row["mIoU"]) <= 1
    assert fit("segmentation", "mask2former", "--model.loss=dice") != 0
    assert "hf/mask2former has losses of its own: leave model.loss out" in capsys.readouterr().err


def test_a_single_class_of_masks_is_told_from_the_rest():
    task = SegmentationTask(BACKBONE, "hf/mask2former", SMALL["hf/mask2former"], num_classes=1).eval()
    assert task(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)
