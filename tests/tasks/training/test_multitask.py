"""Several tasks under one training: their data and order, losses, scores, checkpoints and predictions."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import rows, weights

from backbones import Backbone
from backbones.cli import main
from backbones_tasks import from_pretrained
from backbones_tasks.commands.command_line import CommandLine
from backbones_tasks.commands.share import share
from backbones_tasks.training import multitask
from backbones_tasks.training.callbacks import AveragedWeights, find_unused
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.detection import DetectionTask
from backbones_tasks.training.multitask import MultiTask
from backbones_tasks.training.multitask_data import HeadBatches, MultiTaskData
from backbones_tasks.training.segmentation import SegmentationTask
from backbones_tasks.training.tasks import load_task

pytestmark = pytest.mark.usefixtures("workplace")

DET = {"task": "detection", "detector_options": {"fpn_channels": 32, "box_channels": 32}}
SEG = {"task": "segmentation", "decoder_options": {"decoder_channels": 8}, "weight": 0.5}
CLS = {"task": "classification"}
SHAPES = {"size": 32, "train": 8, "val": 4}
DATA = {
    "det": {"batch_size": 2, "shapes": SHAPES},
    "seg": {"batch_size": 4, "shapes": SHAPES},
    "cls": {"batch_size": 8, "shapes": SHAPES},
}
SMALL = [
    "--backbone={name: pvt_v2_b0, drop_path_rate: 0.3}",
    f"--model.heads={json.dumps({'det': DET, 'seg': SEG, 'cls': CLS})}",
    f"--data.heads={json.dumps(DATA)}",
    "--data.order=round_robin",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert fit("--out", folder) == 0
    os.environ.pop("BACKBONES_RUN", None)
    return folder


def fit(*options):
    return main(["fit", "multitask", *SMALL, *map(str, options)])


def data(order="proportional", **heads):
    told = {name: {**DATA[name], **options} for name, options in heads.items()}
    module = MultiTaskData(
        told, order=order, tasks={name: {"det": DET, "seg": SEG, "cls": CLS}[name] for name in heads}
    )
    module.setup("fit")
    return module


def task(heads=("det", "seg"), **options):
    module = data(**{name: {} for name in heads})
    told = {name: {"det": DET, "seg": SEG, "cls": CLS}[name] for name in heads}
    return MultiTask("pvt_v2_b0", told, facts=module.facts, class_names=module.class_names, **options)


def test_a_run_folder_has_what_each_task_writes_and_scores_by_head(trained):
    found = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "predictions.png",
        "curves.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "det/coco_val/results_box.json",
        "cls/confusion_val.png",
    } <= found
    table = rows(trained)
    assert [row["step"] for row in table] == ["12", "24"]  # three heads by turns, as often as the longest has batches
    for row in table:
        metrics = [float(row[name]) for name in ("det/box_AP", "seg/mIoU", "cls/top1")]
        assert float(row["mean_score"]) == pytest.approx(sum(metrics) / 3)
        losses = [float(row[f"{name}/train_loss"]) * weight for name, weight in (("det", 1), ("seg", 0.5), ("cls", 1))]
        assert float(row["train_loss"]) == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert {"det/loss_objectness", "seg/IoU_star", "seg/val_loss", "cls/top1_star"} <= row.keys()


def test_a_run_that_broke_off_goes_on_exactly(trained, workplace, monkeypatch):
    step = MultiTask.training_step

    def breaks_off(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 5:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MultiTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit()
    torch.rand(3)  # a new process has another state
    run = workplace / "runs" / "multitask-001"
    assert main(["fit", "multitask", "--ckpt_path", "last"]) == 0
    assert rows(run) == rows(trained)
    ours, theirs = weights(run), weights(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_has_the_backbone_once_and_says_all_that_it_is_built_of(trained):
    names = list(weights(trained))
    assert [name for name in names if "stages.0.embed.proj.weight" in name] == [
        "model.backbone.stages.0.embed.proj.weight"
    ]
    assert {name.split(".")[1] for name in names} == {"backbone", "heads"}
    again = load_task(trained / "checkpoints" / "last.ckpt", "multitask")
    assert {name: type(part) for name, part in again.parts.items()} == {
        "det": DetectionTask,
        "seg": SegmentationTask,
        "cls": ClassificationTask,
    }
    assert again.class_names["det"] == ["background", "circle", "square", "triangle", "star"]
    assert again.weights == {"det": 1.0, "seg": 0.5, "cls": 1.0}
    told = again.hparams["heads"]["seg"]
    assert (told["decoder"], told["loss"], told["weight"]) == ("upernet", "ce", 0.5)
    json.dumps(dict(again.hparams))


def test_a_checkpoint_is_measured_as_it_was(trained, capsys):
    assert main(["validate", "multitask", "--ckpt_path", "best", "--out", str(trained)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    best = max(rows(trained), key=lambda row: float(row["mean_score"]))
    for name in ("mean_score", "det/box_AP", "seg/mIoU", "cls/top1", "seg/val_loss"):
        assert float(printed[name]) == pytest.approx(float(best[name]), abs=1e-4)


def test_prediction_is_one_pass_per_image_and_writes_what_each_task_does(trained, workplace, monkeypatch):
    rng = np.random.default_rng(0)
    (workplace / "images").mkdir()
    sizes = {"a": (40, 30), "b": (20, 64)}
    for name, (width, height) in sizes.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(workplace / "images" / f"{name}.png")
    passes = []
    forward = Backbone.forward

    def counted(self, images):
        passes.append(tuple(images.shape))
        return forward(self, images)

    checkpoint = trained / "checkpoints" / "best.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "forward", counted)
        command = ["--ckpt", str(checkpoint), "--images", "images", "--out", "out", "--threshold", "0", "--top", "2"]
        assert main(["predict", "multitask", *command]) == 0
    assert passes == [(1, 3, 32, 32)] * 2  # as large as the detector was trained on

    results = json.loads((workplace / "out/results.json").read_text())
    assert results["classes"]["cls"] == ["circle", "square", "triangle", "star"]
    task = load_task(checkpoint, "multitask")
    for name, size in sizes.items():
        assert Image.open(f"out/det/overlays/{name}.png").size == size
        assert Image.open(f"out/seg/overlays/{name}.png").size == size
        pixels = torch.from_numpy(np.asarray(Image.open(f"images/{name}.png")).copy()).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            said = task([pixels])
        assert np.array_equal(np.asarray(Image.open(f"out/seg/masks/{name}.png")), said["seg"][0].argmax(0).numpy())
        listed = results["images"][f"{name}.png"]
        assert len(listed["det"]) == len(said["det"][0]["boxes"])
        assert len(listed["cls"]) == 2
        assert listed["cls"][0]["score"] == pytest.approx(said["cls"][0].softmax(0).max().item(), abs=1e-4)


def test_a_trained_model_is_shared_with_all_its_heads(trained, workplace):
    model = share(trained / "checkpoints" / "best.ckpt", workplace / "mine")
    again = from_pretrained(workplace / "mine").eval()
    image = torch.rand(3, 40, 50)
    with torch.no_grad():
        expected, found = model([image]), again([image])
    torch.testing.assert_close(found["seg"][0], expected["seg"][0])
    torch.testing.assert_close(found["det"][0]["boxes"], expected["det"][0]["boxes"])
    assert again.metadata["class_names"]["cls"] == ["circle", "square", "triangle", "star"]
    assert "cls: 4: circle, square, triangle, star" in (workplace / "mine" / "README.md").read_text()


def test_a_head_is_measured_at_the_size_that_it_predicts_at():
    both = task(image_size=64).eval()
    seen = []
    both.model.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    both.parts["seg"].log = lambda *args, **options: None
    images = torch.rand(2, 3, 32, 32)
    both.evaluate({"seg": (images, torch.zeros(2, 32, 32).long())}, "val")
    assert seen == [(2, 3, 64, 64)]
    torch.testing.assert_close(both.parts["seg"](images), both(images)["seg"])
    both.train().parts["seg"](images)
    assert seen[-1] == (2, 3, 32, 32)


def test_a_head_trains_on_the_loss_that_its_task_has_alone():
    both = task()
    both.log = lambda *args, **options: None
    alone = SegmentationTask("pvt_v2_b0", num_classes=5, decoder_options={"decoder_channels": 8})
    alone.log = both.log
    alone.model.backbone.load_state_dict(both.model.backbone.state_dict())
    head = {k: v for k, v in both.model.heads["seg"].state_dict().items() if not k.startswith("backbone")}
    alone.model.load_state_dict(head, strict=False)
    batch = (torch.rand(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32)))
    loss, expected = both.training_step({"seg": batch}, 0), alone.training_step(batch, 0)
    torch.testing.assert_close(loss, 0.5 * expected)
    loss.backward()
    assert all(p.grad is None for p in both.model.heads["det"].parameters())
    expected.backward()
    name = "stages.1.blocks.0.attn.q.weight"
    ours, theirs = both.model.backbone.get_parameter(name), alone.model.backbone.get_parameter(name)
    torch.testing.assert_close(2 * ours.grad, theirs.grad)


class Numbers(torch.utils.data.Sampler):
    """Of a set of so many numbers, each with the epoch."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([(self.epoch, i) for i in range(self.count)])


