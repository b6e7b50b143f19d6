"""Distillation: what a frozen teacher adds to the loss, by logits and by maps, and that it leaves no trace."""

import copy
from pathlib import Path

import pytest
import torch
from run_files import rows, same, weights
from timm.task.distillation import LogitDistillationTask
from torch import nn

from backbones import build_backbone
from backbones.cli import main
from backbones.errors import InputError
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.detection import DetectionTask
from backbones_tasks.training.distillation import Lesson, distance, logit_loss
from backbones_tasks.training.multitask import MultiTask
from backbones_tasks.training.segmentation import SegmentationTask
from backbones_tasks.training.tasks import load_task
from backbones_tasks.training.teachers import Teacher

pytestmark = pytest.mark.usefixtures("workplace")

TINY = "timm/test_resnet"
NARROW = {"decoder_options": {"decoder_channels": 8}}
SMALL = ["--data.shapes.size=32", "--data.shapes.train=4", "--data.shapes.val=2", "--data.batch_size=2"]
SMALL += [f"--backbone={TINY}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
BOXES = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]), "labels": torch.tensor([1])}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher(tmp_path):
    """A backbone with weights, and a classifier of four classes."""
    file = tmp_path / "teacher.pth"
    torch.save(build_backbone(TINY, features_only=False, num_classes=4).state_dict(), file)
    return {"name": TINY, "pretrained": str(file), "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3]}}


def student(kind, backbone=TINY, **options):
    """A task in training mode whose log goes nowhere, and a batch for it."""
    small, batch = {
        ClassificationTask: ({"num_classes": 4}, (IMAGES, torch.tensor([0, 3]))),
        SegmentationTask: (NARROW, (IMAGES, torch.ones(2, 64, 64, dtype=torch.int64))),
        DetectionTask: (
            {"detector_options": {"fpn_channels": 8, "box_channels": 8, "min_size": 64, "max_size": 64}},
            (list(IMAGES), [BOXES, BOXES]),
        ),
        MultiTask: (
            {"heads": {"seg": {"task": "segmentation", **NARROW}}},
            {"seg": (IMAGES, torch.ones(2, 64, 64, dtype=torch.int64))},
        ),
    }[kind]
    torch.manual_seed(0)
    task = kind(backbone, **small, **options).train()
    task.logged = {}
    task.log = lambda name, value, **_: task.logged.update({name: float(value)})
    return task, batch


def grads(module):
    return [p.grad for p in module.parameters() if p.grad is not None and p.grad.any()]


# Losses


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_logits_are_learnt_as_by_timm(temperature):
    models = [nn.Linear(5, 7) for _ in range(2)]
    for model in models:
        model.num_classes, model.in_chans, model.pretrained_cfg = 7, 3, {"mean": (0.0,), "std": (1.0,)}
    timms = LogitDistillationTask(
        models[0], models[1], criterion=nn.CrossEntropyLoss(), temperature=temperature, verbose=False
    )
    x = torch.rand(6, 5)
    timms.student_mean = timms.student_std = None
    expected = timms(x, torch.zeros(6, dtype=torch.long))["kd_loss"]
    assert torch.allclose(logit_loss(models[0](x), models[1](x), temperature).mean(), expected, rtol=1e-5)


def test_hard_labels_are_those_of_the_teacher_at_every_pixel():
    ours, theirs = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    found = logit_loss(ours, theirs, hard=True)
    assert found.shape == (2, 3, 5)
    assert torch.allclose(found[1, 2, 4], -ours[1, :, 2, 4].log_softmax(0)[theirs[1, :, 2, 4].argmax()])


def test_maps_are_apart_by_one_less_their_correlation():
    ours = torch.randn(2, 3, 4, 5)
    theirs = 0.5 * ours + torch.randn(2, 3, 4, 5)
    pairs = zip(ours.transpose(0, 1).flatten(1), theirs.transpose(0, 1).flatten(1), strict=True)
    expected = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean()
    assert torch.allclose(distance(ours, theirs), expected, atol=1e-4)
    assert torch.allclose(distance(3 * ours + 1, theirs), expected, atol=1e-4)
    assert distance(ours, ours) < 1e-5


# What a student learns


def test_the_second_head_of_a_distilled_student_learns_of_the_teacher_and_the_first_of_labels(teacher):
    name = "deit_tiny_distilled_patch16"
    task, batch = student(ClassificationTask, name, teacher=teacher, distill="hard", distill_weight=3.0)
    alone, _ = student(ClassificationTask, name)
    assert same(task.model.state_dict(), alone.model.state_dict()), "the teacher changes no draw of the student's"
    loss = task.training_step(batch, 0)
    loss.backward()
    main, second = task.model(task.normalise(IMAGES))
    expected = nn.functional.cross_entropy(main, batch[1])
    assert float(loss) == pytest.approx(float(expected) + 3 * task.logged["loss_distill"], rel=1e-4)
    told = nn.functional.cross_entropy(second, task.teacher(IMAGES).argmax(1))
    assert task.logged["loss_distill"] == pytest.approx(float(told), rel=1e-4)
    ours = build_backbone(teacher["name"], features_only=False, num_classes=4, pretrained=teacher["pretrained"]).eval()
    mean, std = (torch.tensor(teacher["pretrained_cfg"][n]).view(1, 3, 1, 1) for n in ("mean", "std"))
    assert torch.allclose(task.teacher(IMAGES), ours((IMAGES - mean) / std), atol=1e-5), "in the teacher's colours"
    plain, _ = student(ClassificationTask, name, teacher=teacher, distill_weight=0.0)
    plain.training_step(batch, 0).backward()
    head, distilled = (getattr(plain.model.backbone, n).weight.grad for n in ("head", "head_dist"))
    assert head.any()
    assert not distilled.any()


def test_any_classifier_learns_soft_logits_of_mixed_images(teacher):
    task, batch = student(ClassificationTask, teacher=teacher, distill_temperature=2.0, mixup=1.0)
    seen = []
    task.teacher.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    loss = task.training_step(batch, 0)
    assert not torch.equal(seen[0], IMAGES), "the teacher sees what the student sees"
    assert float(loss) > task.logged["loss_distill"] > 0


def test_pixels_that_do_not_count_are_not_taught():
    task, (images, masks) = student(SegmentationTask)
    expert, _ = student(SegmentationTask, seed=1)
    task.teacher, task.lesson = Teacher(expert), Lesson("x", "soft", 1.0, 1.0)
    masks = masks.clone()
    masks[:, :32] = 255
    task.training_step((images, masks), 0)
    apart = logit_loss(task(images), task.teacher(images))
    assert task.logged["loss_distill"] == pytest.approx(float(apart[:, 32:].mean()), rel=1e-3)


@pytest.mark.parametrize("kind", [SegmentationTask, DetectionTask, MultiTask])
def test_maps_of_a_dense_student_come_closer_to_its_teachers(kind, teacher):
    task, batch = student(kind, teacher=teacher)
    given = []
    task.imitation.teacher.model.register_forward_pre_hook(lambda module, images: given.append(images[0]))
    plain, _ = student(kind)
    torch.manual_seed(0)
    loss = task.training_step(batch, 0)
    torch.manual_seed(0)
    alone = plain.training_step(batch, 0)
    assert float(loss) == pytest.approx(float(alone) + task.logged["loss_distill"], rel=1e-5)
    mean, std = (torch.tensor(teacher["pretrained_cfg"][n]).view(1, 3, 1, 1) for n in ("mean", "std"))
    assert torch.allclose(given[0] * std + mean, IMAGES, atol=1e-5), "the student's images, in the teacher's colours"
    optimizer = task.make_optimizer()
    before = copy.deepcopy(task.imitation.teacher.model.state_dict())
    measured = []
    for _ in range(5):
        task.zero_grad()
        task.training_step(batch, 0).backward()
        assert all(grads(part) for part in (task.model.inner_backbone, task.imitation))
        measured.append(task.logged["loss_distill"])
        optimizer.step()
    assert measured[-1] < measured[0]
    assert same(before, task.imitation.teacher.model.state_dict()), "statistics of batch norms, too"
    assert not task.imitation.teacher.model.training
    task.eval()
    task.model.inner_backbone(IMAGES)
    assert not task.imitation.measured, "nothing is measured in evaluation"


def test_the_strides_that_both_have_are_imitated(teacher):
    task, _ = student(SegmentationTask, {"name": "vit_tiny_patch16", "pyramid": "taps"}, teacher=teacher)
    assert len(task.imitation.pairs) == 4
    detector, _ = student(DetectionTask, {"name": TINY, "out_indices": [1, 3]}, teacher=teacher)
    widths = [(conv.in_channels, conv.out_channels) for conv in detector.imitation.projections]
    channels = build_backbone(TINY).out_channels
    assert widths == [(channels[1], channels[1]), (channels[3], channels[3])]


# Runs


def fit(*options):
    return main(["fit", "segmentation", *SMALL, "--model.decoder_options={decoder_channels: 8}", *options])


def test_a_run_with_a_teacher_goes_on_exactly_and_is_whole_without_it(monkeypatch):
    assert fit("--trainer.max_epochs=1", "--out=expert") == 0
    told = ["--model.teacher=expert", "--model.distill=maps", "--model.ema=0.5", "--model.schedule=constant"]
    for more in (["--out=whole"], ["--out=broken", "--trainer.max_epochs=1"], ["--out=broken", "--ckpt_path=last"]):
        monkeypatch.delenv("BACKBONES_RUN", raising=False)
        assert fit(*told, "--model.warmup=0", "--trainer.max_epochs=2", *more) == 0
    assert rows("whole") == rows("broken")
    assert all(0 < float(row["loss_distill"]) < 2 for row in rows("whole"))
    assert same(weights("whole"), weights("broken"))
    assert weights("whole").keys() == weights("expert").keys(), "the student's alone"
    Path("expert/checkpoints/best.ckpt").unlink()
    monkeypatch.setattr("backbones_tasks.training.distillation.find_teacher", None)
    assert main(["validate", "segmentation", "--ckpt_path=whole/checkpoints/best.ckpt"]) == 0
    task = load_task(Path("whole/checkpoints/last.ckpt"))
    assert task.imitation is task.teacher is None
    assert fit("--out=whole", "--ckpt_path=last", "--trainer.max_epochs=3") == 2, "not on without its teacher"


def test_a_checkpoint_teaches_its_logits_to_a_student_of_the_same_classes(capsys, monkeypatch):
    expert, _ = student(SegmentationTask, num_classes=5)
    content = {"state_dict": expert.state_dict(), "hyper_parameters": dict(expert.hparams), "task": "segmentation"}
    names = ["background", "circle", "square", "triangle", "star"]
    content["hyper_parameters"]["class_names"] = names
    torch.save(content, "expert.ckpt")
    assert fit("--model.teacher=expert.ckpt", "--trainer.max_epochs=1", "--out=run") == 0
    (row,) = rows("run")
    assert float(row["loss_distill"]) > 0
    monkeypatch.delenv("BACKBONES_RUN")
    content["hyper_parameters"]["class_names"] = names[::-1]
    torch.save(content, "other.ckpt")
    assert fit("--model.teacher=other.ckpt", "--out=other") == 2
    assert "tells the classes star, triangle" in capsys.readouterr().err
    detector, batch = student(DetectionTask, teacher="expert.ckpt")
    detector.training_step(batch, 0)
    assert 0 < detector.logged["loss_distill"] < 2, "maps, where the tasks differ"
    weights = dict(detector.imitation.teacher.model.named_parameters())
    assert all(torch.equal(value, expert.model.backbone.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.teacher=nobody.ckpt"], "nobody.ckpt: no such checkpoint"),
        (["--model.teacher=pvt_v2_b9"], "did you mean 'pvt_v2_b"),
        (["--model.teacher={name: pvt_v2_b0, pretrained: false}"], "random weights, which teach nothing"),
        (["--model.teacher={pretrained: true}"], 'lack "name"'),
        (["--model.distill=maps"], "needs a teacher"),
        (["--model.teacher=pvt_v2_b0", "--model.distill=soft"], "knows no classes of segmentation"),
        (["--model.teacher=pvt_v2_b0", "--model.distill_temperature=0"], "distill_temperature=0.0 must be over 0"),
    ],
)
def test_what_cannot_teach_is_refused_in_a_sentence(options, message, capsys):
    assert fit(*options, "--out=run") == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_saved_model_teaches_as_its_checkpoint_would(tmp_path):
    expert, (images, _) = student(SegmentationTask, num_classes=5)
    folder = expert.model.save_pretrained(tmp_path / "shared")
    for signal in ("soft", "maps"):
        task, batch = student(SegmentationTask, num_classes=5, teacher=str(folder), distill=signal)
        if signal == "soft":
            assert torch.allclose(task.teacher(images), expert.eval()(images), atol=1e-5)
        task.training_step(batch, 0)
        assert task.logged["loss_distill"] < (1 if signal == "maps" else 10)
    body = expert.model.inner_backbone.save_pretrained(tmp_path / "body")
    task, batch = student(DetectionTask, teacher=str(body))
    task.training_step(batch, 0)
    with pytest.raises(InputError, match="is of segmentation, and has no logits of classification"):
        ClassificationTask(TINY, num_classes=5, teacher=str(folder))


def test_a_teacher_of_other_classes_or_signals_is_refused(teacher):
    with pytest.raises(InputError, match="no published classifier of 3 classes"):
        ClassificationTask(TINY, num_classes=3, teacher=teacher)
    with pytest.raises(InputError, match="classification can be taught by soft or hard"):
        ClassificationTask(TINY, num_classes=4, teacher=teacher, distill="maps")
    with pytest.raises(InputError, match="detection can be taught by maps"):
        DetectionTask(TINY, teacher=teacher, distill="soft")
