"""Boxes and masks for detectors: formats, layouts, the report on faults, augmentation, batches."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pytorch_lightning import LightningModule, Trainer

from backbones_tasks.data import rle
from backbones_tasks.data.detection import CocoFiles, DetectionData, detection_augmentation
from backbones_tasks.data.folders import DataError
from backbones_tasks.data.loading import AspectRatioBatches, EpochSampler
from backbones_tasks.data.segmentation import ShapesOptions
from backbones_tasks.data.shapes import CLASSES, draw_scene
from backbones_tasks.training.callbacks import quiet

HEIGHT, WIDTH = 40, 60
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "tree"}]
POLYGON = [[10.0, 5.0, 30.5, 5.0, 30.5, 25.25, 10.0, 20.0]]


def compressed(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    return {"size": [HEIGHT, WIDTH], "counts": coco_mask.encode(mask)["counts"].decode()}


def uncompressed(x0, y0, x1, y1):
    """Column by column, as COCO writes crowds."""
    counts = [x0 * HEIGHT + y0] + [y1 - y0, HEIGHT - (y1 - y0)] * (x1 - x0 - 1) + [y1 - y0]
    return {"size": [HEIGHT, WIDTH], "counts": [*counts, HEIGHT * WIDTH - sum(counts)]}


def annotation(number, image, category=3, box=(10, 5, 20.5, 20.25), segmentation=POLYGON, **more):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": 300.5,
        "iscrowd": 0,
        "segmentation": segmentation,
        **more,
    }


def write_coco(root, split="train", count=4, annotations=None, place="annotations/instances_{}.json", images="{}"):
    """Images 1 to `count`, of which the last has no objects."""
    folder = root / images.format(split)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for i in range(1, count + 1):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{split}{i}.jpg")
    if annotations is None:
        annotations = [
            annotation(1, 1),
            annotation(2, 1, 7, (40, 10, 10, 20), compressed(40, 10, 50, 30)),
            annotation(3, 2, 90, (0, 0, 15, 12), uncompressed(0, 0, 15, 12), iscrowd=1),
            annotation(4, 2, 7, (5, 6, 7, 8), uncompressed(5, 6, 12, 14)),
        ]
    listed = [{"id": i, "file_name": f"{split}{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, count + 1)]
    file = root / place.format(split)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": CATEGORIES}))
    return file


@pytest.fixture
def folder(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, "val", 2, [annotation(1, 1, 7)])
    return tmp_path


def ready(root, stage="fit", **options):
    data = DetectionData(str(root), **{"num_workers": 0, "batch_size": 2, "crop_size": 32, **options})
    data.setup(stage)
    return data


def whole(data, split="train"):
    """(image, target) of every image as it is."""
    data.datasets[split].augment = None
    return [data.datasets[split][i] for i in range(len(data.datasets[split]))]


def test_targets_are_what_torchvision_trains_on(folder):
    data = ready(folder, masks=True)
    image, target = whole(data)[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert 0 <= image.min() < image.max() <= 1
    assert target["boxes"].tolist() == [[10, 5, 30.5, 25.25], [40, 10, 50, 30]]
    assert target["labels"].tolist() == [1, 2]
    assert target["image_id"] == 1
    assert target["area"].tolist() == [300.5, 300.5]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["masks"].shape == (2, HEIGHT, WIDTH)
    assert target["masks"].dtype == torch.uint8
    assert all(type(value) in (torch.Tensor, int) for value in target.values()), "plain tensors, as batches are pinned"


def test_category_ids_are_mapped_both_ways(folder):
    data = ready(folder)
    assert data.class_names == ["background", "cat", "dog", "tree"], "in the order of their ids, 3, 7, 90"
    assert data.num_classes == 4
    assert [target["labels"].tolist() for _, target in whole(data)] == [[1, 2], [2], [], []]
    truth = data.datasets["train"].coco()
    assert [entry["category_id"] for entry in truth["annotations"]] == [3, 7, 90, 7]
    assert {entry["name"]: entry["id"] for entry in truth["categories"]} == {"cat": 3, "dog": 7, "tree": 90}


def test_images_without_objects_are_kept(folder):
    image, target = whole(ready(folder, masks=True))[3]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, HEIGHT, WIDTH)
    assert ready(folder, masks=True).datasets["train"][(0, 3)][1]["masks"].shape == (0, 32, 32), "augmented too"


def test_crowds_are_not_trained_on_but_evaluated(folder):
    data = ready(folder, masks=True)
    assert [len(target["labels"]) for _, target in whole(data)] == [2, 1, 0, 0]
    crowds = [entry for entry in data.datasets["train"].coco()["annotations"] if entry["iscrowd"]]
    assert [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in crowds] == [(2, 90, [0, 0, 15, 12])]
    assert coco_mask.area(crowds[0]["segmentation"]) == 15 * 12


def test_masks_are_those_of_pycocotools(folder):
    data = ready(folder, masks=True)
    reference = COCO(folder / "annotations" / "instances_train.json")
    for _, target in whole(data):
        entries = reference.loadAnns(reference.getAnnIds(target["image_id"], iscrowd=False))
        assert len(entries) == len(target["masks"])
        for entry, mask in zip(entries, target["masks"], strict=True):
            assert np.array_equal(mask.numpy(), reference.annToMask(entry))


@pytest.mark.parametrize(
    ("place", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("annotations/instances_{}.json", "images/{}"),
        ("instances_{}.json", "{}"),
        ("annotations/{}.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}.json", "."),
    ],
)
def test_layouts_are_found(tmp_path, place, images):
    for split in ("train", "val"):
        write_coco(tmp_path, split, place=place, images=images)
    data = ready(tmp_path)
    assert [len(data.datasets[split]) for split in ("train", "val")] == [4, 4]
    assert data.datasets["val"].samples[0].file.name == "val1.jpg"


def test_files_elsewhere_are_given_by_options(tmp_path):
    write_coco(tmp_path, "train", place="a/one.json", images="pictures")
    with pytest.raises(DataError, match=r"expected annotations/instances_train\*.json"):
        DetectionData(str(tmp_path))
    data = ready(tmp_path, train=CocoFiles("a/one.json", "pictures"), val=CocoFiles("a/one.json", "pictures"))
    assert [len(data.datasets[split]) for split in ("train", "val")] == [4, 4]
    with pytest.raises(DataError, match="has no test split, only train, val"):
        data.setup("test")


def test_two_lists_of_one_split_are_not_guessed_between(tmp_path):
    for year in (2014, 2017):
        write_coco(tmp_path, f"train{year}")
    with pytest.raises(DataError, match=r"which of .*train2014.json, .*train2017.json"):
        DetectionData(str(tmp_path))


def test_without_a_validation_split_some_images_are_held_out(tmp_path):
    write_coco(tmp_path, "train", 10, [annotation(i, i) for i in range(1, 11)])
    data = ready(tmp_path, "validate", val_fraction=0.3)
    data.setup("fit")
    train, val = ({sample.file.name for sample in data.datasets[split].samples} for split in ("train", "val"))
    assert (len(train), len(val)) == (7, 3)
    assert not train & val
    other = ready(tmp_path, val_fraction=0.3, split_seed=1)
    assert {sample.file.name for sample in other.datasets["val"].samples} != val


def test_chosen_classes_leave_the_others_out(folder):
    data = ready(folder, classes=["dog"])
    assert data.class_names == ["background", "dog"]
    assert [target["labels"].tolist() for _, target in whole(data)] == [[1], [1], [], []]
    with pytest.raises(DataError, match="lists no class 'wolf'; it has dog, cat, tree"):
        DetectionData(str(folder), classes=["wolf"])


def plant_faults(root):
    """A COCO file with ten faults of ten kinds, and one sound object."""
    broken = {"size": [HEIGHT, WIDTH], "counts": compressed(5, 5, 9, 9)["counts"][:-1]}
    entries = [
        annotation(100, 1),
        annotation(101, 1, box=(10, 10, 0, 5)),
        annotation(102, 1, box=(50, 10, 30, 5)),
        annotation(103, 2, box=(float("nan"), 1, 5, 5)),
        annotation(104, 2, category=4),
        annotation(104, 2),
        annotation(106, 77),
        annotation(107, 3, segmentation=[[1, 2, 3, 4]]),
        annotation(108, 3, segmentation=broken),
        annotation(109, 4),
        annotation(110, 5),
    ]
    file = write_coco(root, "train", 6, entries)
    (root / "train" / "train4.jpg").unlink()
    (root / "train" / "train5.jpg").write_bytes((root / "train" / "train5.jpg").read_bytes()[:400])
    Image.new("RGB", (WIDTH, HEIGHT + 2)).save(root / "train" / "train6.jpg")
    return file


PLANTED = {
    "missing image": "train4.jpg",
    "image that cannot be read": "train5.jpg",
    "image of another size than listed": "train6.jpg is 60 x 42, not 60 x 40",
    "box without area": "annotation 101 of train1.jpg, [10, 10, 0, 5]",
    "box over the image's edge, cut there": "annotation 102 of train1.jpg",
    "box with a number that is not finite": "annotation 103 of train2.jpg",
    "unknown category": "annotation 104 of train2.jpg, 4",
    "annotation id used twice": "annotation 104 of train2.jpg",
    "annotation of an image that is not listed": "annotation 106 of image 77",
    "broken mask": "annotation 107 of train3.jpg, polygon of shape [4]",
}


def test_one_report_names_ten_kinds_of_faults(folder):
    file = plant_faults(folder)
    with pytest.raises(DataError) as caught:
        ready(folder, masks=True)
    message = str(caught.value)
    print(message)
    assert message.startswith(f"{file}: 11 faults in 6 images with 11 objects\n")
    lines = message.splitlines()[1:-1]
    assert len(lines) == len(PLANTED) == 10
    for kind, where in PLANTED.items():
        line = next(line for line in lines if line.strip().startswith(kind))
        assert where in line
    assert "broken mask (2)" in message
    assert "annotation 108 of train3.jpg, RLE" in message
    assert "--data.faults drop" in message


def test_faults_are_left_out_when_asked(folder):
    plant_faults(folder)
    with pytest.warns(UserWarning, match=r"11 faults(?s:.)*1 repaired, 10 dropped; there are 5 images with 3 objects"):
        data = ready(folder, masks=True, faults="drop")
    train = whole(data)
    assert [target["image_id"] for _, target in train] == [1, 2, 3]
    assert [len(target["boxes"]) for _, target in train] == [2, 0, 0]
    assert len(list(data.train_dataloader())) == 1


def test_faults_of_both_splits_are_told_at_once(folder):
    (folder / "train" / "train1.jpg").unlink()
    (folder / "val" / "val1.jpg").unlink()
    with pytest.raises(DataError, match=r"instances_train.json: 1 fault (?s:.)*instances_val.json: 1 fault "):
        ready(folder)


def test_long_lists_of_faults_are_cut(folder):
    write_coco(folder, "train", 9)
    for i in range(1, 10):
        (folder / "train" / f"train{i}.jpg").unlink()
    with pytest.raises(DataError, match=r"missing image \(9\): .*train5.jpg; and 4 more"):
        ready(folder)
    with pytest.warns(UserWarning, match="9 faults"), pytest.raises(DataError, match="no image is left"):
        ready(folder, faults="drop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no JSON"),
        ("[]", "expected COCO's format"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no category"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "an id, a whole number, and a name"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "categories of the same id: 1",
        ),
    ],
)
def test_a_file_that_is_not_in_cocos_format_is_named(folder, content, message):
    file = folder / "annotations" / "instances_train.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        DetectionData(str(folder))
    assert str(file) in str(caught.value)


def test_entries_of_any_json_are_reported_not_tripped_over(folder):
    file = write_coco(folder)
    content = json.loads(file.read_text())
    content["images"] += [None, {"id": "five"}, {**content["images"][0]}]
    content["annotations"] += [None, {}, annotation([1], [1]), annotation(9, 1, box=("a", 1, 2, 3))]
    content["annotations"] += [
        annotation(10, 1, [3]),
        annotation(11, 1, segmentation=None),
        annotation(12, 1, area="x"),
    ]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        ready(folder, masks=True)
    for part in (
        "image entry that is no object (1)",
        "image whose id is no whole number (1)",
        "image id used twice (1)",
        "annotation that is no object (1)",
        "annotation of an image that is not listed (2)",
        "box that is not four numbers (1)",
        "unknown category (1)",
        "object without a mask (1)",
    ):
        assert part in str(caught.value)


def test_boxes_a_pixel_over_the_border_are_cut_there(folder):
    write_coco(folder, "train", 1, [annotation(1, 1, box=(-0.5, 0, 61, 40.5))])
    data = ready(folder)
    assert whole(data)[0][1]["boxes"].tolist() == [[0, 0, 60, 40]]
    assert data.datasets["train"].coco()["annotations"][0]["bbox"] == [-0.5, 0, 61, 40.5], "the truth stays as it is"


def test_an_image_that_its_exif_orientation_turns_is_explained(folder):
    image = Image.new("RGB", (WIDTH, HEIGHT))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "train" / "train1.jpg", exif=exif)
    with pytest.raises(DataError, match="is 40 x 60 once turned upright by its EXIF orientation, not 60 x 40"):
        ready(folder)


def test_unchecked_images_are_named_when_they_fail(folder):
    (folder / "train" / "train1.jpg").write_bytes(b"no image")
    Image.new("RGB", (5, 5)).save(folder / "train" / "train2.jpg")
    dataset = ready(folder, check=False).datasets["train"]
    with pytest.raises(DataError, match=r"train1.jpg: cannot be read"):
        dataset[0]
    with pytest.raises(DataError, match=r"train2.jpg: is 5 x 5, listed as \(40, 60\)"):
        dataset[1]


# RLE


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
def test_counts_survive_encoding(height, width, seed):
    masks = np.random.default_rng(seed).random((3, height, width)) < 0.4
    counts = rle.encode_array(masks)
    assert np.array_equal(rle.decode(counts, height, width), masks)
    assert [rle.encode({"size": [height, width], "counts": c}, height, width) for c in counts] == counts


@settings(deadline=None)
@given(
    st.integers(0, 2**32), st.integers(0, 30), st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=2)
)
def test_counts_are_sound_or_refused(seed, place, text):
    """pycocotools would read or write beyond its memory."""
    counts = rle.encode_array(np.random.default_rng(seed).random((1, 6, 7)) < 0.3)[0]
    place %= len(counts)
    counts = counts[:place] + text + counts[place + 1 :]
    try:
        rle.encode({"size": [6, 7], "counts": counts}, 6, 7)
    except ValueError:
        return
    assert rle.decode([counts], 6, 7).shape == (1, 6, 7)


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        None,
        "polygon",
        [1, 2, 3, 4, 5, 6],
        [[1, 2, 3, 4, 5, 6, 7]],
        [["a"] * 6],
        [[1, 2, 3, 4, 5, float("inf")]],
        [[1, 2, 3, 4, 5, 1e9]],
        {"counts": [5]},
        {"size": [5, 5], "counts": [24]},
        {"size": [5, 5], "counts": [26, -1]},
        {"size": [5, 5], "counts": [20.5, 4.5]},
        {"size": [5, 6], "counts": [25]},
        {"size": [5, 5], "counts": None},
        {"size": [5, 5], "counts": "é"},
        {"size": [5, 5], "counts": "oooooooooooooo0"},
    ],
)
def test_broken_segmentations_are_refused(segmentation):
    with pytest.raises(ValueError, match=r"polygon|RLE|empty"):
        rle.encode(segmentation, 5, 5)


# Pascal VOC


def write_voc(root, lists):
    """Images with a 20 x 10 cat from pixel (1, 1), counted from 1, and a difficult dog."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for split, names in lists.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}  1\n" for name in names))
        for name in names:
            Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / f"{name}.jpg")
            (root / "Annotations" / f"{name}.xml").write_text(
                voc_xml(("cat", 1, 1, 20, 10), ("dog", 30, 20, 39, 29, 1))
            )


