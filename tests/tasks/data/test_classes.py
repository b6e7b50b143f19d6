"""What the values of masks mean: classes.json, colours, one class, and pixels that no rule covers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from backbones_tasks.data.coco import check_names
from backbones_tasks.data.folders import Classes, DataError, colour_value
from backbones_tasks.data.images import read_mask
from backbones_tasks.data.segmentation import SegmentationData
from backbones_tasks.training.losses import SegmentationLoss
from backbones_tasks.training.segmentation import SegmentationTask

LABELS = np.random.default_rng(0).integers(0, 3, (8, 10))
COLOURS = [[0, 0, 0], [200, 30, 0], [0, 0, 255]]


def write(root, content, masks):
    """Two images with these masks, of which one is held out, and classes.json."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.new("RGB", (10, 8), (i, 0, 0)).save(root / "images" / f"{i}.png")
        picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        picture.save(root / "masks" / f"{i}.png")
    if content is not None:
        (root / "classes.json").write_text(json.dumps(content))


def ready(root, **options):
    data = SegmentationData(str(root), num_workers=0, batch_size=1, crop_size=8, **options)
    data.setup("fit")
    return data


def truth(root, **options):
    """The class indices of the two masks, held out or not."""
    data = ready(root, **options)
    return [data.datasets[split].mask(0) for split in ("train", "val")]


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ({"values": [0, 100, 200]}, np.array([0, 100, 200])),
        ({"values": [7, 255, 0]}, np.array([7, 255, 0])),
        ({"values": [3, 300, 65535]}, np.array([3, 300, 65535])),
        ({}, np.arange(3)),
    ],
)
def test_values_are_mapped_to_classes(tmp_path, rule, values):
    kind = np.uint8 if values.max() < 256 else np.uint16
    write(tmp_path, {"classes": ["a", "b", "c"], **rule}, [values[LABELS].astype(kind)] * 2)
    assert all(np.array_equal(mask, LABELS) for mask in truth(tmp_path))


@pytest.mark.parametrize("kind", ["RGB", "P", "RGBA"])
def test_colours_are_mapped_to_classes(tmp_path, kind):
    image = Image.fromarray(np.array(COLOURS, dtype=np.uint8)[LABELS])
    image = image.quantize(3) if kind == "P" else image.convert(kind)
    write(tmp_path, {"classes": ["a", "b", "c"], "colours": COLOURS}, [image] * 2)
    assert all(np.array_equal(mask, LABELS) for mask in truth(tmp_path))


def test_a_class_may_have_several_values_and_several_may_be_ignored(tmp_path):
    values = np.array([[0, 1, 2, 3, 4, 5]], dtype=np.uint8)
    classes = Classes.make(["low", "high"], [4, 5], ids=[0, [1, 2, 3]])
    assert classes.indices(values).tolist() == [[0, 1, 1, 1, 255, 255]]
    coloured = Classes.make(["a", "b"], [[9, 9, 9]], ids=[[1, 2, 3], [[4, 5, 6], [7, 8, 9]]], coloured=True)
    seen = np.array([colour_value(c) for c in ([1, 2, 3], [7, 8, 9], [9, 9, 9], [0, 0, 0])])
    assert coloured.indices(seen).tolist() == [0, 1, 255, -1]


def test_255_is_ignored_where_the_data_say_so_and_nowhere_else(tmp_path):
    mask = LABELS.astype(np.uint8)
    mask[:2] = 255
    write(tmp_path / "told", {"classes": ["a", "b", "c"], "ignore_index": 255}, [mask] * 2)
    assert (truth(tmp_path / "told")[0][:2] == 255).all()
    write(tmp_path / "not", {"classes": ["a", "b", "c"]}, [mask] * 2)
    with pytest.raises(DataError, match=r'masks/1.png: unknown class value 255.*25.00% of all.*"ignore_index": 255'):
        ready(tmp_path / "not")
    assert (truth(tmp_path / "not", ignore_index=255)[0][:2] == 255).all()
    wide = np.full((8, 10), 255, dtype=np.uint16)
    write(tmp_path / "wide", {"classes": [f"c{i}" for i in range(300)]}, [wide] * 2)
    assert (truth(tmp_path / "wide")[0] == 255).all(), "class 255 of 16 bits"
    assert ready(tmp_path / "wide").ignore_index == 300


def test_masks_of_0_and_255_for_two_classes_say_what_to_write(tmp_path):
    write(tmp_path, {"classes": ["no", "yes"]}, [((LABELS > 0) * 255).astype(np.uint8)] * 2)
    with pytest.raises(DataError, match=r'unknown class value 255.*write "values": \[0, 255\] into classes.json'):
        ready(tmp_path)