class Same(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return key


def batches(order, epoch=0, **counts):
    loaders = {
        name: torch.utils.data.DataLoader(Same(), batch_size=None, sampler=Numbers(count), collate_fn=tuple)
        for name, count in counts.items()
    }
    loader = HeadBatches(loaders, order)
    loader.set_epoch(epoch)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def test_proportional_steps_are_spread_evenly_and_take_each_set_once():
    found = batches("proportional", epoch=3, a=6, b=2)
    assert "".join(name for batch in found for name in batch) == "aabaaaba"
    assert [batch["b"] for batch in found if "b" in batch] == [(3, 0), (3, 1)]
    assert [batch["a"] for batch in found if "a" in batch] == [(3, i) for i in range(6)]


def test_by_turns_a_shorter_set_starts_over_with_an_epoch_of_its_own():
    found = batches("round_robin", epoch=2, a=3, b=2)
    assert "".join(name for batch in found for name in batch) == "ababab"
    assert [batch["a"] for batch in found if "a" in batch] == [(2, 0), (2, 1), (2, 2)]
    assert [batch["b"] for batch in found if "b" in batch] == [(4, 0), (4, 1), (5, 0)]


def test_mixed_steps_have_a_batch_of_each_head():
    assert batches("mixed", a=2, b=1) == [{"a": (0, 0), "b": (0, 0)}, {"a": (0, 1), "b": (1, 0)}]


def test_a_head_sees_the_batches_that_its_task_sees_alone():
    both = data(det={}, seg={})
    loader = both.train_dataloader()
    loader.set_epoch(5)
    ours = [batch["seg"] for batch in loader if "seg" in batch]
    alone = SegmentationTask.data_class(batch_size=4, shapes=both.parts["seg"].shapes)
    alone.setup("fit")
    theirs = alone.train_dataloader()
    theirs.sampler.set_epoch(5)
    for (image, mask), (expected, truth) in zip(ours, theirs, strict=True):
        assert torch.equal(image, expected)
        assert torch.equal(mask, truth)
    det = both.parts["det"]
    facts = {"num_classes": 5, "class_names": det.class_names, "reading": det.reading, "image_size": 32}
    assert both.facts["det"] == facts


def test_heads_share_a_folder_unless_they_have_their_own(shared_data):
    tasks = {"a": {"task": "detection"}, "b": {"task": "detection"}}
    both = MultiTaskData({"a": {"root": str(shared_data / "bccd_coco")}}, tasks=tasks)
    assert both.parts["a"].class_names != both.parts["b"].class_names
    assert "bccd_coco" in both.source
    assert "b: shapes drawn on the fly" in both.source
    assert MultiTaskData(root=str(shared_data / "bccd_coco"), tasks=tasks).parts["b"].root.name == "bccd_coco"


def test_masks_are_read_where_a_head_wants_them():
    tasks = {"boxes": {"task": "detection"}, "masks": {"task": "detection", "detector": "mask_rcnn"}}
    assert {name: part.masks for name, part in MultiTaskData(tasks=tasks).parts.items()} == {
        "boxes": False,
        "masks": True,
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.heads={seg: {task: segmentatoin}}", "did you mean 'segmentation'"),
        ("--model.heads={seg: {decoder: upernet}}", 'lacks "task"'),
        ("--model.heads={seg: {task: segmentation, decodr: x}}", "'model.heads.seg.decodr'; did you mean"),
        ("--model.heads={seg: {task: segmentation, decoder: smp/unte}}", "the head 'seg': unknown architecture"),
        ("--model.heads={seg: {task: segmentation, lr: 0.1}}", "'model.heads.seg.lr'"),
        ("--model.heads={seg: {task: segmentation, inference: {flip: true}}}", "'model.heads.seg.inference.flip'"),
        ("--model.heads={seg: {task: segmentation, weight: 0}}", "model.heads.seg.weight=0 must be over 0"),
        ("--model.heads={det: {task: detection, detector_options: {batch_norm: frozen}}}", "norm_eval=True"),
        ("--model.heads={}", "at least one head"),
        ("--model.heads.seg.decoder=upernet", "a head is given whole, --model.heads.seg"),
        ("--data.heads.seg.batch_size=2", "a head is given whole, --data.heads.seg"),
        ("--data.order=random", "data.order"),
        ("--model.layer_decay=2", "model.layer_decay=2.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(argument, message, capsys, monkeypatch, workplace):
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda self: pytest.fail("something was built"))
    assert main(["fit", "multitask", argument]) == 2
    assert message in capsys.readouterr().err
    assert not list(workplace.iterdir())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.heads={seg: {batch_sise: 2}}", "'data.heads.seg.batch_sise'; did you mean"),
        ("--data.heads={sgm: {batch_size: 2}}", "data.heads.sgm: there is no such head among det, seg"),
        ("--data.heads={seg: {root: nowhere}}", "nowhere"),
    ],
)
def test_wrong_data_start_no_run(argument, message, capsys, workplace):
    assert main(["fit", "multitask", argument]) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "runs").exists()