def voc_xml(*objects):
    root = ElementTree.Element("annotation")
    for name, value in {"width": WIDTH, "height": HEIGHT, "depth": 3}.items():
        size = root.find("size")
        size = ElementTree.SubElement(root, "size") if size is None else size
        ElementTree.SubElement(size, name).text = str(value)
    for name, *corners in objects:
        thing = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(thing, "name").text = name
        ElementTree.SubElement(thing, "difficult").text = str(corners[4] if len(corners) > 4 else 0)
        box = ElementTree.SubElement(thing, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False):
            ElementTree.SubElement(box, side).text = str(value)
    return ElementTree.tostring(root, encoding="unicode")


def test_voc_folders_are_read(tmp_path):
    write_voc(tmp_path, {"train": ["a", "b"], "val": ["c"]})
    (tmp_path / "Annotations" / "b.xml").write_text(voc_xml())
    data = ready(tmp_path)
    assert data.class_names == ["background", "cat", "dog"]
    (_, first), (_, second) = whole(data)
    assert first["boxes"].tolist() == [[0, 0, 20, 10]], "VOC counts pixels from 1, the last included"
    assert first["labels"].tolist() == [1]
    assert second["boxes"].shape == (0, 4)
    truth = data.datasets["train"].coco()
    assert [(entry["category_id"], entry["iscrowd"], entry["area"]) for entry in truth["annotations"]] == [
        (1, 0, 200),
        (2, 1, 100),
    ], "difficult objects do not count, as in VOC's evaluation"
    with pytest.raises(DataError, match="come without masks"):
        ready(tmp_path, masks=True)
    with pytest.raises(DataError, match="there is no object in the 2 images of train"):
        ready(tmp_path, classes=["dog"])  # all of them difficult
    with pytest.raises(DataError, match="no object is a 'cow'; there are cat, dog"):
        ready(tmp_path, classes=["dog", "cow"])


