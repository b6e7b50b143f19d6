"""Folders of images and masks: layouts, classes, the check before training, augmentation from seeds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from backbones_tasks.data.folders import Classes, DataError
from backbones_tasks.data.images import read_mask
from backbones_tasks.data.loading import EpochSampler, EqualSizeBatches
from backbones_tasks.data.reading import read_image
from backbones_tasks.data.segmentation import SegmentationData, augmentation

NAMES = ["sky", "road", "car", "void"]  # void is ignored


@pytest.fixture
def folder(tmp_path):
    """Six images to train and three to validate, 40 x 30, in CamVid's layout."""
    write_split(tmp_path, "train", 6)
    write_split(tmp_path, "val", 3)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": NAMES, "ignore_index": [3, 255]}))
    return tmp_path


def write_split(root, split, count, masks="labels"):
    rng = np.random.default_rng(len(split))
    for kind in ("images", masks):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / "images" / split / f"{i}.jpg")
        Image.fromarray(rng.choice([0, 1, 2, 3, 255], (30, 40)).astype(np.uint8)).save(
            root / masks / split / f"{i}.png"
        )


def ready(root, **options):
    data = SegmentationData(str(root), **{"num_workers": 0, "batch_size": 2, "crop_size": 32, **options})
    data.setup("fit")
    return data


def test_camvid_layout(folder):
    data = ready(folder)
    assert data.class_names == NAMES[:3]
    assert data.num_classes == 3
    assert (len(data.datasets["train"]), len(data.datasets["val"])) == (6, 3)
    image, mask = data.datasets["val"][0]
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert mask.dtype == torch.int64
    assert set(mask.unique().tolist()) == {0, 1, 2, data.ignore_index}
    images, masks = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 32, 32)
    assert masks.shape == (2, 32, 32)


def test_plain_layout_is_split_by_a_seed(tmp_path):
    write_split(tmp_path, ".", 10, masks="masks")
    options = {"classes": NAMES, "ignore_index": [3, 255], "val_fraction": 0.3}
    names = {}
    for seed in (0, 0, 1):
        data = ready(tmp_path, split_seed=seed, **options)
        train, val = ({pair.image.name for pair in data.datasets[split].pairs} for split in ("train", "val"))
        assert not train & val
        assert (len(train), len(val)) == (7, 3)
        assert names.setdefault(seed, val) == val
    assert names[0] != names[1]
    with pytest.raises(DataError, match="has no masks to test on"):
        data.setup("test")


def test_images_held_out_of_a_training_folder_are_not_trained_on(tmp_path):
    write_split(tmp_path, "train", 10)
    data = ready(tmp_path, classes=NAMES, ignore_index=[3, 255], val_fraction=0.3)
    train, val = ({pair.image.name for pair in data.datasets[split].pairs} for split in ("train", "val"))
    assert (len(train), len(val), len(train & val)) == (7, 3, 0)


def test_ignored_values_and_gaps_are_mapped_to_contiguous_classes():
    classes = Classes.make(["unlabelled", "wall", "floor"], ignore_index=0, ignored=[255])
    assert classes.names == ("wall", "floor")
    values = np.array([0, 1, 2, 255, 7, -1])
    assert classes.indices(values).tolist() == [255, 0, 1, 255, -1, -1]
    many = Classes.make([f"c{i}" for i in range(300)])
    assert (many.ignore_index, many.indices(np.array([255, 299])).tolist()) == (300, [255, 299]), "255 is a class"


def test_one_error_names_all_that_is_wrong(folder):
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    (labels / "0.png").unlink()
    (images / "1.jpg").unlink()
    Image.fromarray(np.full((30, 40), 9, dtype=np.uint8)).save(labels / "2.png")
    Image.fromarray(np.zeros((10, 40), dtype=np.uint8)).save(labels / "3.png")
    (images / "4.jpg").write_bytes((images / "4.jpg").read_bytes()[:300])
    Image.new("RGB", (40, 30)).save(folder / "labels" / "val" / "0.png")
    with pytest.raises(DataError) as caught:
        ready(folder)
    message = str(caught.value)
    for part in (
        "6 problems",
        "images/train/0.jpg: has no mask",
        "labels/train/1.png: has no image",
        "labels/train/2.png: unknown class value 9; known are 0-2, ignored are 3, 255. No rule covers 18.75% of all",
        "labels/train/3.png: is 40 x 10, its image is 40 x 30",
        "images/train/4.jpg: cannot be read",
        "labels/val/0.png: cannot be read: is a RGB image",
    ):
        assert part in message


