"""Annotations of objects: forms that are read right, faults that are repaired or named, splits that do not fit."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from backbones_tasks.data.detection import DetectionData
from backbones_tasks.data.folders import DataError

WIDTH, HEIGHT = 60, 40
CORNERS = {"train": [[6, 4, 30, 24]], "val": [[6, 4, 30, 24]]}
SQUARE = [6, 4, 30, 4, 30, 24, 6, 24]


def image(file, colour=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (colour, len(file.stem), ord(file.stem[-1]))).save(file)


def coco(root, change=lambda content: None, split="train"):
    """An image with one cat per split in COCO's format; `change` has the content of one split's file."""
    for name in ("train", "val"):
        image(root / name / f"{name}.jpg")
        content = {
            "images": [{"id": 1, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [6, 4, 24, 20], "segmentation": [SQUARE]}
            ],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        if name == split:
            change(content)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def in_first(part, **values):
    return lambda content: content[part][0].update(values)


def ready(root, **options):
    data = DetectionData(str(root), num_workers=0, batch_size=1, crop_size=None, flip=0.0, **options)
    data.setup("fit")
    return data


def boxes(data, split="train"):
    _, target = data.datasets[split][0]
    return target["boxes"].round(decimals=3).tolist()


# COCO


@pytest.mark.parametrize(
    "change",
    [
        in_first("images", width=60.0, height="40"),
        in_first("images", id="1"),
        in_first("annotations", image_id=1.0, category_id="1"),
        in_first("categories", id="1"),
        in_first("annotations", iscrowd="0"),
        in_first("annotations", iscrowd=False),
        in_first("annotations", area="large"),
        in_first("annotations", area=float("inf")),
    ],
)
def test_other_forms_of_the_same_are_read_right(tmp_path, change):
    data = ready(coco(tmp_path, change))
    assert boxes(data) == CORNERS["train"]
    assert data.datasets["train"].coco()["annotations"][0]["area"] == 480


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_first("images", width=60.5), r"image whose width is no whole number \(1\): train.jpg, 60.5"),
        (in_first("images", width=float("inf")), r"image whose width is no whole number \(1\): train.jpg, inf"),
        (in_first("images", height=None), r"image without a height \(1\): train.jpg"),
        (in_first("images", id=float("inf")), r"image whose id is no whole number \(1\): train.jpg, inf"),
        (in_first("images", file_name="../../x.jpg"), r"file name that leads out of the folder \(1\): ../../x.jpg"),
        (in_first("images", file_name="/etc/hostname"), r"file name that leads out of the folder \(1\): /etc/host"),
        (in_first("images", file_name="x" * 5000), r"missing image \(1\)"),
        (in_first("annotations", iscrowd="yes"), r"iscrowd that is neither 0 nor 1 \(1\): annotation 1 .*'yes'"),
        (in_first("annotations", bbox=[True, 4, 24, 20]), r"box that is not four numbers \(1\)"),
        (in_first("categories", id=float("inf")), r"categories need an id, a whole number.*inf"),
        (in_first("categories", name="Dog"), r"the classes 'Dog' and 'dog' are one, or are they"),
        (lambda content: content.update(annotations=[]), "there is no object in the 1 image of train"),
        (in_first("annotations", iscrowd="1"), "there is no object in the 1 image of train"),
    ],
)
def test_the_message_names_the_true_cause(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        ready(coco(tmp_path, change))


def test_links_in_the_data_folder_may_lead_elsewhere(tmp_path):
    """What is written in a file may not name what lies outside; what the user linked may be there."""
    root = coco(tmp_path / "data")
    (root / "train").rename(tmp_path / "elsewhere")
    (root / "train").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert boxes(ready(root)) == CORNERS["train"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_first("categories", name="Cat"), r"class that is spelt otherwise in training \(1\): 'Cat', there 'cat'"),
        (in_first("categories", name="cow"), r"class that is not among those to train \(1\): 'cow'"),
        (lambda content: content.update(annotations=[]), "no object in the 1 image of val"),
    ],
)
def test_validation_that_does_not_fit_training_is_told_before_it(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        ready(coco(tmp_path, change, "val"))


def test_classes_that_are_chosen_leave_out_those_of_validation_too(tmp_path):
    root = coco(tmp_path, lambda content: content["categories"].append({"id": 3, "name": "cow"}), "val")
    assert ready(root, classes=["cat"]).class_names == ["background", "cat"]


def test_no_object_in_what_is_held_out_is_told(tmp_path):
    root = coco(tmp_path)
    (root / "annotations" / "instances_val.json").unlink()
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for i in (2, 3):
        image(root / "train" / f"{i}.jpg")
        content["images"].append({**content["images"][0], "id": i, "file_name": f"{i}.jpg"})
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no object in the 1 image of val; another --data\.split_seed"):
        [ready(root, split_seed=seed) for seed in range(9)]


# Repairs


def test_clip_cuts_boxes_and_keeps_objects_whose_polygons_are_not_all_broken(tmp_path):
    def change(content):
        content["annotations"] = [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [40, 4, 22, 20],
                "segmentation": [[40, 4, 62, 4, 62, 24]],
            },
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [6, 4, 24, 20], "segmentation": [SQUARE, [1, 2]]},
        ]

    root = coco(tmp_path, change)
    report = (
        r"2 faults in 1 image with 2 objects\n"
        r"  box over the image's edge, cut there \(1\): annotation 1 of train.jpg, \[40, 4, 22, 20\]\n"
        r"  broken polygon among others, left out \(1\): annotation 2 of train.jpg, polygon of shape \[2\].*\n"
        r"2 repaired, 0 dropped; there are 2 images with 3 objects"
    )
    with pytest.warns(UserWarning, match=report):
        data = ready(root, masks=True)
    assert boxes(data) == [[40, 4, 60, 24], [6, 4, 30, 24]]
    masks = data.datasets["train"][0][1]["masks"]
    assert masks[1].sum() == 24 * 20
    with pytest.raises(DataError, match="2 faults"):
        ready(root, masks=True, faults="fatal")


def test_what_cannot_be_repaired_stops_clip_and_is_left_out_by_drop(tmp_path):
    def change(content):
        good = content["annotations"][0]
        content["annotations"] += [{**good, "id": 2, "bbox": [58, 4, 4, 20]}, {**good, "id": 3, "bbox": [70, 4, 4, 20]}]

    root = coco(tmp_path, change)
    with pytest.raises(
        DataError, match=r"box beyond the image \(1\): annotation 3(?s:.)*drop; 1 of them can be repaired"
    ):
        ready(root)
    with pytest.warns(UserWarning, match="1 repaired, 1 dropped; there are 2 images with 3 objects"):
        data = ready(root, faults="drop")
    assert boxes(data) == [*CORNERS["train"], [58, 4, 60, 24]]


def test_the_same_image_in_training_and_validation_is_told(tmp_path):
    root = coco(tmp_path)
    (root / "val" / "val.jpg").write_bytes((root / "train" / "train.jpg").read_bytes())
    with pytest.warns(UserWarning, match=r"1 image of train and val are the same.*train/train.jpg is .*val/val.jpg"):
        ready(root)


# VOC's XML, in its layout and beside the images


def xml(name="cat", size=f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>", head="<annotation>"):
    box = "<bndbox><xmin>7</xmin><ymin>5</ymin><xmax>30</xmax><ymax>24</ymax></bndbox>"
    return f"{head}{size}<object><name>{name}</name>{box}</object></annotation>"


def voc(root, lists=("a\n", "b\n"), **options):
    for name in "ab":
        image(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(xml(**options))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, lines in zip(("train", "val"), lists, strict=True):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return root


def flat(root, **options):
    for split in ("train", "val"):
        image(root / split / f"{split}.jpg")
        (root / split / f"{split}.xml").write_text(xml(**options))
    return root


@pytest.mark.parametrize("write", [voc, flat])
def test_an_xml_namespace_says_nothing(tmp_path, write):
    assert boxes(ready(write(tmp_path, head='<annotation xmlns="http://example.org/a">'))) == CORNERS["train"]


@pytest.mark.parametrize("line", ["a", "a.jpg", "JPEGImages/a.jpg", "a 1", "a  -1", "\ufeffa", "\n\na\r"])
def test_lines_of_a_list_name_their_image(tmp_path, line):
    assert boxes(ready(voc(tmp_path, (f"{line}\n", "b\n")))) == CORNERS["train"]


def test_a_bad_line_is_quoted(tmp_path):
    with pytest.raises(DataError, match=r"train.txt: 1 fault (?s:.)*missing image \(1\): JPEGImages/see the readme"):
        ready(voc(tmp_path, ("a\nsee the readme\n", "b\n")))
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"train.txt: is no text in UTF-8"):
        ready(tmp_path)


def test_names_of_voc_that_differ_in_case_are_one_class_or_an_error(tmp_path):
    root = voc(tmp_path)
    (root / "Annotations" / "b.xml").write_text(xml("Cat"))
    with pytest.raises(DataError, match="the classes 'Cat' and 'cat' are one, or are they"):
        ready(root)


def test_labelimgs_flat_folder_is_read(tmp_path):
    data = ready(flat(tmp_path / "split"))
    assert (data.class_names, boxes(data), boxes(data, "val")) == (["background", "cat"], *CORNERS.values())
    for i in range(4):
        image(tmp_path / "one" / f"{i}.jpg")
        (tmp_path / "one" / f"{i}.xml").write_text(xml())
    assert Counter({split: len(d) for split, d in ready(tmp_path / "one").datasets.items()}) == {"train": 3, "val": 1}
    (tmp_path / "one" / "4.xml").write_text(xml())
    image(tmp_path / "one" / "5.jpg")
    with pytest.raises(
        DataError, match=r"annotation without an image \(1\): 4.xml(?s:.)*missing annotation \(1\): 5.xml"
    ):
        ready(tmp_path / "one")


# YOLO


def yolo(root, names="[cat, dog]", line="0 .3 .35 .4 .5", more=""):
    for split in ("train", "val"):
        image(root / "images" / split / f"{split}.jpg")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / f"{split}.txt").write_text(f"{line}\n")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n{more}")
    return root


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}"])
def test_yolos_folder_is_read(tmp_path, names):
    data = ready(yolo(tmp_path, names, more="nc: 2\n"))
    assert (data.class_names, boxes(data), boxes(data, "val")) == (["background", "cat", "dog"], *CORNERS.values())


def test_yolos_polygons_are_masks(tmp_path):
    shares = " ".join(str(value / side) for value, side in zip(SQUARE, [WIDTH, HEIGHT] * 4, strict=True))
    data = ready(yolo(tmp_path, line=f"1 {shares}"), masks=True)
    _, target = data.datasets["train"][0]
    assert target["labels"].tolist() == [2]
    assert torch.allclose(target["boxes"], torch.tensor(CORNERS["train"], dtype=torch.float32), atol=1e-4)
    assert np.array_equal(np.argwhere(target["masks"][0].numpy())[[0, -1]], [[4, 6], [23, 29]])


def test_an_image_without_a_label_file_has_no_object_which_is_told(tmp_path):
    root = yolo(tmp_path)
    image(root / "images/train/second.jpg")
    with pytest.warns(UserWarning, match=r"1 of 2 images of train have no label file.*images/train/second.jpg"):
        data = ready(root)
    assert len(data.datasets["train"][0][1]["boxes"]) == 0
    (root / "labels/train/train.txt").unlink()
    with pytest.raises(DataError, match=r"no image of train has labels; the first would be .*labels/train/second.txt"):
        ready(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 .1 .1", r"unknown class \(1\): labels/train/train.txt, line 1, 2; data.yaml names 0 to 1"),
        ("0 30 20 9 9", r"coordinates that are no shares of the image \(1\): labels/train/train.txt, line 1.*pixels"),
        ("0 .5 .5 .1", r"line of neither a box nor a polygon \(1\): labels/train/train.txt, line 1"),
        ("cat .5 .5 .1 .1", r"line that is not numbers \(1\): labels/train/train.txt, line 1, 'cat"),
        ("0 .5 .5 nan .1", r"coordinates that are no shares"),
    ],
)
def test_faults_of_yolos_labels_are_named_with_their_line(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        ready(yolo(tmp_path, line=line))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [cat", "is no YAML"),
        ("names: !!python/object/apply:os.getcwd []", "is no YAML"),
        ("- cat", 'expected YOLO\'s "names"'),
        ("train: images/train\nval: images/val\nnames: 2", '"names" is to be a list'),
        ("train: images/train\nval: images/val\nnames: [a]\nnc: 2", "nc is 2, but 1 classes are named"),
        ("names: [cat, dog]", "names no images"),
        ("train: images/other\nnames: [cat, dog]", "train: images/other is not there"),
        ("train: /etc\nnames: [cat, dog]", "train: /etc leads out of the folder"),
    ],
)
def test_a_data_yaml_that_cannot_be_is_named(tmp_path, content, message):
    (yolo(tmp_path) / "data.yaml").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        ready(tmp_path)
    assert "data.yaml" in str(caught.value)