def test_faults_of_voc_folders_are_reported(tmp_path):
    names = list("abcdefg")
    write_voc(tmp_path, {"train": [*names, "a"], "val": ["v"]})
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    (tmp_path / "Annotations" / "c.xml").unlink()
    (tmp_path / "Annotations" / "d.xml").write_text("<annotation>")
    (tmp_path / "Annotations" / "e.xml").write_text(voc_xml(("cat", 5, 5, 4, 9), ("", 1, 1, 9, 9)))
    (tmp_path / "Annotations" / "f.xml").write_text(voc_xml(("cat", "left", 5, 9, 9), ("cat", 1, 1, 90, 9)))
    (tmp_path / "JPEGImages" / "g.jpg").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        ready(tmp_path)
    for part in (
        "9 faults in 8 images",
        "image listed twice (1): a",
        "missing image (1)",
        "missing annotation (1)",
        "broken annotation (1)",
        "box without area (1): object 1 of e, [4.0, 4.0, 0.0, 5.0]",
        "object without a name (1): object 2 of e",
        "box that is not four numbers (1): object 1 of f",
        "box over the image's edge, cut there (1): object 2 of f",
        "image that cannot be read (1)",
    ):
        assert part in str(caught.value)


def test_voc_annotations_without_a_size_take_the_images(tmp_path):
    write_voc(tmp_path, {"train": ["a"], "val": ["v"]})
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace(f"<width>{WIDTH}</width>", ""))
    assert ready(tmp_path).datasets["train"].sizes == [(HEIGHT, WIDTH)]


