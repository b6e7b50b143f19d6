"""The commands, end to end: refusals, run folders, resuming, measuring, labelling."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from run_files import rows, same, weights
from torch import nn

from backbones import for_inference
from backbones.cli import main
from backbones_tasks.commands import predict
from backbones_tasks.commands.command_line import CommandLine
from backbones_tasks.data.segmentation import ShapesDataset
from backbones_tasks.files import save
from backbones_tasks.training.callbacks import AtomicCheckpointIO, read_metrics
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.segmentation import SegmentationTask
from backbones_tasks.training.tasks import load_task

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=32",
    "--data.shapes.train=16",
    "--data.shapes.val=4",
    "--data.batch_size=4",
    "--model.decoder_options={decoder_channels: 8}",
    "--trainer.max_epochs=3",
    "--trainer.accelerator=cpu",
]
DROP_PATH = "--backbone={name: pvt_v2_b0, drop_path_rate: 0.3}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert fit("--out", folder, DROP_PATH, "--model.aux=true") == 0
    os.environ.pop("BACKBONES_RUN", None)
    return folder


def fit(*options):
    return main(["fit", "segmentation", *SMALL, *map(str, options)])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.backbon=pvt_v2_b0", "did you mean 'model.backbone'?"),
        ("--data.crop_sise=32", "did you mean 'data.crop_size'?"),
        ("--data.shapes.sise=32", "did you mean 'data.shapes.size'?"),
        ("--trainer.max_epoch=3", "did you mean 'trainer.max_epochs'?"),
        ("--backbonee=pvt_v2_b0", "did you mean 'backbone'?"),
        ("--model.lr=fast", "model.lr"),
        ("--backbone=pvt_v2_b9", "did you mean 'pvt_v2_b"),
        ("--backbone={drop_path_rate: 0.1}", 'lack "name"'),
        ("--model.decoder=smp/unte", "did you mean 'smp/unet'?"),
        ("--model.optimizer=rmspropp", "did you mean 'rmsprop'?"),
        ("--model.schedule=cosinus", "model.schedule='cosinus'"),
        ("--model.schedule_options={decay_rat: 1}", "cosine has no option 'decay_rat'"),
        ("--model.ema=1", "model.ema=1.0 must be at least 0 and under 1"),
        ("--config=typo.yaml", "did you mean 'model.lr'?"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_loaded(argument, message, capsys, monkeypatch, workplace):
    Path("typo.yaml").write_text("model:\n  lrr: 0.1\n")
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda self: pytest.fail("something was built"))
    assert main(["fit", "segmentation", argument]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in workplace.iterdir()] == ["typo.yaml"]


@pytest.mark.parametrize("task", ["segmentation", "multitask"])
def test_help_begins_with_what_users_set_first(task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", task, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    order = [
        "--data DIR",
        "--backbone NAME",
        "--out DIR",
        "--ckpt_path",
        "--model.backbone",
        "--data.root",
        "--trainer",
    ]
    places = [shown.index(f"\n  {option}") for option in order]
    assert places == sorted(places)
    assert "--trainer" not in "\n".join(shown.splitlines()[3:60])
    assert shown.count("--out DIR") == 2  # in the usage and in its line


def test_unknown_backbone_options_and_tasks_are_refused(capsys):
    assert fit("--backbone={name: pvt_v2_b0, drop_path_rat: 0.1}") == 2
    assert "did you mean 'drop_path_rate'?" in capsys.readouterr().err
    assert main(["fit", "segmentatoin"]) == 2
    assert "did you mean 'segmentation'?" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_folder_holds_all_of_a_run(trained):
    found = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "predictions.png",
        "curves.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    } <= found
    assert any(name.startswith("tensorboard/events") for name in found)
    table = rows(trained)
    assert [row["epoch"] for row in table] == ["0", "1", "2"]
    assert [row["step"] for row in table] == ["4", "8", "12"]
    assert float(table[-1]["lr"]) == 0
    names = ("train_loss", "val_loss", "mIoU", "pixel_acc", "IoU_background", "IoU_star", "seconds", "peak_memory_mb")
    measured = read_metrics(trained / "metrics.csv")
    assert all(float(row[name]) >= 0 for row in measured for name in names if row[name] != "nan")
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["backbone"]["name"] == "pvt_v2_b0"


def test_files_of_a_run_and_of_its_predictions_can_be_read_by_whom_the_umask_lets(trained, workplace):
    photo = workplace / "photo.png"
    Image.new("RGB", (40, 30)).save(photo)
    ckpt = str(trained / "checkpoints" / "best.ckpt")
    assert main(["predict", "segmentation", "--ckpt", ckpt, "--images", str(photo), "--out", "predicted"]) == 0
    files = [path for folder in (trained, workplace) for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"last.ckpt", "curves.png", "predictions.png", "metrics.csv", "photo.png"}
    assert {path.name: oct(path.stat().st_mode) for path in files} == {
        path.name: oct(photo.stat().st_mode) for path in files
    }


def test_the_config_of_a_run_trains_the_same_again(trained, workplace):
    assert main(["fit", "segmentation", "--config", str(trained / "config.yaml"), "--out", "again"]) == 0
    assert same(weights(trained), weights(workplace / "again"))
    assert rows(trained) == rows(workplace / "again")


def test_a_run_that_broke_off_goes_on_exactly(trained, workplace, monkeypatch):
    step = SegmentationTask.training_step

    def breaks_off(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(DROP_PATH, "--model.aux=true")
    run = workplace / "runs" / "segmentation-001"
    assert len(rows(run)) == 1
    torch.rand(3)  # a new process has another state
    assert main(["fit", "segmentation", "--ckpt_path", "last"]) == 0
    assert rows(run) == rows(trained)
    assert same(weights(run), weights(trained))
    assert same(weights(run, "best"), weights(trained, "best"))


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["not traced", "traced"])
def test_compiled_blocks_train_and_no_checkpoint_shows_it(workplace, monkeypatch, traced):
    compiled, calls, compile_module = [], [], nn.Module.compile

    def by_a_cheap_backend(block, **options):
        compiled.append(block)
        compile_module(block, **{**options, "backend": "eager"})
        if not traced:
            block._compiled_call_impl = lambda *inputs: calls.append(block) or block._call_impl(*inputs)

    monkeypatch.setattr(nn.Module, "compile", by_a_cheap_backend)
    epochs = ["--trainer.max_epochs=1"]
    assert fit("--out=plain", DROP_PATH, *epochs) == 0
    assert not compiled
    assert fit("--out=compiled", DROP_PATH, "--model.compile=true", *epochs) == 0
    assert len({id(block) for block in compiled}) > 1
    assert traced or set(calls) == set(compiled)
    plain, blocks = weights("plain"), weights("compiled")
    assert plain.keys() == blocks.keys()
    for name, value in plain.items():
        torch.testing.assert_close(blocks[name], value, rtol=1e-3, atol=1e-4)

    count = len(compiled)
    task = load_task(Path("compiled/checkpoints/last.ckpt"), "segmentation")
    assert all(module._compiled_call_impl is None for module in task.modules())
    again = ["fit", "segmentation", "--ckpt_path=last", "--trainer.max_epochs=2"]
    assert main([*again, "--out=compiled", "--model.compile=false"]) == 0
    assert len(compiled) == count, "what was compiled goes on without"
    assert main([*again, "--out=plain", "--model.compile=true"]) == 0
    assert len(compiled) > count, "and the other way round"
    assert [row["epoch"] for row in rows("compiled")] == [row["epoch"] for row in rows("plain")] == ["0", "1"]


def test_averaged_weights_are_what_is_measured_saved_and_gone_on_from(workplace, monkeypatch):
    averaged = ["--model.ema=0.9", "--model.optimizer=lamb", "--model.schedule=multistep", DROP_PATH]
    averaged.append("--model.schedule_options={decay_milestones: [2], decay_rate: 0.5}")
    assert fit(*averaged, "--out", "whole") == 0
    saved = torch.load("whole/checkpoints/last.ckpt", weights_only=True)
    assert not same(saved["state_dict"], saved["current_model_state"])
    assert [float(row["lr"]) for row in rows(workplace / "whole")] == pytest.approx([1e-3, 5e-4, 5e-4])
    monkeypatch.delenv("BACKBONES_RUN")
    assert main(["validate", "segmentation", "--ckpt_path", "last", "--out", "whole"]) == 0

    step = SegmentationTask.training_step

    def breaks_off(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(*averaged, "--out", "broken")
    assert main(["fit", "segmentation", "--out", "broken", "--ckpt_path", "last"]) == 0
    assert same(weights(workplace / "whole"), weights(workplace / "broken"))
    assert rows(workplace / "whole") == rows(workplace / "broken")


def test_scores_and_pictures_are_those_of_the_averaged_weights(workplace, monkeypatch, capsys):
    pictured = []
    picture = SegmentationTask.save_picture

    def keep(self, file, samples):
        pictured.append(self(samples[0][0][None]))
        picture(self, file, samples)

    monkeypatch.setattr(SegmentationTask, "save_picture", keep)
    assert fit("--model.ema=0.9", "--trainer.max_epochs=1", "--out", "run") == 0
    last = workplace / "run/checkpoints/last.ckpt"
    task = load_task(last, "segmentation")
    data = ShapesDataset(4, 32, "val", 0)
    with torch.inference_mode():
        torch.testing.assert_close(task(data[0][0][None]), pictured[0])
    capsys.readouterr()
    assert main(["validate", "segmentation", "--ckpt_path", str(last)]) == 0
    loss = float(capsys.readouterr().out.split("val_loss")[1].split()[0])
    assert loss == pytest.approx(float(rows(workplace / "run")[0]["val_loss"]), abs=1e-4)


def test_the_groups_of_the_optimizer_are_printed(capsys):
    assert fit("--print_groups", "--backbone=vit_tiny_patch16", "--model.layer_decay=0.75", "--model.lr=1") == 0
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()[1:-1]]
    for block in range(12):  # the decoder is layer 13, the embedding layer 0
        rates = [float(lr) for lr, _, _, _, names in lines if names == f"backbone.blocks.{block}"]
        assert rates == pytest.approx([0.75 ** (12 - block)] * 2, rel=1e-2)  # with and without weight decay
    model = SegmentationTask("vit_tiny_patch16", num_classes=5, decoder_options={"decoder_channels": 8}).model
    assert sum(int(number.replace(",", "")) for _, _, _, number, _ in lines) == sum(
        p.numel() for p in model.parameters()
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize("schedule", ["cosine", "constant", "none"])
def test_every_layer_trains_at_its_own_rate(monkeypatch, schedule):
    rates = {}

    def keep(self, optimizer):
        names = {p: name for name, p in self.model.named_parameters()}
        rates.update({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]})

    monkeypatch.setattr(SegmentationTask, "on_before_optimizer_step", keep, raising=False)
    options = ["--backbone=pvt_v2_b0", "--model.layer_decay=0.5", "--model.backbone_lr=0.1", "--model.warmup=0"]
    assert fit(*options, f"--model.schedule={schedule}", "--trainer.max_steps=1", "--trainer.max_epochs=-1") == 0
    top = max(rates.values())
    assert top == pytest.approx(1e-3)
    relative = {name: rate / top for name, rate in rates.items()}
    assert relative["head.0.weight"] == 1
    assert relative["backbone.stages.3.blocks.1.attn.q.weight"] == pytest.approx(0.1 * 0.5)
    assert relative["backbone.stages.3.blocks.0.attn.q.weight"] == pytest.approx(0.1 * 0.5**2)
    assert relative["backbone.stages.0.embed.proj.weight"] == pytest.approx(0.1 * 0.5**12)
    assert len(rates) == len(list(SegmentationTask("pvt_v2_b0").model.parameters()))


def test_a_training_of_a_few_steps_without_progress_bar_leaves_a_checkpoint(capsys):
    assert fit("--trainer.enable_progress_bar=false", "--trainer.max_steps=1", "--trainer.max_epochs=-1") == 0
    checkpoint = re.search(r"--ckpt (\S+)", capsys.readouterr().out)[1]
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 1


def test_a_new_head_is_not_slowed_down_with_its_backbone():
    task = ClassificationTask("vit_tiny_patch16", num_classes=3, backbone_lr=0.1)
    names = {p: name for name, p in task.model.named_parameters()}
    groups = task.make_optimizer().param_groups
    rates = {names[p]: group.get("lr_scale", 1) for group in groups for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 1} == {"backbone.head.weight", "backbone.head.bias"}
    assert len(rates) == len(names)


def test_drop_path_is_at_work(trained):
    task = load_task(trained / "checkpoints" / "best.ckpt", "segmentation").train()
    images = torch.rand(8, 3, 32, 32)
    assert not task(images)[0].equal(task(images)[0])


def test_runs_are_numbered_and_never_overwritten(trained, workplace, capsys):
    before = weights(trained)
    assert fit("--out", trained) == 2
    assert "already holds a run; add --ckpt_path last" in capsys.readouterr().err
    assert same(before, weights(trained))
    for _ in range(2):
        os.environ.pop("BACKBONES_RUN", None)
        assert fit("--trainer.max_epochs=1") == 0
    assert sorted(path.name for path in (workplace / "runs").iterdir()) == ["segmentation-001", "segmentation-002"]


def test_nothing_to_go_on_with_is_said(capsys):
    assert fit("--ckpt_path", "last") == 2
    assert "there is no run in" in capsys.readouterr().err
    Path("x.ckpt").write_bytes(b"half")
    assert fit("--ckpt_path", "x.ckpt") == 2
    assert re.search(r"x\.ckpt.*cannot be read as a checkpoint", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_checkpoints_are_measured(trained, capsys, command):
    assert main([command, "segmentation", "--ckpt_path", "best", "--out", str(trained)]) == 0
    score = float(capsys.readouterr().out.split("mIoU")[1].split()[0])
    best = max(float(row["mIoU"]) for row in rows(trained))
    assert (score == pytest.approx(best, abs=1e-4)) == (command == "validate")
    assert main([command, "segmentation"]) == 2
    assert "needs --ckpt_path" in capsys.readouterr().err


def test_a_checkpoint_is_not_measured_on_other_classes(trained, workplace, capsys):
    for kind in ("images", "labels"):
        (workplace / kind / "val").mkdir(parents=True)
        Image.new("L" if kind == "labels" else "RGB", (8, 8)).save(workplace / kind / "val" / "a.png")
    (workplace / "classes.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    checkpoint = trained / "checkpoints" / "best.ckpt"
    assert main(["validate", "segmentation", "--ckpt_path", str(checkpoint), "--data", str(workplace)]) == 2
    assert "was trained on the classes background, circle" in capsys.readouterr().err


def test_odd_images_are_labelled_and_unreadable_ones_named(trained, workplace, capsys):
    images = workplace / "images"
    (images / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).save(images / "grey.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert("RGBA").save(images / "rgba.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save(images / "glass.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).quantize().save(images / "palette.png")
    Image.new("RGB", (1, 1)).save(images / "deeper" / "pixel.png")
    large = Image.fromarray(rng.integers(0, 256, (90, 150, 3), dtype=np.uint8))
    exif = large.getexif()
    exif[0x0112] = 6
    large.save(images / "turned.jpg", exif=exif)
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    lone = workplace / "moved.ckpt"  # the checkpoint alone suffices
    lone.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes())
    command = ["predict", "segmentation", "--ckpt", str(lone), "--images", "images", "--out", "out", "--window", "64"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "5 of 7 images labelled" in printed.out
    assert "broken.jpg" in printed.err
    assert "glass.png: is transparent in places" in printed.err
    sizes = {"grey": (30, 20), "rgba": (30, 20), "palette": (30, 20), "deeper/pixel": (1, 1), "turned": (90, 150)}
    for name, size in sizes.items():
        mask, overlay = Image.open(f"out/masks/{name}.png"), Image.open(f"out/overlays/{name}.png")
        assert (mask.mode, mask.size, overlay.size) == ("P", size, size)
        assert np.asarray(mask).max() < 5


def test_windows_and_whole_images_agree_with_the_model(trained, workplace):
    task = load_task(trained / "checkpoints" / "best.ckpt", "segmentation")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    arguments = ["--ckpt", str(trained / "checkpoints" / "best.ckpt"), "--images", "a.png", "--out", "out"]
    assert main(["predict", "segmentation", *arguments]) == 0
    with torch.no_grad():
        expected = task(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).argmax(1)[0]
    assert np.array_equal(np.asarray(Image.open("out/masks/a.png")), expected.numpy())


def test_predict_runs_the_fast_copy_of_the_model(trained, workplace, monkeypatch):
    made = []

    def keep(model, dtype=None, compile=False):
        made.append((type(model).__name__, dtype))
        return for_inference(model, dtype, compile)

    monkeypatch.setattr(predict, "for_inference", keep)
    Image.new("RGB", (40, 40)).save("a.png")
    arguments = ["--ckpt", str(trained / "checkpoints" / "best.ckpt"), "--images", "a.png", "--out", "out"]
    assert main(["predict", "segmentation", *arguments, "--device=cpu"]) == 0
    assert made == [("Segmenter", None)], "in float32 on a CPU"


def test_a_folder_of_images_trains(workplace):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (workplace / "my" / kind).mkdir(parents=True)
    for i in range(6):
        size = (30 + i, 40)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(workplace / "my/images" / f"{i}.png")
        Image.fromarray(rng.choice([0, 1, 255], size).astype(np.uint8)).save(workplace / "my/masks" / f"{i}.png")
    options = ["--data=my", "--data.classes=[cat, dog]", "--data.crop_size=32", "--data.num_workers=0"]
    assert (
        fit(
            *options,
            "--data.ignore_index=255",
            "--data.val_fraction=0.4",
            "--model.loss=ce+dice",
            "--model.decoder=smp/fpn",
            "--model.decoder_options=null",
            "--trainer.max_epochs=1",
            "--model.layer_decay=0.8",
        )
        == 0
    )
    assert {"IoU_cat", "IoU_dog"} <= rows(workplace / "runs/segmentation-001")[0].keys()


def test_faulty_data_start_no_run(workplace, capsys):
    for kind in ("images", "masks"):
        (workplace / "my" / kind).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(workplace / "my/images/lonely.png")
    assert fit("--data=my", "--data.classes=[cat, dog]") == 2
    assert "lonely.png: has no mask" in capsys.readouterr().err
    assert not (workplace / "runs").exists()


def test_a_killed_save_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"epoch": 1}, path)

    def dies(checkpoint, stream):
        stream.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            io.save_checkpoint({"epoch": 2}, path)
    assert io.load_checkpoint(path) == {"epoch": 1}


@pytest.mark.parametrize("reason", [SystemExit(143), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_ends_a_save_is_told_as_it_is(reason, tmp_path):
    class Ending(io.FileIO):
        def write(self, content):
            if self.tell() > 1000:
                raise reason
            return super().write(content)

    with pytest.raises(type(reason)) as caught:
        save({"weight": torch.rand(10_000)}, SimpleNamespace(open=lambda mode: Ending(tmp_path / "last.ckpt", mode)))
    assert caught.value is reason


def test_loss_is_zero_where_no_pixel_counts():
    task = SegmentationTask(num_classes=2, aux=True, loss="ce+0.5*dice", decoder_options={"decoder_channels": 8})
    masks = torch.full((2, 32, 32), 255)
    loss = task.loss(torch.randn(2, 2, 32, 32, requires_grad=True), masks)
    assert loss.isfinite()
    plain = SegmentationTask(num_classes=2, decoder_options={"decoder_channels": 8})
    assert plain.loss(torch.randn(2, 2, 32, 32), masks) == 0
    masks[:, :16] = 1
    logits = torch.randn(2, 2, 32, 32)
    assert plain.loss(logits, masks) == pytest.approx(
        torch.nn.functional.cross_entropy(logits, masks, ignore_index=255).item(), rel=1e-5
    )


def test_scores_are_those_of_the_formula():
    task = SegmentationTask(num_classes=3, decoder_options={"decoder_channels": 8})
    truth = torch.tensor([[0, 0, 0, 1, 255]])
    prediction = torch.tensor([[0, 0, 1, 1, 2]])
    task.confusion.update(prediction, truth)
    scores = task.finish("val")
    assert scores["IoU_class 0"] == pytest.approx(2 / 3)
    assert scores["IoU_class 1"] == pytest.approx(1 / 2)
    assert np.isnan(scores["IoU_class 2"])  # neither there nor predicted where pixels count
    assert scores["mIoU"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["pixel_acc"] == pytest.approx(3 / 4)


def test_images_are_normalised_as_the_backbone_asks():
    task = SegmentationTask(num_classes=2, decoder_options={"decoder_channels": 8}).eval()
    seen = []
    task.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        task(torch.full((1, 3, 32, 32), 0.5))
    config = task.model.backbone.pretrained_cfg
    expected = [(0.5 - mean) / std for mean, std in zip(config["mean"], config["std"], strict=True)]
    assert seen[0].mean((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-5)


def test_checkpoints_carry_the_full_name_and_no_pretrained_weights(trained):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    backbone = content["hyper_parameters"]["backbone"]
    assert backbone.pop("pretrained_cfg")["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert backbone == {"name": "pvt/pvt_v2_b0", "drop_path_rate": 0.3}


EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*_*.yaml"))


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda path: path.stem)
def test_example_configs_are_valid(config, monkeypatch):
    class Stop(Exception):
        pass

    def stop(self):
        raise Stop

    monkeypatch.setattr(CommandLine, "instantiate_classes", stop)
    with pytest.raises(Stop):
        main(["fit", config.stem.partition("_")[0], "--config", str(config)])


@pytest.mark.slow  # several processes, each of which imports torch and lightning
def test_a_killed_run_goes_on_exactly(workplace):
    begin = [
        sys.executable,
        "-c",
        "import sys; from backbones.cli import main; sys.exit(main())",
        "fit",
        "segmentation",
    ]
    command = [*begin, *SMALL, DROP_PATH, "--data.shapes.train=64"]
    subprocess.run([*command, "--out", "whole"], check=True)
    subprocess.run([*command, "--out", "again"], check=True)
    with subprocess.Popen([*command, "--out", "killed"]) as process:
        deadline = time.monotonic() + 120
        while not (workplace / "killed/checkpoints/last.ckpt").exists():
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert len(rows(workplace / "killed")) < 3, "it was killed too late to show anything"
    subprocess.run([*begin, "--out", "killed", "--ckpt_path", "last"], check=True)
    assert rows(workplace / "whole") == rows(workplace / "again") == rows(workplace / "killed")
    assert same(weights(workplace / "whole"), weights(workplace / "killed"))


@pytest.mark.slow  # two processes
def test_two_processes_share_the_work_and_the_run_folder(workplace):
    script = workplace / "go.py"  # Lightning starts the second process by this name
    script.write_text("import sys; from backbones.cli import main; sys.exit(main())")
    command = [sys.executable, script, "fit", "segmentation", *SMALL]
    subprocess.run([*command, "--trainer.devices=2", "--trainer.strategy=ddp"], check=True)
    assert [path.name for path in (workplace / "runs").iterdir()] == ["segmentation-001"]
    assert [row["step"] for row in rows(workplace / "runs" / "segmentation-001")] == ["2", "4", "6"]


@pytest.mark.slow  # the training that the README promises: minutes on two cores
def test_the_readmes_training_reaches_its_score(workplace):
    assert main(["fit", "segmentation"]) == 0
    run = workplace / "runs" / "segmentation-001"
    assert max(float(row["mIoU"]) for row in rows(run)) >= 0.80
    assert (run / "predictions.png").stat().st_size > 10_000
