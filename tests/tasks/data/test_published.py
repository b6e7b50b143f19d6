"""torchvision's data sets by name: found where torchvision has put them, split as they are, nothing downloaded."""

import inspect
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from backbones.cli import main
from backbones_tasks.data.classification import ClassificationData, training_transform
from backbones_tasks.data.folders import DataError
from backbones_tasks.data.published import PUBLISHED, find_published

NAMES = ["airplane", "automobile", "bird"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 as it lies on disk, of 30 images to train and 6 to test on."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = np.random.default_rng(0)
    parts = {f"data_batch_{i}": 6 for i in range(1, 6)} | {"test_batch": 6}
    for name, count in parts.items():
        content = {
            "data": draw.integers(0, 256, (count, 3072), dtype=np.uint8),
            "labels": [i % 3 for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # these are not the real ones
    return tmp_path


def test_cifar_is_read_by_its_name_and_some_images_of_each_class_are_held_out(cifar):
    options = {"batch_size": 4, "image_size": 32, "padding": 4, "crop": 1.0, "val_fraction": 0.2}
    data = ClassificationData(f"cifar10:{cifar}", **options)
    assert data.class_names == NAMES
    data.setup("fit")
    data.setup("test")
    sizes = {split: len(dataset) for split, dataset in data.datasets.items()}
    assert sizes == {"train": 24, "val": 6, "test": 6}
    assert sorted(label for _, label in data.datasets["val"].items) == [0, 0, 1, 1, 2, 2]
    indices = [{number for number, _ in data.datasets[split].items} for split in ("train", "val")]
    assert set.union(*indices) == set(range(30))
    theirs = datasets.CIFAR10(cifar, train=False)
    for i, (image, label) in enumerate(data.datasets["test"]):
        assert torch.equal((image * 255).round().byte(), v2.functional.pil_to_tensor(theirs[i][0])), "as it is"
        assert label == theirs[i][1]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert labels.dtype == torch.int64
    assert "CIFAR10 train" in data.datasets["train"].name(0)


def test_padded_crops_are_torchvisions():
    image = tv_tensors.Image(torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8))
    ours = training_transform(32, (1.0, 1.0), flip=0.0, color_jitter=0.0, padding=4)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        expected = v2.RandomCrop(32, padding=4)(image)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)
        seen.add(int((expected == 0).sum()))
    assert len(seen) > 3
    assert ours(tv_tensors.Image(torch.zeros(3, 50, 90, dtype=torch.uint8))).shape == (3, 32, 32), "of any size"


@pytest.mark.usefixtures("workplace")
def test_a_classifier_trains_on_cifar_and_is_tested_on_its_test_images(cifar, capsys):
    data = [f"--data=cifar10:{cifar}", "--data.image_size=32", "--data.padding=4", "--data.num_workers=0"]
    small = ["--backbone=timm/test_resnet", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "classification", *data, *small, "--trainer.max_epochs=1", "--out=run"]) == 0
    assert "3 classes from" in capsys.readouterr().out
    assert main(["test", "classification", "--ckpt_path=run/checkpoints/last.ckpt"]) == 0
    assert "top1" in capsys.readouterr().out


def test_what_is_not_there_is_told_with_how_to_get_it(tmp_path):
    with pytest.raises(DataError) as caught:
        ClassificationData(f"cifar100:{tmp_path}")
    assert "torchvision finds no CIFAR100 for train there" in str(caught.value)
    assert f"CIFAR100('{tmp_path}', download=True)" in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is downloaded"
    with pytest.raises(DataError, match="unknown data set 'cifar'; did you mean 'cifar10"):
        ClassificationData(f"cifar:{tmp_path}")
    (tmp_path / "odd:name").mkdir()
    assert find_published(f"{tmp_path}/odd:name") is None
    assert find_published("C:/images") is None


def test_every_name_is_a_class_of_torchvisions_with_such_splits():
    for name, (kind, splits) in PUBLISHED.items():
        known = inspect.signature(getattr(datasets, kind).__init__).parameters
        assert name == kind.lower()
        for options in splits.values():
            assert options.keys() <= known.keys()
        assert "train" in splits


@pytest.mark.usefixtures("workplace")
def test_other_layouts_of_labels_are_read(tmp_path):
    """EuroSAT, a folder per class; and those whose labels torchvision keeps to itself."""
    for label, name in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(5):
            pixels = torch.full((3, 8, 8), 10 * label + i, dtype=torch.uint8)
            v2.functional.to_pil_image(pixels).save(folder / f"{i}.png")
    data = ClassificationData(f"EuroSAT:{tmp_path}", image_size=8, val_fraction=0.4)
    data.setup("fit")
    assert data.class_names == ["Forest", "River"]
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (6, 4)
    with pytest.raises(DataError, match="EuroSAT has no images of test, only train"):
        data.setup("test")