# Augmentation


def write_rectangles(root):
    """Images that are white on their one object and black elsewhere."""
    entries = []
    write_coco(root, "train", 8, [])
    rng = np.random.default_rng(0)
    for i in range(1, 9):
        x0, y0, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(8, 30, 2)))
        x1, y1 = min(x0 + w, WIDTH), min(y0 + h, HEIGHT)
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[y0:y1, x0:x1] = 255
        Image.fromarray(pixels).save(root / "train" / f"train{i}.jpg", quality=100)
        entries.append(annotation(i, i, 3, (x0, y0, x1 - x0, y1 - y0), compressed(x0, y0, x1, y1), area=None))
    write_coco(root, "val", 1, [annotation(1, 1)])
    file = root / "annotations" / "instances_train.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": entries}))


@pytest.mark.parametrize("masks", [False, True])
def test_boxes_and_masks_move_with_the_pixels(tmp_path, masks):
    write_rectangles(tmp_path)
    options = {"crop_size": 48, "scale": (0.5, 2.0), "color_jitter": 0.0, "masks": masks}
    dataset = ready(tmp_path, **options).datasets["train"]
    cut = 0
    for epoch in range(4):
        for i in range(8):
            image, target = dataset[(epoch, i)]
            assert image.shape == (3, 48, 48)
            white = image.mean(0) > 0.75
            if not len(target["boxes"]):
                assert white.sum() < 60, "only slivers are dropped"
                continue
            x0, y0, x1, y1 = target["boxes"][0].tolist()
            rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
            seen = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
            assert [x0, y0, x1, y1] == pytest.approx(seen, abs=1.6)
            assert target["area"][0] == pytest.approx((x1 - x0) * (y1 - y0), rel=0.15, abs=12)
            cut += target["area"][0] < 0.8 * dataset.samples[i].areas[0]
            if masks:
                assert (target["masks"][0].bool() ^ white).float().mean() < 0.05
    assert cut, "some were cut by the crop or made smaller"


