"""Checkpoints of runs that are damaged or another run's: an error that names the file, and no model comes of them."""

import shutil

import pytest
import torch

from backbones import BackboneError, WeightsError
from backbones_tasks.commands.share import share
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.tasks import load_task


@pytest.fixture(scope="module")
def content():
    """What a checkpoint of a classifier of three classes holds."""
    task = ClassificationTask(num_classes=3, image_size=32)
    return {
        "state_dict": {name: value.clone() for name, value in task.state_dict().items()},
        "hyper_parameters": dict(task.hparams),
        "task": task.name,
        "epoch": 0,
    }


def other(content, **changes):
    return {**content, "hyper_parameters": {**content["hyper_parameters"], **changes}}


def first(content, change):
    name = next(name for name, value in content["state_dict"].items() if value.is_floating_point())
    return {**content, "state_dict": {**content["state_dict"], name: change(content["state_dict"][name])}}


FAULTS = {
    "no weights": (lambda c: {k: v for k, v in c.items() if k != "state_dict"}, "has no state_dict"),
    "weights that are a list": (lambda c: {**c, "state_dict": [1]}, "has no state_dict"),
    "no options": (lambda c: {k: v for k, v in c.items() if k != "hyper_parameters"}, "has no hyper_parameters"),
    "options that are a number": (lambda c: {**c, "hyper_parameters": 3}, "has no hyper_parameters"),
    "no task": (lambda c: {k: v for k, v in c.items() if k != "task"}, "has no task"),
    "a task that is a number": (lambda c: {**c, "task": 3}, "has no task"),
    "a task that is none": (lambda c: {**c, "task": "cooking"}, "cooking"),
    "an unknown option": (lambda c: other(c, colour="red"), "hyper_parameters build no classification .*colour"),
    "an option of another type": (lambda c: other(c, num_classes="many"), "num_classes|hyper_parameters"),
    "another number of classes": (lambda c: other(c, num_classes=4, class_names=None), "of another shape: .*for"),
    "another backbone": (lambda c: other(c, backbone="vit_tiny_patch16"), "another backbone, other classes"),
    "a weight missing": (
        lambda c: {**c, "state_dict": dict(list(c["state_dict"].items())[1:])},
        "missing in the checkpoint: model",
    ),
    "one too many": (lambda c: {**c, "state_dict": {**c["state_dict"], "x": torch.ones(1)}}, "unknown to the model: x"),
    "a name that is none": (
        lambda c: {**c, "state_dict": {**c["state_dict"], 3: torch.ones(1)}},
        "no tensors by name: 3",
    ),
    "what is no tensor": (lambda c: {**c, "state_dict": {**c["state_dict"], "x": 3}}, "no tensors by name: x"),
    "NaN": (lambda c: first(c, lambda v: v * float("nan")), "are NaN or infinite"),
    "integers": (lambda c: first(c, lambda v: v.to(torch.int8)), "is int8, which are no weights"),
    "a file of timm's that is to be read": (
        lambda c: other(c, backbone={"name": "timm/test_resnet", "checkpoint_path": "x.pth"}),
        "checkpoint_path, by which timm reads files",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_of_a_run_is_named(fault, content, tmp_path):
    damage, message = FAULTS[fault]
    path = tmp_path / "best.ckpt"
    torch.save(damage(content), path)
    with pytest.raises(BackboneError, match=rf"(?s)(best\.ckpt|timm/).*({message})|{message}"):
        load_task(path, "classification")
    with pytest.raises(BackboneError, match=message):
        share(path, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_a_good_checkpoint_is_restored(content, tmp_path):
    torch.save(content, tmp_path / "best.ckpt")
    task = load_task(tmp_path / "best.ckpt", "classification")
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in task.state_dict().items())
    torch.save({k: v for k, v in content.items() if k != "epoch"}, tmp_path / "best.ckpt")
    with pytest.raises(WeightsError, match=r"best\.ckpt does not say of which epoch it is"):
        share(tmp_path / "best.ckpt", tmp_path / "shared")


SHARD_FAULTS = {
    "a shard of something else": lambda folder: torch.save({"weights": 1}, folder / "a-00000.pt"),
    "a shard of too few": lambda folder: torch.save({"shards": []}, folder / "a-00000.pt"),
    "a shard of other sizes": lambda folder: torch.save({"shards": [torch.ones(3)]}, folder / "a-00000.pt"),
    "a truncated shard": lambda folder: (folder / "a-00000.pt").write_bytes(b"PK"),
    "a lost shard": lambda folder: (folder / "a-00000.pt").unlink(),
    "an index without names": lambda folder: torch.save({"content": {}, "files": 3}, folder / "index.pt"),
    "an index of tensors": lambda folder: torch.save([torch.ones(1)], folder / "index.pt"),
    "an index that is none": lambda folder: (folder / "index.pt").write_bytes(b""),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_broken_shard_is_named(fault, content, tmp_path):
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    names = list(content["state_dict"])
    sharded = {name: {"__shard__": i, "shape": list(content["state_dict"][name].shape)} for i, name in enumerate(names)}
    torch.save({"shards": [content["state_dict"][name].flatten() for name in names]}, folder / "a-00000.pt")
    torch.save({"content": {**content, "state_dict": sharded}, "files": ["a-00000.pt"]}, folder / "index.pt")
    load_task(folder, "classification")
    SHARD_FAULTS[fault](folder)
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        load_task(folder, "classification")
    shutil.rmtree(folder)