def test_long_lists_of_problems_are_cut(folder):
    write_split(folder, "train", 14)
    for file in (folder / "labels" / "train").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"14 problems(?s:.)*and 4 more"):
        ready(folder)


@pytest.mark.parametrize("content", ["", "[1]", '{"names": []}', '{"classes": []}', '{"classes": [1, 2]}'])
def test_a_wrong_classes_file_is_named(folder, content):
    (folder / "classes.json").write_text(content)
    with pytest.raises(DataError, match=r"classes"):
        SegmentationData(str(folder))


def test_without_class_names_the_error_tells_the_values_in_the_masks(folder):
    (folder / "classes.json").unlink()
    with pytest.raises(DataError, match="0-3, 255"):
        SegmentationData(str(folder))


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


def test_reading_an_item_leaves_the_global_generator_alone(folder):
    dataset = ready(folder).datasets["train"]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[(0, 0)]
    assert torch.rand(3).equal(expected)


def test_crops_pad_masks_with_the_ignored_value():
    from torchvision import tv_tensors

    augment = augmentation(64, scale=(1.0, 1.0), flip=0.0, color_jitter=0.0, ignore_index=255)
    image, mask = tv_tensors.Image(torch.full((3, 20, 20), 7)), tv_tensors.Mask(torch.ones(20, 20, dtype=torch.int64))
    image, mask = augment(image, mask)
    assert image.shape == (3, 64, 64)
    assert (mask == 1).sum() == 400
    assert (mask == 255).sum() == 64 * 64 - 400
    assert ((image[0] == 7) == (mask == 1)).all(), "image and mask move together"


def test_crops_may_be_wider_than_high(folder):
    image, mask = ready(folder, crop_size=(16, 48)).datasets["train"][(0, 0)]
    assert (image.shape, mask.shape) == ((3, 16, 48), (16, 48))


def test_ranks_share_an_epoch_evenly():
    shares = [list(EpochSampler(10, seed=0, rank=rank, world_size=4)) for rank in range(4)]
    assert {len(share) for share in shares} == {3}
    assert {index for share in shares for _, index in share} == set(range(10))


def test_validation_batches_hold_one_size_and_every_image_once():
    sizes = [(10, 10), (20, 10), (10, 10), (10, 10)]
    batches = list(EqualSizeBatches(sizes, batch_size=2))
    assert batches == [[0, 2], [3], [1]]
    shares = [list(EqualSizeBatches(sizes, 2, rank, 2)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(batches)


def test_every_process_has_a_batch_to_validate():
    shares = [list(EqualSizeBatches([(10, 10)] * 4, 4, rank, 2)) for rank in range(2)]
    assert shares == [[[0, 1]], [[2, 3]]]
    with pytest.raises(DataError, match="4 images for 5 processes"):
        EqualSizeBatches([(10, 10)] * 4, 4, 0, 5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_images_of_any_mode_are_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.new("RGB", (6, 4), (128, 128, 128))
    (image.quantize() if mode == "P" else image.convert(mode)).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    if mode != "1":
        assert np.abs(np.asarray(image).astype(int) - 128).max() <= 2


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 6)


def test_palette_masks_are_read_as_indices(tmp_path):
    mask = Image.fromarray(np.array([[0, 2], [1, 3]], dtype=np.uint8)).convert("P")
    mask.putpalette([9, 9, 9] * 4)
    mask.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == [[0, 2], [1, 3]]


def test_camvid_is_read_whole(shared_data):
    data = SegmentationData(str(shared_data / "camvid"), num_workers=0)
    for stage in ("fit", "test"):
        data.setup(stage)
    assert {split: len(dataset) for split, dataset in data.datasets.items()} == {"train": 367, "val": 101, "test": 233}
    assert data.num_classes == 11
    assert data.class_names[0] == "sky"
    assert set(data.datasets["val"][0][1].unique().tolist()) <= {*range(11), 255}