def test_objects_that_the_crop_leaves_out_are_dropped_whole(folder):
    dataset = ready(folder, masks=True, crop_size=16, scale=(2.0, 2.0)).datasets["train"]
    counts = set()
    for epoch in range(30):
        _, target = dataset[(epoch, 0)]
        boxes = target["boxes"]
        counts.add(len(boxes))
        assert {len(target[name]) for name in ("labels", "masks", "area", "iscrowd")} == {len(boxes)}
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert (boxes >= 0).all()
        assert (boxes <= 16).all()
        assert all(mask.any() for mask in target["masks"])
    assert counts == {1, 2}


def test_boxes_shrink_to_what_the_crop_left_of_a_mask():
    from torchvision import tv_tensors

    triangle = torch.ones(40, 40).triu().to(torch.uint8)[None]  # the crop below leaves only its corner
    target = {
        "boxes": tv_tensors.BoundingBoxes([[0.0, 0, 40, 40]], format="XYXY", canvas_size=(40, 40)),
        "masks": tv_tensors.Mask(triangle),
        "labels": torch.tensor([1]),
        "area": torch.tensor([1.0]),
        "iscrowd": torch.tensor([0]),
    }
    for seed in range(20):
        torch.manual_seed(seed)
        _, cut = detection_augmentation(20, (2.0, 2.0), flip=0.0, color_jitter=0.0)(
            tv_tensors.Image(torch.zeros(3, 40, 40, dtype=torch.uint8)), target
        )
        for box, mask in zip(cut["boxes"], cut["masks"], strict=True):
            y, x = mask.nonzero(as_tuple=True)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_augmentation_is_a_function_of_seed_epoch_and_index(folder):
    def batches(workers, seed=0, epoch=2):
        loader = ready(folder, num_workers=workers, seed=seed, masks=True).train_dataloader()
        loader.sampler.set_epoch(epoch)
        found = list(loader)
        boxes = [target["boxes"] for _, targets in found for target in targets]
        return torch.stack([image for images, _ in found for image in images]), torch.cat(boxes)

    expected = batches(0)
    torch.rand(7)  # whatever else draws random numbers
    assert all(a.equal(b) for a, b in zip(expected, batches(0), strict=True))
    assert all(a.equal(b) for a, b in zip(expected, batches(2), strict=True))
    assert not expected[0].equal(batches(0, seed=1)[0])
    assert not expected[0].equal(batches(0, epoch=3)[0])