def test_a_copy_for_averaged_weights_is_on_its_own():
    both = task()
    average = AveragedWeights(0.9)
    average.setup(type("Trainer", (), {"strategy": None})(), both, "fit")
    copied = average._average_model.module
    assert copied.parts["seg"].within[0] is copied
    assert copied.parts["seg"].model is copied.model.heads["seg"]
    assert copied.model.heads["seg"].inner_backbone.owner[0] is copied.model


def test_options_that_training_decides_are_remembered(monkeypatch):
    weighted = [*SMALL, "--model.heads={seg: {task: segmentation, class_weights: balanced}}", "--trainer.max_epochs=1"]
    weighted.append(f"--data.heads={json.dumps({'seg': DATA['seg']})}")
    assert main(["fit", "multitask", *weighted, "--model.ema=0.9", "--out", "run"]) == 0
    content = torch.load("run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    assert len(content["heads"]["seg"]["class_weights"]) == 5
    monkeypatch.delenv("BACKBONES_RUN")
    assert main(["validate", "multitask", "--ckpt_path", "last", "--out", "run"]) == 0


def test_every_parameter_is_in_one_group(capsys):
    assert fit("--print_groups", "--model.layer_decay=0.5") == 0
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()[1:-1]]
    counted = sum(int(numbers.replace(",", "")) for _, _, _, numbers, _ in lines)
    assert counted == sum(p.numel() for p in task(("det", "seg", "cls")).model.parameters())


@pytest.mark.parametrize("order", ["round_robin", "mixed"])
def test_processes_do_not_wait_for_the_head_whose_turn_it_is_not(workplace, monkeypatch, order):
    looked = []
    monkeypatch.setattr(multitask, "find_unused", lambda trainer: looked.append(find_unused(trainer)))
    try:
        assert fit(f"--data.order={order}", "--trainer.strategy=ddp", "--trainer.fast_dev_run=3", "--out=run") == 0
    finally:
        torch.distributed.destroy_process_group()
    assert bool(looked) == (order != "mixed")


def test_a_trial_run_of_a_few_steps_ends_well(workplace):
    """After one batch of validation, which is of one head only."""
    assert fit("--data.order=mixed", "--trainer.fast_dev_run=1", "--out", "run") == 0
