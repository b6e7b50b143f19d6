"""Folders as ADE20K, Cityscapes and Pascal VOC publish them."""

import json

import numpy as np
import pytest
from PIL import Image

from backbones_tasks.data.folders import DataError
from backbones_tasks.data.layouts import ADE20K_CLASSES, CITYSCAPES_CLASSES, LAYOUTS, find_layout
from backbones_tasks.data.segmentation import SegmentationData

RNG = np.random.default_rng(0)


def image(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(file)


def mask(file, *values):
    """A mask, 8 x 6, whose first pixels have these values, and the rest the last of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(48, values[-1], dtype=np.uint8)
    pixels[: len(values)] = values
    Image.fromarray(pixels.reshape(6, 8)).save(file)


def ade20k(root):
    """ADEChallengeData2016: 0 is unlabelled, 1 is wall, 150 is flag."""
    for folder, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            image(root / "images" / folder / f"ADE_{folder}_{i:08}.jpg")
            mask(root / "annotations" / folder / f"ADE_{folder}_{i:08}.png", 0, 1, 150, 13)
    (root / "objectInfo150.txt").write_text("Idx Ratio Train Val Stuff Name\n")
    (root / "sceneCategories.txt").write_text("")


def cityscapes(root, kind="labelIds", values=(0, 7, 33, 24, 5)):
    """leftImg8bit and gtFine: folders of cities; polygons and pictures of the labels lie beside the labels."""
    for split, cities in (("train", ["aachen", "ulm"]), ("val", ["munster"]), ("test", ["berlin"])):
        for city in cities:
            stem = f"{city}_000000_000019"
            image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
            folder = root / "gtFine" / split / city
            for other in ("labelIds", "instanceIds", "color"):
                mask(folder / f"{stem}_gtFine_{other}.png", *values) if other == kind else mask(
                    folder / f"{stem}_gtFine_{other}.png", 99
                )
            if kind == "labelTrainIds":
                mask(folder / f"{stem}_gtFine_{kind}.png", *values)
            (folder / f"{stem}_gtFine_polygons.json").write_text("{}")


def voc(root):
    """VOC2012: lists name some of the images; masks are palette images, 255 the rim of objects."""
    names = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"], "test": []}
    for name in (*names["train"], *names["val"], "2008_000001"):
        image(root / "JPEGImages" / f"{name}.jpg")
    for name in (*names["train"], *names["val"]):
        file = root / "SegmentationClass" / f"{name}.png"
        mask(file, 0, 15, 20, 255, 0)
        palette = Image.open(file).convert("P")
        palette.putpalette([0, 0, 0, 128, 0, 0] * 128)
        palette.save(file)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("\n".join(names[split]) + "\n")
    (root / "Annotations").mkdir()


def ready(root, **options):
    data = SegmentationData(str(root), num_workers=0, crop_size=32, **options)
    data.setup("fit")
    return data


def first(data, count):
    """The first labels of the first validation mask."""
    return data.datasets["val"][0][1].flatten()[:count].tolist()


def lengths(data):
    return {split: len(dataset) for split, dataset in data.datasets.items()}


@pytest.mark.parametrize("inside", [".", "ADEChallengeData2016"])
def test_ade20k(tmp_path, inside):
    ade20k(tmp_path / inside)
    data = ready(tmp_path)
    assert data.layout.name == "ade20k"
    assert lengths(data) == {"train": 3, "val": 2}
    assert (data.num_classes, data.class_names[0], data.class_names[149]) == (150, "wall", "flag")
    assert first(data, 4) == [255, 0, 149, 12]
    assert data.class_names[12] == "person"
    with pytest.raises(DataError, match="has no masks to test on"):
        data.setup("test")


@pytest.mark.parametrize(
    ("kind", "values", "labels"),
    [
        ("labelIds", (0, 7, 33, 24, 5), [255, 0, 18, 11, 255]),
        ("labelTrainIds", (255, 0, 18, 11, 255), [255, 0, 18, 11, 255]),
    ],
)
def test_cityscapes(tmp_path, kind, values, labels):
    cityscapes(tmp_path, kind, values)
    data = ready(tmp_path)
    assert data.layout.name == "cityscapes"
    assert lengths(data) == {"train": 2, "val": 1}
    assert data.num_classes == 19
    assert [data.class_names[i] for i in (0, 11, 18)] == ["road", "person", "bicycle"]
    assert first(data, 5) == labels
    with pytest.raises(DataError, match="has no masks to test on"):
        data.setup("test")


@pytest.mark.parametrize("inside", [".", "VOCdevkit/VOC2012"])
def test_pascal_voc(tmp_path, inside):
    voc(tmp_path / inside)
    data = ready(tmp_path)
    assert data.layout.name == "voc"
    assert lengths(data) == {"train": 2, "val": 1}
    assert [data.class_names[i] for i in (0, 15, 20)] == ["background", "person", "tvmonitor"]
    assert first(data, 5) == [0, 15, 20, 255, 0]


def test_class_names_of_the_layouts_are_whole():
    names = [name.strip() for name in ADE20K_CLASSES.split(",")]
    assert len(names) == len(set(names)) == 150
    assert [names[i] for i in (20, 80, 125)] == ["car", "bus", "pot"]
    assert len(CITYSCAPES_CLASSES) == 19
    assert list(CITYSCAPES_CLASSES.values()) == sorted(CITYSCAPES_CLASSES.values())


def test_own_classes_go_before_the_published_ones(tmp_path):
    voc(tmp_path)
    names = [f"thing {i}" for i in range(21)]
    assert ready(tmp_path, classes=names, ignore_index=255).class_names == names
    data = ready(tmp_path, ignore_index=0)
    assert data.class_names[0] == "aeroplane"
    assert first(data, 4) == [255, 14, 19, 255]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": names, "ignore_index": 255}))
    assert ready(tmp_path).class_names == names


def test_the_layout_can_be_told(tmp_path):
    voc(tmp_path)
    cityscapes(tmp_path)
    assert ready(tmp_path, layout="voc").num_classes == 21
    assert ready(tmp_path, layout="cityscapes").num_classes == 19
    with pytest.raises(DataError, match=r"Accepted are:\n  ade20k: images/.*training"):
        ready(tmp_path, layout="ade20k")


def test_a_folder_of_no_known_layout_says_what_is_accepted(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError) as caught:
        find_layout(tmp_path)
    assert all(f"{kind.name}: {kind.holds}" in str(caught.value) for kind in LAYOUTS)
    with pytest.raises(DataError, match="no such folder"):
        find_layout(tmp_path / "none")


def test_files_without_a_partner_are_named(tmp_path):
    voc(tmp_path / "voc")
    (tmp_path / "voc/SegmentationClass/2007_000033.png").unlink()
    with pytest.raises(DataError, match=r"ImageSets/Segmentation/val\.txt: 2007_000033 is not in SegmentationClass"):
        ready(tmp_path / "voc")
    cityscapes(tmp_path / "city")
    (tmp_path / "city/gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"has no mask gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds\.png"):
        ready(tmp_path / "city")


def test_unknown_values_are_named(tmp_path):
    ade20k(tmp_path)
    mask(tmp_path / "annotations/validation/ADE_validation_00000000.png", 0, 151)
    with pytest.raises(DataError, match=r"unknown class value 151; known are 1-150, ignored are 0, 255"):
        ready(tmp_path)


def test_without_validation_images_some_are_held_out(tmp_path):
    ade20k(tmp_path)
    for kind in ("images", "annotations"):
        (tmp_path / kind / "validation").rename(tmp_path / kind / "unused")
    data = ready(tmp_path, val_fraction=0.34)
    assert lengths(data) == {"train": 2, "val": 1}
    assert not set(data.datasets["train"].pairs) & set(data.datasets["val"].pairs)