def test_validation_images_are_as_they_are(folder):
    images, targets = next(iter(ready(folder, masks=True).val_dataloader()))
    assert [image.shape for image in images] == [(3, HEIGHT, WIDTH)] * 2
    assert [target["boxes"].tolist() for target in targets] == [[[10, 5, 30.5, 25.25]], []]


# Batches

SIZES = [(480, 640), (640, 480), (480, 640), (500, 500), (427, 640), (640, 427), (333, 500), (480, 640), (360, 640)]


def test_batches_hold_images_of_similar_shape():
    sizes = SIZES * 20
    batches = list(AspectRatioBatches(EpochSampler(len(sizes), seed=0), sizes, 4))
    assert len(batches) == len(sizes) // 4
    assert {len(batch) for batch in batches} == {4}
    indices = [index for batch in batches for _, index in batch]
    assert len(set(indices)) == len(sizes)

    def padding(batches):
        shapes = [[sizes[index] for _, index in batch] for batch in batches]
        padded = sum(len(shape) * max(h for h, _ in shape) * max(w for _, w in shape) for shape in shapes)
        return padded / sum(h * w for shape in shapes for h, w in shape) - 1

    keys = list(EpochSampler(len(sizes), seed=0))
    plain = padding([keys[i : i + 4] for i in range(0, len(keys), 4)])
    print(f"padding {padding(batches):.1%}, without grouping {plain:.1%}")
    assert padding(batches) < plain / 3


