"""What is no number ends a run, is never the best, and is told."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import rows, weights

from backbones.cli import main
from backbones_tasks.data.detection import DetectionData
from backbones_tasks.data.segmentation import ShapesOptions
from backbones_tasks.training.detection import DetectionTask
from backbones_tasks.training.multitask_data import MultiTaskData
from backbones_tasks.training.segmentation import SegmentationTask
from backbones_tasks.training.trial import try_single_image

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=32",
    "--data.shapes.train=8",
    "--data.shapes.val=2",
    "--data.batch_size=4",
    "--model.decoder_options={decoder_channels: 8}",
    "--trainer.accelerator=cpu",
    "--out=run",
]


def fit(*options):
    return main(["fit", "segmentation", *SMALL, *options])


def spoil(monkeypatch, epoch, batch, what):
    step = SegmentationTask.training_step

    def spoilt(self, images, number):
        loss = step(self, images, number)
        return what(self, loss) if (self.current_epoch, number) == (epoch, batch) else loss

    monkeypatch.setattr(SegmentationTask, "training_step", spoilt)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(workplace, monkeypatch, capsys):
    spoil(monkeypatch, 1, 0, lambda task, loss: loss * float("nan"))
    assert fit("--trainer.max_epochs=3") == 2
    told = capsys.readouterr().err
    assert "the loss is not finite in epoch 2, batch 1, which holds drawn shapes " in told
    assert "the checkpoint of the epoch before is kept" in told
    assert told.count("\n") == 1
    assert len(rows(workplace / "run")) == 1
    assert all(state.isfinite().all() for state in weights(workplace / "run").values())


def test_weights_that_are_not_finite_are_never_saved(workplace, monkeypatch, capsys):
    def poison(task, loss):  # as a gradient that overflows in the last step of an epoch
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    spoil(monkeypatch, 0, 1, poison)
    assert fit("--trainer.max_epochs=1") == 2
    assert "the weights are not finite after epoch 1" in capsys.readouterr().err
    assert not (workplace / "run/checkpoints").exists()


def test_the_files_of_the_batch_are_named(workplace, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        Path("my", kind).mkdir(parents=True)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"my/images/{i}.png")
        Image.fromarray(rng.choice([0, 1], (32, 32)).astype(np.uint8)).save(f"my/masks/{i}.png")
    seen = []

    def note(task, loss):
        dataset = task.data.datasets["train"]
        seen.extend(dataset.name(i) for _, i in list(task.trainer.train_dataloader.batch_sampler)[1])
        return loss * float("inf")

    spoil(monkeypatch, 0, 1, note)
    options = ["--data=my", "--data.classes=[a, b]", "--data.crop_size=32", "--data.num_workers=0"]
    assert fit(*options, "--data.val_fraction=0.2", "--data.batch_size=2", "--trainer.max_epochs=1") == 2
    assert len(seen) == 2
    assert f"epoch 1, batch 2, which holds {', '.join(seen)}: nothing was saved" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["proportional", "round_robin", "mixed"])
def test_the_images_of_a_step_of_several_heads_are_those_it_has(order):
    tasks = {"a": {"task": "segmentation"}, "b": {"task": "classification"}}
    shapes = {"a": {"size": 32, "train": 3, "val": 1}, "b": {"size": 32, "train": 5, "val": 1}}
    data = MultiTaskData({n: {"batch_size": 1, "shapes": each} for n, each in shapes.items()}, order=order, tasks=tasks)
    data.setup("fit")
    drawn = []
    for head, part in data.parts.items():
        dataset = part.datasets["train"]
        read = type(dataset).__getitem__

        class Noting(type(dataset)):
            def __getitem__(self, key, head=head, read=read):
                drawn.append(f"{head}: {self.name(key[1])}")
                return read(self, key)

        dataset.__class__ = Noting
    batches = data.train_dataloader()
    batches.set_epoch(1)
    for number, _ in enumerate(batches):
        assert drawn, number
        assert batches.batch_names(number) == drawn
        drawn.clear()
        batches.set_epoch(1)


def test_what_could_not_be_measured_is_never_the_best(workplace, capsys, monkeypatch):
    finish = DetectionTask.finish
    monkeypatch.setattr(DetectionTask, "finish", lambda self, split: finish(self, split) | {"box_AP": math.nan})
    Path("coco/images").mkdir(parents=True)
    image = {"height": 32, "width": 32}
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            Image.new("RGB", (32, 32)).save(f"coco/images/{split}{i}.png")
        images = [{"id": i, "file_name": f"{split}{i}.png", **image} for i in range(count)]
        objects = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}]
        content = {"images": images, "annotations": objects}
        content["categories"] = [{"id": 1, "name": "thing"}]
        Path(f"coco/instances_{split}.json").write_text(json.dumps(content))
    options = ["--data=coco", "--data.crop_size=32", "--data.batch_size=2", "--data.num_workers=0", "--out=empty"]
    options += ["--model.detector=retinanet", "--model.detector_options={fpn_channels: 8}"]
    assert main(["fit", "detection", *options, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]) == 0
    said = capsys.readouterr().out
    assert "no box_AP in any epoch" in said
    assert "best box_AP" not in said
    assert {path.name for path in Path("empty/checkpoints").iterdir()} == {"last.ckpt"}
    assert "empty/checkpoints/last.ckpt" in said
    assert not Path("empty/predictions.png").exists()


def test_no_score_is_made_up_where_no_pixel_counts():
    task = SegmentationTask(num_classes=2, decoder_options={"decoder_channels": 8})
    task.confusion.update(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), 255))
    scores = task.finish("val")
    assert scores["mIoU"].isnan()
    assert scores["pixel_acc"].isnan()


def test_a_detector_without_norms_trains_on_single_images():
    data = DetectionData(batch_size=1, shapes=ShapesOptions(size=32, train=2, val=1))
    data.setup("fit")
    task = DetectionTask(num_classes=data.num_classes, image_size=32, detector_options={"fpn_channels": 8})
    before = {name: state.clone() for name, state in task.state_dict().items()}
    try_single_image(task, data)
    assert all(torch.equal(state, before[name]) for name, state in task.state_dict().items())
