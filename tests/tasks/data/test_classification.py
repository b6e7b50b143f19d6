"""Folders of classes: layouts, the check before training, odd image files, augmentation from seeds; single shapes."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from backbones_tasks.data.classification import (
    ClassificationData,
    ImageFolderDataset,
    SingleShapes,
    evaluation_transform,
    find_classes,
    hold_out,
)
from backbones_tasks.data.folders import DataError
from backbones_tasks.data.reading import PAD_COLOUR
from backbones_tasks.data.segmentation import ShapesOptions
from backbones_tasks.data.shapes import SHAPES, draw_scene

CLASSES = ["ant", "bee", "cat"]


def write(folder, counts, suffix="jpg", size=(40, 30)):
    rng = np.random.default_rng(len(str(folder)))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{suffix}")


@pytest.fixture
def folder(tmp_path):
    """Four images of each class to train, two to validate."""
    write(tmp_path / "train", dict.fromkeys(CLASSES, 4))
    write(tmp_path / "val", dict.fromkeys(CLASSES, 2))
    return tmp_path


def ready(root, stage="fit", **options):
    data = ClassificationData(str(root), **{"num_workers": 0, "batch_size": 4, "image_size": 24, **options})
    data.setup(stage)
    return data


def files(data, split):
    return [file for file, _ in data.datasets[split].items]


# Layouts


def test_folders_of_splits_and_classes(folder):
    data = ready(folder)
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (12, 6)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 24, 24)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert labels.dtype == torch.int64
    batches = list(data.val_dataloader())
    assert [len(images) for images, _ in batches] == [4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match=r"has no folder test; `validate` measures on the validation images"):
        data.setup("test")


def test_a_test_folder_is_tested_on(folder):
    write(folder / "test", {"ant": 1, "cat": 2})
    data = ready(folder, "test")
    assert [label for _, label in data.datasets["test"].items] == [0, 2, 2]


@pytest.mark.parametrize("train", ["train", "."])
def test_images_of_each_class_are_held_out_by_a_seed_where_there_is_no_val(tmp_path, train):
    write(tmp_path / train, {"ant": 10, "bee": 5, "cat": 1})
    chosen = {}
    for seed in (0, 0, 1):
        data = ready(tmp_path, split_seed=seed, val_fraction=0.3)
        labels = [label for _, label in data.datasets["val"].items]
        assert labels == [0, 0, 0, 1, 1], "as many of each class as its share, but its only image trains"
        assert not set(files(data, "train")) & set(files(data, "val"))
        assert len(data.datasets["train"]) == 11
        assert chosen.setdefault(seed, files(data, "val")) == files(data, "val")
    assert chosen[0] != chosen[1]
    assert files(ready(tmp_path, "validate", split_seed=1, val_fraction=0.3), "val") == chosen[1]


def test_held_out_images_do_not_depend_on_other_classes():
    def val(counts):
        items = [(f"{label}-{i}", label) for label, count in counts.items() for i in range(count)]
        return [name for name, label in hold_out(items, 0.25, 0)["val"] if label == 1]

    assert val({0: 3, 1: 40}) == val({0: 9, 1: 40, 2: 4})


def test_files_may_lie_deeper_and_other_files_do_not_matter(folder):
    write(folder / "train" / "bee" / "more", {"deep": 1}, suffix="PNG")
    (folder / "train" / "bee" / "notes.txt").write_text("hello")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "bee" / "._0.jpg").write_bytes(b"resource fork")
    data = ready(folder)
    assert data.class_names == CLASSES
    assert len(data.datasets["train"]) == 13


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (None, "no such folder"),
        ([], "expected a folder of images per class"),
        (["train"], "train: expected a folder of images per class"),
    ],
)
def test_folders_without_classes_are_refused_when_the_data_are_made(tmp_path, folders, message):
    root = tmp_path / "data"
    for name in folders or ():
        (root / name).mkdir(parents=True)
    if folders == []:
        root.mkdir()
    with pytest.raises(DataError, match=message):
        ClassificationData(str(root))


def test_data_for_validation_alone_do_not_train(tmp_path):
    write(tmp_path / "val", dict.fromkeys(CLASSES, 1))
    assert find_classes(tmp_path) == CLASSES
    assert len(ready(tmp_path, "validate").datasets["val"]) == 3
    with pytest.raises(DataError, match="has no folder train"):
        ready(tmp_path)


# Faults


@pytest.fixture
def faulty(folder):
    """Two damaged files, an image of no class, a class to validate that does not train."""
    for name in ("train/ant/0.jpg", "val/cat/1.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    write(folder / "val", {"dog": 2})
    Image.new("RGB", (9, 9)).save(folder / "train" / "loose.png")
    return folder


def test_one_report_names_all_that_is_wrong(faulty):
    with pytest.raises(DataError) as caught:
        ready(faulty)
    message = str(caught.value)
    for part in (
        r"train: 2 faults in 12 images\n",
        r"val: 2 faults in 6 images\n",
        r"image that cannot be read \(1\): train/ant/0\.jpg, ",
        r"image that cannot be read \(1\): val/cat/1\.jpg",
        r"image outside the class folders \(1\): train/loose\.png",
        r"class that is not among those to train \(1\): val/dog, 2 images",
        "mend them, or leave them out: --data.faults drop",
    ):
        assert re.search(part, message), part


def test_faulty_files_can_be_left_out(faulty):
    with pytest.warns(UserWarning, match=r"train/ant/0\.jpg(.|\n)*0 repaired, 4 dropped; there are 16 images"):
        data = ready(faulty, faults="drop")
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (11, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(len(images) for images, _ in data.val_dataloader()) == 5


def test_a_class_that_nothing_is_left_of_is_an_error(folder):
    for file in (folder / "train" / "bee").iterdir():
        file.write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match="there are 14 images"),
        pytest.raises(DataError, match="no image for train of bee"),
    ):
        ready(folder, faults="drop")
    for file in (folder / "train" / "bee").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"class without an image \(1\): train/bee"):
        ready(folder)


def test_an_image_that_breaks_after_the_check_is_named_and_ends_no_epoch(folder):
    data = ready(folder, faults="drop")
    broken = folder / "train" / "bee" / "3.jpg"
    broken.write_bytes(b"overwritten")
    told = r"bee/3\.jpg: cannot be read: .*the next image takes its place"
    with pytest.warns(UserWarning, match=told):
        batches = list(data.train_dataloader())
    assert sum(len(images) for images, _ in batches) == 12
    with pytest.warns(UserWarning, match=told):
        _, label = data.datasets["train"][(0, 7)]
    assert label == 2, "of the image that took its place"
    with pytest.raises(DataError, match=r"bee/3\.jpg: cannot be read"):
        list(ready(folder, check=False).train_dataloader())


def test_data_of_which_nothing_can_be_read_end(folder):
    data = ready(folder, faults="drop")
    for file in (folder / "val").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(DataError, match="none of 6 images can be"):
        data.datasets["val"][0]


# Images


def odd_images(folder):
    """The same picture, dark on the left and bright on the right, in eight kinds of file."""
    ramp = np.tile(np.linspace(0, 255, 40), (30, 1))
    grey = Image.fromarray(ramp.astype(np.uint8))
    rgb = grey.convert("RGB")
    folder.mkdir(parents=True)
    rgb.save(folder / "rgb.png")
    grey.save(folder / "grey.png")
    grey.point(lambda v: v > 127, "1").save(folder / "bits.png")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(folder / "deep.tif")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    rgb.rotate(90, expand=True).save(folder / "exif.jpg", exif=turned)


def test_images_of_every_kind_look_alike(tmp_path):
    odd_images(tmp_path / "ramp")
    odd_images(tmp_path / "second")
    data = ready(tmp_path, val_fraction=0.5, range="dtype")
    for image, _ in data.datasets["val"]:
        assert image.shape == (3, 24, 24)
        columns = image.mean((0, 1))
        assert columns[:4].max() < 0.3 < 0.7 < columns[-4:].min()
        assert image.mean(0).std(0).max() < 0.1, "upright: columns are even"


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_images_of_any_size_are_brought_to_one(tmp_path, size):
    write(tmp_path, {"a": 2, "b": 2}, suffix="png", size=size)
    data = ready(tmp_path, val_fraction=0.5)
    for split in ("train", "val"):
        assert all(image.shape == (3, 24, 24) for image, _ in (data.datasets[split][i] for i in range(2)))


def test_validation_sees_the_middle_and_training_parts_of_it(folder):
    pixels = torch.zeros(3, 100, 200, dtype=torch.uint8)
    pixels[:, 25:75, 75:125] = 255
    seen = evaluation_transform(48, crop=0.5)(pixels)
    assert seen.shape == (3, 48, 48)
    assert seen[:, 3:-3, 3:-3].min() > 250
    assert evaluation_transform(48, crop=1.0)(pixels)[:, :10].max() < 5
    data = ready(folder, scale=(0.2, 0.3), flip=0.0, color_jitter=0.0)
    first, second = (data.datasets["train"][(epoch, 0)][0] for epoch in (0, 1))
    assert not first.equal(second)
    with pytest.raises(DataError, match="crop=0"):
        ClassificationData(str(folder), crop=0)


# Seeds


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder):
    def batches(workers, seed=0, epoch=2):
        loader = ready(folder, num_workers=workers, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([images for images, _ in loader])

    expected = batches(0)
    torch.rand(7)  # whatever else draws random numbers
    assert expected.equal(batches(0))
    assert expected.equal(batches(2))
    assert not expected.equal(batches(0, seed=1))
    assert not expected.equal(batches(0, epoch=3))


@pytest.mark.parametrize(
    "options",
    [{"auto_augment": "randaugment"}, {"auto_augment": "trivialaugment"}, {"random_erasing": 1.0}],
    ids=lambda options: next(iter(options.values())),
)
def test_strong_augmentation_is_a_function_of_seed_epoch_and_index_and_spares_validation(folder, options):
    for root in (str(folder), None):
        common = {"num_workers": 0, "batch_size": 4, "image_size": 24, "flip": 0.0, "color_jitter": 0.0}
        plain, strong, again = (
            ClassificationData(root, scale=(1.0, 1.0), **common, **own) for own in ({}, options, options)
        )
        for data in (plain, strong, again):
            data.setup("fit")
        keys = [(epoch, index) for epoch in (0, 1) for index in range(6)]
        images = [[data.datasets["train"][key][0] for key in keys] for data in (plain, strong, again)]
        assert sum(not a.equal(b) for a, b in zip(*images[:2], strict=True)) > len(keys) / 2
        assert all(a.equal(b) for a, b in zip(*images[1:], strict=True))
        assert all(image.min() >= 0 and image.max() <= 1 and image.shape == images[0][0].shape for image in images[1])
        assert all(plain.datasets["val"][i][0].equal(strong.datasets["val"][i][0]) for i in range(4))


def test_a_rectangle_is_erased_by_the_colour_that_normalises_to_zero(folder):
    data = ready(folder, random_erasing=1.0, flip=0.0, color_jitter=0.0, scale=(1.0, 1.0))
    mean = (torch.tensor(PAD_COLOUR) / 255).view(3, 1, 1)
    erased = torch.stack([(data.datasets["train"][(0, i)][0] == mean).all(0) for i in range(12)])
    assert (erased.sum((1, 2)) > 0).all()
    assert 0.02 < erased.float().mean() < 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ra_operations": 0}, "ra_operations=0 must be at least 1"),
        ({"ra_magnitude": 31}, "ra_magnitude=31 from 0 to 30"),
        ({"random_erasing": 1.5}, "random_erasing=1.5 must be from 0 to 1"),
    ],
)
def test_augmentation_that_cannot_work_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        ClassificationData(**options)


def test_reading_an_item_leaves_the_global_generator_alone(folder):
    dataset = ready(folder).datasets["train"]
    assert isinstance(dataset, ImageFolderDataset)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[(0, 0)]
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_validation_images(folder, world_size, monkeypatch):
    data = ready(folder)
    labels = []
    for rank in range(world_size):
        monkeypatch.setattr(data, "rank", lambda rank=rank: (rank, world_size))
        labels += [label for _, batch in data.val_dataloader() for label in batch.tolist()]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]


# Shapes


def test_without_a_folder_single_shapes_are_drawn():
    data = ClassificationData(batch_size=8, shapes=ShapesOptions(size=32, train=20, val=12))
    data.setup("fit")
    data.setup("test")
    assert data.class_names == list(SHAPES)
    assert data.num_workers == 0
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 32, 32)
    assert set(labels.tolist()) <= set(range(4))
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [20, 12, 12]


def test_the_class_is_that_of_the_one_shape():
    dataset = SingleShapes(200, 32, "train", seed=3)
    labels = [int(dataset[(1, i)][1]) for i in range(200)]
    assert min(map(labels.count, range(4))) > 25
    for index in range(8):
        scene = draw_scene((3, 0, 1, index), 32, shapes=1)
        image, label = dataset[(1, index)]
        assert len(scene.labels) == 1
        assert SHAPES[label] == SHAPES[int(scene.labels[0]) - 1]
        assert torch.equal((image * 255).byte().permute(1, 2, 0), torch.from_numpy(scene.image))


def test_training_draws_new_shapes_every_epoch_and_validation_never():
    train, val = SingleShapes(4, 32, "train"), SingleShapes(4, 32, "val")
    assert not train[(0, 1)][0].equal(train[(1, 1)][0])
    assert val[1][0].equal(val[1][0])
    assert not val[1][0].equal(train[(0, 1)][0])
    assert not SingleShapes(4, 32, "train", seed=1)[(0, 1)][0].equal(train[(0, 1)][0])


def test_scenes_of_several_shapes_are_drawn_as_before():
    assert {len(draw_scene(seed, 48, shapes=3).masks) for seed in range(5)} <= {2, 3}
    assert any(len(draw_scene(seed, 48).masks) > 2 for seed in range(5))
