"""Classification, end to end: training, resuming, measuring, predicting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import rows, weights

from backbones.cli import main
from backbones_tasks.pictures.classification import save_confusion
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.tasks import load_task

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=32",
    "--data.shapes.train=16",
    "--data.shapes.val=8",
    "--data.batch_size=4",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
]


def fit(*options):
    return main(["fit", "classification", *SMALL, *map(str, options)])


def test_a_run_is_trained_measured_and_predicts(workplace, capsys):
    assert fit("--out", "run") == 0
    assert {"predictions.png", "confusion_val.png", "curves.png", "metrics.csv"} <= {
        p.name for p in Path("run").iterdir()
    }
    assert {"train_loss", "val_loss", "top1", "top5", "top1_circle", "top1_star"} <= rows("run")[0].keys()
    capsys.readouterr()
    checkpoint = "run/checkpoints/best.ckpt"
    assert main(["validate", "classification", "--ckpt_path", checkpoint]) == 0
    score = float(capsys.readouterr().out.split("top1")[1].split()[0])
    assert score == pytest.approx(max(float(row["top1"]) for row in rows("run")), abs=1e-4)

    (workplace / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("images/a.png")
    Image.fromarray(pixels).convert("LA").save("images/grey.png")
    Path("images/broken.jpg").write_bytes(b"no image")
    arguments = ["--ckpt", checkpoint, "--images", "images", "--out", "out", "--top", "2"]
    assert main(["predict", "classification", *arguments]) == 1
    assert "broken.jpg" in capsys.readouterr().err
    results = json.loads(Path("out/results.json").read_text())
    assert results["classes"] == ["circle", "square", "triangle", "star"]
    assert results["images"].keys() == {"a.png", "grey.png"}
    first, second = results["images"]["a.png"]
    assert first["score"] >= second["score"]
    task = load_task(Path(checkpoint), "classification")
    with torch.no_grad():
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, (37, 46), mode="bicubic", antialias=True
        )
        expected = task(resized[..., 2:34, 7:39].clamp(0, 1))[0].softmax(0).max().item()
    assert first["score"] == pytest.approx(expected, abs=0.02)


def test_a_run_that_broke_off_goes_on_exactly(monkeypatch):
    mixed = ["--model.mixup=0.8", "--model.cutmix=1.0", "--model.label_smoothing=0.1", "--model.drop_rate=0.1"]
    mixed += ["--data.auto_augment=randaugment", "--data.random_erasing=0.25"]
    assert fit(*mixed, "--out", "whole") == 0
    step = ClassificationTask.training_step

    def breaks_off(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.delenv("BACKBONES_RUN")
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(*mixed, "--out", "broken")
    assert main(["fit", "classification", "--out", "broken", "--ckpt_path", "last"]) == 0
    assert rows("whole") == rows("broken")
    whole, broken = weights("whole"), weights("broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_both_heads_of_a_distilled_model_train():
    task = ClassificationTask("deit_tiny_distilled_patch16", num_classes=3).train()
    task.log = lambda *args, **options: None
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    loss = task.training_step((images, labels), 0)
    pair = task(images)
    assert loss.item() == pytest.approx(sum(torch.nn.functional.cross_entropy(h, labels) for h in pair).item() / 2)
    loss.backward()
    heads = [task.model.get_parameter(f"backbone.{name}.weight") for name in ("head", "head_dist")]
    assert all(head.grad.abs().sum() > 0 for head in heads)


def test_scores_are_those_of_the_formula():
    task = ClassificationTask(num_classes=7, class_names=list("abcdefg"))
    logged = {}
    task.log = lambda name, value, **options: logged.update({name: float(value)})
    logits = torch.zeros(4, 7)
    logits[0, 1], logits[1, 2], logits[2, 3] = 1, 1, 1
    logits[3] = torch.arange(7.0)  # the truth, class 0, comes last
    task.model.forward = lambda images: logits
    task.validation_step((torch.rand(4, 3, 8, 8), torch.tensor([1, 2, 4, 0])), 0)
    logged |= {name: float(score) for name, score in task.finish("val").items()}
    assert (logged["top1"], logged["top1_b"], logged["top1_e"]) == (0.5, 1.0, 0.0)
    assert logged["top5"] == 0.75
    assert np.isnan(logged["top1_g"])


def test_wrong_options_are_refused(capsys):
    assert fit("--model.label_smoothing=1") == 2
    assert "model.label_smoothing=1.0 must be" in capsys.readouterr().err
    assert fit("--model.pool=cls", "--backbone=pvt_v2_b0") == 2
    assert "pool='cls'" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("classes", [3, 30, 100])
def test_confusion_matrices_of_any_size_are_drawn(tmp_path, classes):
    matrix = np.random.default_rng(0).integers(0, 9, (classes, classes))
    save_confusion(tmp_path / "c.png", matrix, [f"class {i}" for i in range(classes)])
    assert (tmp_path / "c.png").stat().st_size > 5000