def test_leftovers_are_batched_by_shape_too():
    sizes = [(100, 100 * 2**i) for i in range(8)]  # no two of similar shape
    batches = list(AspectRatioBatches(EpochSampler(8, seed=0), sizes, 2))
    assert [[index for _, index in batch] for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_every_process_gets_equally_many_batches_of_an_epoch():
    shares = [list(AspectRatioBatches(EpochSampler(9, 0, rank, 2), SIZES, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2]
    assert len(list(AspectRatioBatches(EpochSampler(3, 0), SIZES[:3], 8))) == 1, "fewer images than a batch"


def test_lightning_carries_the_epoch_into_grouped_batches(folder):
    class Recorder(LightningModule):
        seen = ()

        def training_step(self, batch, batch_idx):
            self.seen += (torch.stack([image.mean() for image in batch[0]]),)

        def configure_optimizers(self):
            return None

    model, data = Recorder(), ready(folder, crop_size=None, color_jitter=0.5)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet()
    Trainer(max_epochs=2, limit_val_batches=0, enable_model_summary=False, **options).fit(model, data)
    assert len(model.seen) == 4
    assert not torch.cat(model.seen[:2]).sort()[0].equal(torch.cat(model.seen[2:]).sort()[0])
    images, _ = next(iter(data.train_dataloader()))
    assert all(image.shape == (3, HEIGHT, WIDTH) for image in images), "whole images"


# Shapes


def test_shapes_come_with_exact_boxes_and_masks():
    data = DetectionData(masks=True, shapes=ShapesOptions(size=64, train=6, val=3), batch_size=2)
    data.setup("fit")
    assert data.class_names == list(CLASSES)
    dataset = data.datasets["val"]
    image, target = dataset[1]
    scene = draw_scene((0, 1, 0, 1), 64)
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), scene.image)
    assert np.array_equal(target["masks"].numpy(), scene.masks)
    assert np.array_equal(target["boxes"].numpy(), scene.boxes)
    assert target["labels"].tolist() == scene.labels.tolist()
    truth = dataset.coco()
    assert [entry["id"] for entry in truth["images"]] == [dataset[i][1]["image_id"] for i in range(3)]
    entries = [entry for entry in truth["annotations"] if entry["image_id"] == target["image_id"]]
    assert [entry["area"] for entry in entries] == scene.masks.sum((1, 2)).tolist()
    assert len(list(data.train_dataloader())) == 3
    assert not data.datasets["train"][(0, 1)][0].equal(data.datasets["train"][(1, 1)][0]), "new ones in every epoch"


def test_torchvisions_detectors_train_on_batches(folder):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    data = ready(folder, masks=True, crop_size=64, batch_size=4)
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=data.num_classes, min_size=64, max_size=64
    )
    losses = model(*next(iter(data.train_dataloader())))
    assert all(loss.isfinite() for loss in losses.values())


# Real data


@pytest.mark.parametrize(
    ("name", "masks", "figures"),
    [
        ("coco_det", True, {"train": (128, 939), "val": (50, 382)}),
        ("bccd_coco", False, {"train": (291, 3908), "val": (73, 978)}),
    ],
)
def test_real_data_are_read_whole(shared_data, name, masks, figures):
    data = ready(shared_data / name, masks=masks)
    for split, (images, objects) in figures.items():
        truth = data.datasets[split].coco()
        assert (len(truth["images"]), len(truth["annotations"])) == (images, objects)
        assert len(data.datasets[split]) == images
        crowds = sum(entry["iscrowd"] for entry in truth["annotations"])
        trained = sum(len(sample.target()["labels"]) for sample in data.datasets[split].samples)
        assert trained == objects - crowds
        print(f"{name} {split}: {images} images, {objects} objects, {crowds} of them crowds")
