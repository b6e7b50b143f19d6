"""The recipe: who learns how fast, what is frozen when, precision, accumulation."""

import re
from pathlib import Path

import pytest
import torch
from run_files import rows, same, weights
from torchvision.models import resnet18

from backbones import backbone_info, build_backbone
from backbones.cli import main
from backbones_tasks.training.callbacks import Unfreezing
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.detection import DetectionTask
from backbones_tasks.training.segmentation import SegmentationTask

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=32",
    "--data.shapes.train=8",
    "--data.shapes.val=4",
    "--data.batch_size=4",
    "--model.decoder_options={decoder_channels: 8}",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
DEPTHS = {"vit_tiny_patch16": (12,), "swin_tiny": (2, 2, 6, 2), "convnext_tiny": (3, 3, 9, 3)}


def fit(*options):
    return main(["fit", "segmentation", *SMALL, *map(str, options)])


@pytest.fixture
def power_cut(monkeypatch):
    """Trains until a step fails, and then goes on."""

    def run(folder, epoch, batch, *options):
        step = SegmentationTask.training_step

        def breaks_off(self, images, batch_idx):
            if (self.current_epoch, batch_idx) == (epoch, batch):
                raise RuntimeError("power cut")
            return step(self, images, batch_idx)

        monkeypatch.delenv("BACKBONES_RUN", raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(SegmentationTask, "training_step", breaks_off)
            with pytest.raises(RuntimeError, match="power cut"):
                fit(*options, "--out", folder)
        torch.rand(3)  # a new process has another state
        assert main(["fit", "segmentation", "--out", folder, "--ckpt_path", "last"]) == 0

    return run


# Who learns how fast


def layers_in_order(name):
    """Prefixes of a backbone's parameters, a list for each layer, as images pass them."""
    if name.startswith("vit"):
        stem = ["cls_token", "pos_embed", "patch_embed."]
        return [stem, *([f"blocks.{k}."] for k in range(DEPTHS[name][0]))]
    layers = [["stem."]]
    for stage, depth in enumerate(DEPTHS[name]):
        if stage:
            layers.append([f"stages.{stage}.downsample."])
        layers += [[f"stages.{stage}.blocks.{block}."] for block in range(depth)]
    return layers


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("head", ["upernet", "mask_rcnn"])
def test_each_parameter_is_in_one_group_with_the_rate_of_its_layer(name, head):
    if head == "upernet":
        options = {"decoder_options": {"decoder_channels": 8}}
        task, path = SegmentationTask(name, lr=1.0, layer_decay=0.75, **options), "backbone."
    else:
        options = {"fpn_channels": 8, "box_channels": 8}
        task = DetectionTask(name, "mask_rcnn", options, lr=1.0, layer_decay=0.75)
        path = "backbone.body."
    parameters = dict(task.model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    grouped = [(names[p], group) for group in task.make_optimizer().param_groups for p in group["params"]]
    assert sorted(found for found, _ in grouped) == sorted(parameters), "every parameter, and once"

    layers = layers_in_order(name)
    seen = set()
    for found, group in grouped:
        inside = [k for k, prefixes in enumerate(layers) if found.removeprefix(path).startswith(tuple(prefixes))]
        (layer,) = inside if found.startswith(path) and inside else (len(layers),)  # heads, pyramids, last norms
        seen.add(layer)
        assert group["lr"] * group["lr_scale"] == pytest.approx(0.75 ** (len(layers) - layer)), found
    assert seen == set(range(len(layers) + 1))

    still = {found for found, group in grouped if group["weight_decay"] == 0}
    assert all(parameters[found].ndim > 1 for found in parameters.keys() - still)
    tables = {found for found in still if parameters[found].ndim > 1}
    ends = {"vit_tiny_patch16": {"cls_token", "pos_embed"}, "swin_tiny": {"table"}, "convnext_tiny": set()}[name]
    assert {found.rpartition(".")[2] for found in tables} == ends, "of what is not a vector, position tables alone"


def test_backbones_from_published_weights_get_their_familys_layer_decay(tmp_path, capsys):
    fresh = SegmentationTask("vit_tiny_patch16", decoder_options={"decoder_channels": 8})
    file = tmp_path / "vit.pth"
    torch.save(fresh.model.backbone.state_dict(), file)
    published = {"name": "vit_tiny_patch16", "pretrained": str(file)}

    def decay(backbone, **options):
        return SegmentationTask(backbone, decoder_options={"decoder_channels": 8}, **options).hparams["layer_decay"]

    assert fresh.hparams["layer_decay"] == 1.0, "from scratch, all layers have as much to learn"
    assert decay(published) == backbone_info("vit_tiny_patch16").layer_decay == 0.75
    assert decay(published, layer_decay=0.6) == 0.6
    assert decay(published, layer_decay=1.0) == 1.0
    assert decay(published, backbone_lr=0.1) == 1.0, "one way of going slow is enough"
    assert fit("--trainer.max_epochs=1", f"--backbone={{name: vit_tiny_patch16, pretrained: {file}}}", "--out=run") == 0
    assert "layer decay 0.75" in capsys.readouterr().out
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["layer_decay"] == 0.75


def test_a_checkpoint_needs_the_weights_no_more_that_it_began_with(tmp_path, capsys, monkeypatch):
    file = tmp_path / "vit.pth"
    torch.save(build_backbone("vit_tiny_patch16").state_dict(), file)
    backbone = f"--backbone={{name: vit_tiny_patch16, pretrained: {file}, pretrained_cfg: {{mean: [0.1, 0.2, 0.3]}}}}"
    assert fit("--trainer.max_epochs=1", backbone, "--out=run") == 0
    file.unlink()
    monkeypatch.delenv("BACKBONES_RUN")
    told = Path("run/config.yaml").read_text()
    assert main(["fit", "segmentation", "--ckpt_path=last", "--trainer.max_epochs=2", "--out=run"]) == 0
    assert "layer decay 0.75" in capsys.readouterr().out
    assert Path("run/config.yaml").read_text() == told.replace("max_epochs: 1", "max_epochs: 2")
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["backbone"]["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert main(["validate", "segmentation", "--config=run/config.yaml", "--ckpt_path=last", "--out=run"]) == 0
    assert main(["fit", "segmentation", "--config=run/config.yaml", "--out=anew"]) == 2
    assert "vit.pth" in capsys.readouterr().err


def test_a_checkpoint_needs_no_weights_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, file, **_: torch.save(resnet18().state_dict(), file)
    )
    backbone = {"name": "torchvision/resnet18", "weights": "IMAGENET1K_V1"}
    task = SegmentationTask(backbone, decoder_options={"decoder_channels": 8})
    assert task.hparams["backbone"].keys() == {"name", "pretrained_cfg"}
    assert task.hparams["backbone"]["pretrained_cfg"]["tag"] == "IMAGENET1K_V1"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.layer_decay=0", "model.layer_decay=0.0 must be over 0 and at most 1"),
        ("--model.layer_decay=1.5", "model.layer_decay=1.5 must be over 0"),
        ("--model.freeze_epochs=-1", "model.freeze_epochs=-1 must be at least 0"),
        ("--model.unfreeze_every=-1", "model.unfreeze_every=-1 must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused(argument, message, capsys):
    assert fit(argument) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


# What is frozen when


@pytest.mark.parametrize(
    ("epochs", "every", "always", "frozen"),
    [
        (0, 0, -1, [-1, -1]),
        (2, 0, -1, [4, 4, -1, -1]),
        (1, 1, -1, [4, 3, 2, 1, 0, -1, -1]),
        (1, 2, -1, [4, 3, 3, 2, 2, 1, 1, 0, 0, -1]),
        (0, 1, -1, [3, 2, 1, 0, -1, -1]),
        (1, 1, 1, [4, 3, 2, 1, 1, 1]),
    ],
)
def test_stages_thaw_from_the_deepest_to_the_stem(epochs, every, always, frozen):
    unfreezing = Unfreezing(epochs, every)
    unfreezing.parts, unfreezing.always = [[]] * 5, always
    assert [unfreezing._frozen_stages(epoch) for epoch in range(len(frozen))] == frozen


def test_what_is_frozen_stays_as_it_is_and_a_resumed_run_thaws_alike(power_cut, monkeypatch, capsys):
    backbone = "--backbone={name: mobilevit_xxs, drop_path_rate: 0.1}"
    gradual = ["--model.freeze_epochs=1", "--model.unfreeze_every=1", "--model.ema=0.5", "--model.layer_decay=0.9"]
    options = [backbone, *gradual, "--trainer.max_epochs=7"]
    seen = {}

    def look(self):
        state = {name: value.clone() for name, value in self.model.backbone.state_dict().items()}
        seen[self.current_epoch] = (state, {p for p, v in self.model.backbone.named_parameters() if v.requires_grad})

    monkeypatch.setattr(SegmentationTask, "on_train_epoch_end", look, raising=False)
    assert fit(*options, "--out=whole") == 0
    printed = re.findall("the backbone trains (.*)", capsys.readouterr().out)
    assert printed == [*(f"from stage {n} of 4 on" for n in (4, 3, 2, 1)), "as a whole"]
    assert seen[0][1] == set()
    parts = ["stages.3.", "stages.2.", "stages.1.", "stages.0.", "stem."]
    for epoch in range(1, 7):
        before, after = seen[epoch - 1][0], seen[epoch][0]
        moving = tuple(parts[:epoch])
        assert seen[epoch][1] == {name for name in after if name.startswith(moving) and name in seen[6][1]}
        for name in after:  # batch norms' statistics too
            assert not torch.equal(before[name], after[name]) or not name.startswith(moving) or epoch == 6, name
            assert torch.equal(before[name], after[name]) or name.startswith(moving), name

    power_cut("broken", 3, 1, *options)
    assert rows("whole") == rows("broken")
    assert same(weights("whole"), weights("broken"))


def test_processes_do_not_wait_for_frozen_parameters():
    options = ["--backbone=mobilevit_xxs", "--model.freeze_epochs=1", "--trainer.strategy=ddp", "--trainer.devices=1"]
    try:
        assert fit(*options, "--trainer.max_epochs=2", "--out=run") == 0
    finally:
        torch.distributed.destroy_process_group()
    assert len(rows("run")) == 2


# Precision, accumulation, checkpointing


@pytest.mark.parametrize(
    ("precision", "accelerator"),
    [
        ("bf16-mixed", "cpu"),
        ("bf16-true", "cpu"),
        *(pytest.param(p, "gpu", marks=pytest.mark.gpu) for p in ("bf16-mixed", "bf16-true", "16-mixed")),
    ],
)
def test_lower_precision_trains(precision, accelerator):
    options = [f"--trainer.precision={precision}", f"--trainer.accelerator={accelerator}", "--model.ema=0.5"]
    assert fit(*options, "--trainer.max_epochs=1", "--out=run") == 0
    (row,) = rows("run")
    assert 0 < float(row["train_loss"]) < 10
    assert weights("run")["model.head.0.weight"].dtype == torch.float32, "averages are never rounded"


def test_a_run_that_accumulates_gradients_goes_on_exactly(power_cut):
    options = ["--trainer.accumulate_grad_batches=2", "--data.shapes.train=20", "--trainer.max_epochs=2"]
    options += ["--backbone={name: mobilevit_xxs, drop_path_rate: 0.1}"]
    assert fit(*options, "--out=whole") == 0
    assert [row["step"] for row in rows("whole")] == ["3", "6"], "five batches are two steps and a half"
    power_cut("broken", 1, 3, *options)
    assert rows("whole") == rows("broken")
    assert same(weights("whole"), weights("broken"))


def test_milestones_are_epochs_whether_or_not_gradients_accumulate():
    options = ["--trainer.max_epochs=3", "--data.shapes.train=20", "--model.schedule=multistep", "--model.warmup=0"]
    options += ["--model.schedule_options={decay_milestones: [2], decay_rate: 0.5}", "--backbone=mobilevit_xxs"]
    assert fit(*options, "--trainer.accumulate_grad_batches=4", "--out=run") == 0
    assert [float(row["lr"]) for row in rows("run")] == pytest.approx([1e-3, 5e-4, 5e-4])


def test_recomputed_activations_train_the_same(monkeypatch):
    for name in ("true", "false"):
        backbone = f"--backbone={{name: vit_tiny_patch16, checkpointing: {name}, drop_path_rate: 0.2}}"
        assert fit(backbone, "--trainer.max_epochs=1", f"--out={name}", "--seed_everything=1") == 0
        monkeypatch.delenv("BACKBONES_RUN")
    assert rows("true") == rows("false")
    recomputed, kept = weights("true"), weights("false")
    assert all(torch.allclose(recomputed[name], kept[name], atol=1e-6) for name in kept)
    assert ClassificationTask({"name": "vit_tiny_patch16", "checkpointing": True}).model.backbone.checkpointing