def test_pixels_that_no_rule_covers_are_told_by_their_share(tmp_path):
    odd = LABELS.astype(np.uint8)
    odd[0, :4] = (7, 8, 9, 9)
    write(tmp_path, {"classes": ["a", "b", "c"]}, [LABELS.astype(np.uint8), odd])
    message = r"masks/1.png: unknown class value 7-9; known are 0-2, none is ignored. No rule covers 2.50% .* in 1 of 2"
    with pytest.raises(DataError, match=message):
        ready(tmp_path)
    unchecked = ready(tmp_path, check=False)
    with pytest.raises(DataError, match=r"masks/1.png: no rule covers the class values of 5.00% of its pixels"):
        _ = [unchecked.datasets[split].mask(0) for split in ("train", "val")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": "abc"}, "list of names, but are 'abc'"),
        ({"classes": ["a", "a"]}, "two classes are called 'a'"),
        ({"classes": ["a", "b"], "values": [0]}, "2 classes, but the values of 1"),
        ({"classes": ["a", "b"], "values": [0, 0]}, "the value 0 stands for two classes"),
        ({"classes": ["a", "b"], "values": [0, 1.5]}, "1.5 is no mask value"),
        ({"classes": ["a", "b"], "values": [0, []]}, "a class has no value"),
        ({"classes": ["a", "b"], "colours": [[0, 0, 0], [0, 0, 256]]}, "no colour"),
        ({"classes": ["a", "b"], "values": [0, 1], "colours": COLOURS[:2]}, 'give "values" or "colours", not both'),
        ({"classes": ["a", "b"], "colour": COLOURS[:2]}, "colour is unknown"),
        ({"classes": ["a"], "values": [0]}, "a is the only class"),
        ({"classes": ["a", "b"], "ignore_index": [0, 1]}, "all of the classes a, b are ignored"),
    ],
)
def test_rules_that_cannot_be_are_named_with_their_file(tmp_path, content, message):
    write(tmp_path, content, [LABELS.astype(np.uint8)] * 2)
    with pytest.raises(DataError, match=message) as caught:
        ready(tmp_path)
    assert "classes.json" in str(caught.value)


def test_class_names_on_the_command_line_follow_the_same_rules(tmp_path):
    write(tmp_path, None, [LABELS.astype(np.uint8)] * 2)
    with pytest.raises(DataError, match=r"two classes are called 'a'"):
        ready(tmp_path, classes=["a", "a", "b"])
    with pytest.raises(DataError, match="'cat' and 'Cat' are one, or are they"):
        check_names(["cat", "dog", "Cat"])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "jfif"])
def test_masks_compressed_with_loss_are_refused(tmp_path, suffix):
    write(tmp_path, {"classes": ["a", "b", "c"]}, [LABELS.astype(np.uint8)] * 2)
    (tmp_path / "masks/0.png").rename(tmp_path / f"masks/0.{suffix}")
    with pytest.raises(DataError, match=rf"masks/0.{suffix}: cannot be read: is compressed with loss"):
        ready(tmp_path)


def test_masks_of_other_kinds_are_read_whole_or_refused(tmp_path):
    np.save(tmp_path / "a.npy", LABELS)
    Image.fromarray(LABELS.astype(np.float32)).save(tmp_path / "a.tif")
    assert all(np.array_equal(read_mask(tmp_path / name), LABELS) for name in ("a.npy", "a.tif"))
    Image.fromarray(LABELS.astype(np.float32) / 2).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="no whole numbers"):
        read_mask(tmp_path / "b.tif")
    Image.fromarray(np.array(COLOURS, dtype=np.uint8)[LABELS]).convert("RGBA").save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r'is a RGBA image.*unless classes\.json tells their "colours"'):
        read_mask(tmp_path / "c.png")
    image = Image.fromarray(np.array(COLOURS, dtype=np.uint8)[LABELS]).convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.save(tmp_path / "d.png")
    with pytest.raises(ValueError, match="transparent in places"):
        read_mask(tmp_path / "d.png", coloured=True)


# One class


def test_a_single_class_is_told_from_the_rest(tmp_path):
    write(tmp_path, {"classes": ["crack"], "values": [255]}, [((LABELS == 1) * 255).astype(np.uint8)] * 2)
    data = ready(tmp_path)
    assert (data.num_classes, data.class_names) == (1, ["crack"])
    assert np.array_equal(data.datasets["val"].mask(0), LABELS == 1)
    assert data.count_pixels("val").tolist() == [int((LABELS != 1).sum()), int((LABELS == 1).sum())]


@pytest.fixture
def single():
    return SegmentationTask(num_classes=1, class_names=["crack"], ignore_index=255, loss="ce+dice").eval()


def test_one_logit_is_trained_by_the_sigmoids_loss(single):
    images, masks = torch.rand(2, 3, 32, 32), torch.randint(0, 2, (2, 32, 32))
    masks[:, :4] = 255
    logit = single.model(single.normalise(images))
    assert logit.shape == (2, 1, 32, 32)
    seen = masks != 255
    expected = F.binary_cross_entropy_with_logits(logit[:, 0][seen], masks[seen].float())
    loss = SegmentationLoss("ce", binary=True)(single(images), masks)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    probability, target = logit[:, 0].sigmoid()[seen], masks[seen].float()
    dice = 1 - 2 * (probability * target).sum() / (probability + target).sum()
    assert SegmentationLoss("dice", binary=True)(single(images), masks).item() == pytest.approx(dice.item(), rel=1e-4)


def test_the_metric_of_a_single_class_is_its_own_iou(single, monkeypatch):
    monkeypatch.setattr(single, "log_loss", lambda *args: None)
    masks = torch.zeros(1, 32, 32, dtype=torch.int64)
    masks[:, :8] = 1
    monkeypatch.setattr(single, "forward", lambda images: torch.stack([-images[:, 0], images[:, 0]], dim=1))
    images = torch.full((1, 3, 32, 32), -1.0)
    images[:, :, 4:16] = 1.0  # four of eight rows found, eight rows too many
    single.evaluate((images, masks), "val")
    scores = single.finish("val")
    assert {name: round(value.item(), 4) for name, value in scores.items()} == {
        "mIoU": 0.25,
        "pixel_acc": round(20 / 32, 4),
        "IoU_crack": 0.25,
    }


def test_a_single_class_is_predicted_where_it_is_likelier_than_not(single):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    options = SimpleNamespace(window=None, overlap=None, scales=None, flip=None)
    with torch.inference_mode():
        pictures, _ = single.predict_image(image, options)
        logit = single.model(single.normalise(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255))
    mask = np.asarray(pictures["masks"])
    assert np.array_equal(mask, (logit[0, 0] > 0).numpy())
    assert pictures["overlays"].size == (50, 40)
