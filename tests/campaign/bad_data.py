"""Small good data sets of five formats, and single faults to plant in them: what `test_data.py` runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from backbones_tasks.data.classification import ClassificationData
from backbones_tasks.data.detection import DetectionData
from backbones_tasks.data.segmentation import SegmentationData

WIDTH, HEIGHT = 32, 24
SPLITS = {"train": ["a", "b", "c", "d"], "val": ["e", "f"]}
NAMES = ["cat", "dog"]
BOX = (4.0, 3.0, 12.0, 10.0)  # x, y, width, height
POLYGON = [4, 3, 16, 3, 16, 13, 4, 13]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: how it is planted, and what an error or a warning has to say of it, as a pattern."""

    layout: str
    name: str
    plant: Callable[[Path], object]
    says: str
    options: tuple = ()


# Good data


def pixels(name: str) -> np.ndarray:
    return np.random.default_rng(ord(name)).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(pixels(name)).save(folder / f"{name}.png")


def write_masks(root: Path) -> None:
    for split, names in SPLITS.items():
        write_images(root / "images" / split, names)
        (root / "labels" / split).mkdir(parents=True)
        for name in names:
            mask = (pixels(name)[..., 0] // 86).astype(np.uint8)  # 0, 1, 2
            Image.fromarray(mask).save(root / "labels" / split / f"{name}.png")
    write_json(root / "classes.json", {"classes": ["sky", "road", "car"]})


def write_coco(root: Path) -> None:
    for split, names in SPLITS.items():
        write_images(root / split, names)
        images = [{"id": i, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for i, n in enumerate(names, 1)]
        entries = [
            {
                "id": 2 * i + j,
                "image_id": i,
                "category_id": j + 1,
                "bbox": [BOX[0] + j, BOX[1] + j, *BOX[2:]],
                "area": 120.0,
                "iscrowd": 0,
                "segmentation": [[value + j for value in POLYGON]],
            }
            for i in range(1, len(names) + 1)
            for j in (0, 1)
        ]
        categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
        write_json(
            root / "annotations" / f"instances_{split}.json",
            {"images": images, "annotations": entries, "categories": categories},
        )


def write_voc(root: Path) -> None:
    for split, names in SPLITS.items():
        write_images(root / "JPEGImages", names)
        for name in names:
            write_xml(root / "Annotations" / f"{name}.xml")
        file = root / "ImageSets" / "Main" / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name}\n" for name in names))


def write_flat(root: Path) -> None:
    for split, names in SPLITS.items():
        write_images(root / split, names)
        for name in names:
            write_xml(root / split / f"{name}.xml")


def write_yolo(root: Path) -> None:
    for split, names in SPLITS.items():
        write_images(root / "images" / split, names)
        (root / "labels" / split).mkdir(parents=True)
        for name in names:
            lines = []
            for label in (0, 1):
                x, y, w, h = BOX[0] + label, BOX[1] + label, *BOX[2:]
                box = ((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT)
                lines.append(" ".join(map(str, (label, *box))))
            (root / "labels" / split / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 2\nnames: [cat, dog]\n")


def write_classes(root: Path) -> None:
    for split, names in SPLITS.items():
        for i, name in enumerate(names):
            write_images(root / split / NAMES[i % 2], [name])


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_xml(file: Path) -> None:
    root = ElementTree.Element("annotation")
    size = ElementTree.SubElement(root, "size")
    for side, value in {"width": WIDTH, "height": HEIGHT, "depth": 3}.items():
        ElementTree.SubElement(size, side).text = str(value)
    for i, name in enumerate(NAMES):
        thing = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(thing, "name").text = name
        ElementTree.SubElement(thing, "difficult").text = "0"
        box = ElementTree.SubElement(thing, "bndbox")
        x, y, w, h = BOX[0] + i, BOX[1] + i, *BOX[2:]
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True):
            ElementTree.SubElement(box, side).text = str(int(value))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(ElementTree.tostring(root, encoding="unicode"))


WRITERS = {
    "masks": write_masks,
    "coco": write_coco,
    "voc": write_voc,
    "labelimg": write_flat,
    "yolo": write_yolo,
    "classes": write_classes,
}
#: The folder of the training images of each format, and the first of them.
IMAGES = {
    "masks": "images/train",
    "coco": "train",
    "voc": "JPEGImages",
    "labelimg": "train",
    "yolo": "images/train",
    "classes": "train/cat",
}


def load(layout: str, root: Path, **options) -> dict[str, tuple[torch.Tensor, object]]:
    """Every image of a data set with its truth, by split and name, as training and validation see them."""
    options = {"num_workers": 0, "batch_size": 2, **options}
    if layout == "masks":
        data = SegmentationData(str(root), crop_size=16, **options)
    elif layout == "classes":
        data = ClassificationData(str(root), image_size=HEIGHT, crop=1.0, **options)
    else:
        data = DetectionData(str(root), crop_size=None, masks=layout == "coco", **options)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    found = {}
    for split, dataset in data.datasets.items():
        if layout == "classes":
            dataset.seed, dataset.transform = None, lambda image: image
        else:
            dataset.augment = None
        for i, file in enumerate(dataset.files):
            image, truth = dataset[i]
            if isinstance(truth, dict):
                truth = {name: truth[name] for name in ("boxes", "labels", "masks", "iscrowd") if name in truth}
                order = torch.argsort(truth["labels"], stable=True)
                truth = {name: value[order] for name, value in truth.items()}
            found[f"{split}/{file.stem}"] = (image, truth)
    return found


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.shape == other.shape
            and bool(torch.isclose(one.float(), other.float(), atol=1e-3).all())
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


# Faults of images, in every format


def first(layout: str) -> str:
    return f"{IMAGES[layout]}/a.png"


def resaved(change: Callable[[np.ndarray], Image.Image], suffix: str = ".png", **options) -> Callable[[Path], None]:
    def plant(file: Path) -> None:
        image = change(np.asarray(Image.open(file)))
        if suffix != file.suffix:
            file.unlink()
        image.save(file.with_suffix(suffix), **options)

    return plant


def array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def plant(file: Path) -> None:
        values = change(np.asarray(Image.open(file)))
        file.unlink()
        np.save(file.with_suffix(".npy"), values, allow_pickle=True)

    return plant


def turned(tag: int) -> Callable[[Path], None]:
    """The image on its side, and the EXIF orientation that tells it."""
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[tag]

    def plant(file: Path) -> None:
        image = Image.open(file).convert("RGB").transpose(back)
        exif = Image.Exif()
        exif[0x0112] = tag
        image.save(file, exif=exif)

    return plant


def tiff(values: Callable[[np.ndarray], np.ndarray], **profile) -> Callable[[Path], None]:
    def plant(file: Path) -> None:
        import rasterio

        bands = values(np.asarray(Image.open(file)))
        file.unlink()
        count, height, width = bands.shape
        options = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype, **profile}
        with rasterio.open(file.with_suffix(".tif"), "w", **options) as dataset:
            dataset.write(bands)

    return plant


def translucent(values: np.ndarray) -> Image.Image:
    alpha = np.full((*values.shape[:2], 1), 255, np.uint8)
    alpha[:4] = 9
    return Image.fromarray(np.concatenate([values, alpha], axis=-1))


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    values[0, 0] = np.nan
    return values


def animated(file: Path) -> None:
    frames = [Image.fromarray(pixels(name)) for name in "az"]
    frames[0].save(file, save_all=True, append_images=frames[1:])


def linked_folder(root: Path, folder: str) -> None:
    elsewhere = root.with_name(f"{root.name}_stored")
    shutil.move(root / folder, elsewhere)
    (root / folder).symlink_to(elsewhere, target_is_directory=True)


IMAGE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda f: f.write_bytes(b""), "a.png"),
    "text for an image": (lambda f: f.write_text("<html>404</html>"), "a.png"),
    "cut off": (lambda f: f.write_bytes(f.read_bytes()[:900]), "a.png"),
    "a flipped byte": (lambda f: f.write_bytes(f.read_bytes()[:500] + b"\xff\xff" + f.read_bytes()[502:]), "a.png"),
    "gone": (lambda f: f.unlink(), r"\ba\b"),
    "a folder instead": (lambda f: (f.unlink(), f.mkdir()), r"\ba\b"),
    "a broken link": (lambda f: (f.unlink(), f.symlink_to("nowhere.png")), r"\ba\b"),
    "16 bits, grey": (resaved(lambda v: Image.fromarray(v[..., 0].astype(np.uint16) * 16)), r"a\.png.*uint16.*range"),
    "12 bits in an RGB TIFF": (
        tiff(lambda v: np.moveaxis(v.astype(np.uint16) * 16, 2, 0)),
        r"a(\.tif.*uint16.*range|\.png)",
    ),
    "float TIFF from 0 to 1": (
        resaved(lambda v: Image.fromarray(v[..., 0].astype(np.float32) / 255), ".tif"),
        r"a(\.tif.*float32.*range|\.png)",
    ),
    "NaN in an array": (array(with_nan), r"a(\.npy.*float32|\.png)"),
    "four bands": (
        tiff(lambda v: np.moveaxis(v, 2, 0)[[0, 1, 2, 0]], photometric="MINISBLACK"),
        r"a(\.tif.*4 bands|\.png)",
    ),
    "two bands": (tiff(lambda v: np.moveaxis(v, 2, 0)[:2], photometric="MINISBLACK"), r"a(\.tif.*2 bands|\.png)"),
    "transparent": (resaved(translucent), r"a\.png.*transparent"),
    "opaque alpha": (resaved(lambda v: Image.fromarray(v).convert("RGBA")), "never"),
    "animated": (animated, r"a\.png.*2 images"),
    "bands first": (array(lambda v: np.moveaxis(v, 2, 0)), r"a(\.npy.*bands|\.png)"),
    "an array of objects": (array(lambda v: np.array([{"x": 1}], dtype=object)), r"a(\.npy|\.png)"),
    "other size": (resaved(lambda v: Image.fromarray(v[:-2])), r"a\.png"),
    "on its side, by EXIF": (turned(6), r"a\.png|EXIF"),
    "upside down, by EXIF": (turned(3), r"a\.png|EXIF"),
}


# Where nothing lists the images, one may be gone; where no size is told, any is right.
NO_FAULT = {"classes": ("gone", "a folder instead", "other size"), "yolo": ("other size",)}


def image_faults() -> list[Fault]:
    faults = []
    for layout in WRITERS:
        for name, (plant, says) in IMAGE_FAULTS.items():
            if name in NO_FAULT.get(layout, ()):
                continue
            faults.append(Fault(layout, f"image: {name}", lambda root, p=plant, w=layout: p(root / first(w)), says))
        folder = IMAGES[layout]
        for name, says in {
            ".hidden.png": "hidden",
            "._a.png": r"\._a",
            "Thumbs.db": "Thumbs",
            "x.gif": r"x\.gif",
        }.items():
            faults.append(
                Fault(layout, f"beside: {name}", lambda root, n=name, f=folder: (root / f / n).write_bytes(b"x"), says)
            )
        faults.append(
            Fault(
                layout,
                "beside: .ipynb_checkpoints",
                lambda root, f=folder: write_images(root / f / ".ipynb_checkpoints", ["a", "x"]),
                "ipynb",
            )
        )
        faults.append(Fault(layout, "a link to the folder", lambda root, f=folder: linked_folder(root, f), "never"))
    return faults


# Faults of masks and their classes


def mask(change: Callable[[np.ndarray], np.ndarray | Image.Image], every: bool = False, suffix: str = ".png"):
    def plant(root: Path) -> None:
        for file in sorted((root / "labels").rglob("*.png")) if every else [root / "labels/train/a.png"]:
            changed = change(np.asarray(Image.open(file)))
            if suffix != ".png":
                file.unlink()
            if suffix == ".npy":
                np.save(file.with_suffix(suffix), changed)
            else:
                picture = changed if isinstance(changed, Image.Image) else Image.fromarray(changed)
                picture.save(file.with_suffix(suffix))

    return plant


def classes_file(content: object, then: Callable[[Path], object] = lambda root: None):
    def plant(root: Path) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "classes.json").write_text(text)
        then(root)

    return plant


def value(at: int, number: int):
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[:at] = number
        return values

    return change


COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
THREE = ["sky", "road", "car"]


def mask_faults() -> list[Fault]:
    spread = mask(lambda v: v * 100, every=True)
    coloured = mask(lambda v: COLOURS[v], every=True)
    share = r"labels/train/a\.png.*%"
    rows = [
        ("one value too many", mask(value(2, 3)), share),
        ("255 without a rule", mask(value(2, 255)), r"a\.png.*255.*%.*ignore_index"),
        ("255 as the data set says", classes_file({"classes": THREE, "ignore_index": 255}), "never"),
        ("all is ignored", classes_file({"classes": THREE, "ignore_index": [0, 1, 2]}), "ignored"),
        (
            "0 and 255 for two classes",
            classes_file({"classes": ["no", "yes"]}, mask(lambda v: (v > 0) * np.uint8(255), every=True)),
            r"values.*0, 255",
        ),
        ("0, 100, 200 without a rule", spread, r"values.*0, 100, 200"),
        ("0, 100, 200 by values", classes_file({"classes": THREE, "values": [0, 100, 200]}, spread), "never"),
        ("colours without a rule", coloured, r"a\.png.*RGB.*colours"),
        ("colours by rule", classes_file({"classes": THREE, "colours": COLOURS.tolist()}, coloured), "never"),
        (
            "a colour that no rule covers",
            classes_file({"classes": THREE[:2], "colours": COLOURS[:2].tolist()}, coloured),
            r"0, 0, 255.*%",
        ),
        (
            "a palette, by colours",
            classes_file({"classes": THREE, "colours": COLOURS.tolist()}, mask(lambda v: palette_mask(v), every=True)),
            "never",
        ),
        ("a palette, by indices", mask(lambda v: palette_mask(v), every=True), "never"),
        ("colours that are none", classes_file({"classes": THREE, "colours": [[0, 0], [1, 1], [2, 2]]}), "colour"),
        ("values of another number", classes_file({"classes": THREE, "values": [0, 1]}), "classes.json.*values"),
        ("one value twice", classes_file({"classes": THREE, "values": [0, 1, 1]}), "1 stands for two"),
        (
            "values and colours",
            classes_file({"classes": THREE, "values": [0, 1, 2], "colours": COLOURS.tolist()}),
            "not both",
        ),
        ("an unknown key", classes_file({"classes": THREE, "palette": []}), "palette is unknown"),
        ("a name twice", classes_file({"classes": ["sky", "sky", "car"]}), "two classes are called 'sky'"),
        ("a string of classes", classes_file({"classes": "abc"}), "list of names"),
        ("numbers for names", classes_file({"classes": [1, 2, 3]}), "classes"),
        ("an empty name", classes_file({"classes": ["sky", "", "car"]}), "classes"),
        ("no name", classes_file({"classes": []}), "classes"),
        ("too few names", classes_file({"classes": THREE[:2]}), share),
        ("classes.json cut off", classes_file('{"classes": ["sky"'), "classes.json"),
        ("classes.json of another kind", classes_file([1]), "classes.json"),
        ("no classes.json", lambda root: (root / "classes.json").unlink(), "classes.json.*0-2"),
        ("a JPEG mask", mask(lambda v: Image.fromarray(v), suffix=".jpg"), r"labels/train/a\.jpg.*loss"),
        ("an RGB mask", mask(lambda v: Image.fromarray(v).convert("RGB")), r"a\.png.*RGB"),
        (
            "a transparent mask",
            classes_file(
                {"classes": THREE, "colours": COLOURS.tolist()},
                lambda root: [mask(lambda v: COLOURS[v], every=True)(root), mask(lambda v: translucent(v))(root)],
            ),
            r"a\.png.*transparent",
        ),
        ("a mask of halves", mask(lambda v: v.astype(np.float32) / 2, suffix=".tif"), r"a\.tif.*whole"),
        ("a mask in floats", mask(lambda v: v.astype(np.float32), suffix=".tif"), "never"),
        ("a 16-bit mask", mask(lambda v: v.astype(np.uint16)), "never"),
        ("a mask as an array", mask(lambda v: v.astype(np.int64), suffix=".npy"), "never"),
        ("a mask of three axes", mask(lambda v: v[None], suffix=".npy"), r"a\.npy.*shape"),
        ("a negative value", mask(lambda v: value(2, -1)(v.astype(np.int64)), suffix=".npy"), r"a\.npy.*-1"),
        ("an empty mask file", lambda root: (root / "labels/train/a.png").write_bytes(b""), r"labels/train/a\.png"),
        ("a mask gone", lambda root: (root / "labels/train/a.png").unlink(), r"images/train/a\.png: has no mask"),
        (
            "a mask without an image",
            lambda root: shutil.copy(root / "labels/train/a.png", root / "labels/train/z.png"),
            r"labels/train/z\.png: has no image",
        ),
        (
            "two masks of one name",
            lambda root: shutil.copy(root / "labels/train/a.png", root / "labels/train/a.tif"),
            "same name",
        ),
        (
            "two images of one name",
            lambda root: shutil.copy(root / "images/train/a.png", root / "images/train/a.bmp"),
            "same name",
        ),
        ("a mask of another size", mask(lambda v: v[:-3]), r"labels/train/a\.png: is 32 x 21"),
        ("masks and labels", lambda root: shutil.copytree(root / "labels", root / "masks"), "labels.*masks"),
        (
            "an image in both splits",
            lambda root: [
                shutil.copy(root / f"{k}/train/a.png", root / f"{k}/val/e.png") for k in ("images", "labels")
            ],
            "same",
        ),
        (
            "valid for val",
            lambda root: [(root / k / "val").rename(root / k / "valid") for k in ("images", "labels")],
            "never",
        ),
        (
            "val and valid",
            lambda root: [shutil.copytree(root / k / "val", root / k / "valid") for k in ("images", "labels")],
            "valid",
        ),
        ("no training images", lambda root: [shutil.rmtree(root / k / "train") for k in ("images", "labels")], "train"),
        ("no validation masks", lambda root: shutil.rmtree(root / "labels/val"), "has no mask"),
        ("one class of value 0", classes_file({"classes": ["thing"], "values": [0]}), "only class"),
    ]
    return [Fault("masks", name, plant, says) for name, plant, says in rows]


def palette_mask(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values).convert("P")
    image.putpalette(COLOURS.ravel().tolist())
    return image


# Faults of annotations


def in_json(change: Callable[[dict], object], split: str = "train") -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        file = root / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return plant


def image_entry(**values):
    return in_json(lambda content: content["images"][0].update(values))


def entry(**values):
    return in_json(lambda content: content["annotations"][0].update(values))


def without(part: str, key: str):
    return in_json(lambda content: content[part][0].pop(key))


def coco_faults() -> list[Fault]:
    train = "instances_train.json"
    told = r"annotation 2 of a\.png"
    rows = [
        ("ids as strings", in_json(lambda c: [i.update(id=str(i["id"])) for i in c["images"]]), "never"),
        (
            "ids as floats",
            in_json(lambda c: [a.update(image_id=float(a["image_id"])) for a in c["annotations"]]),
            "never",
        ),
        (
            "category ids as strings",
            in_json(lambda c: [a.update(category_id=str(a["category_id"])) for a in c["annotations"]]),
            "never",
        ),
        ("width 32.0", image_entry(width=32.0), "never"),
        ("width '32'", image_entry(width="32"), "never"),
        ("width 32.5", image_entry(width=32.5), r"width.*a\.png, 32.5"),
        ("width infinite", image_entry(width=float("inf")), r"width.*a\.png, inf"),
        ("width NaN", image_entry(width=float("nan")), r"width.*a\.png, nan"),
        ("width 0", image_entry(width=0), r"width.*a\.png, 0"),
        ("width null", image_entry(width=None), r"without a width.*a\.png"),
        ("width and height swapped", image_entry(width=24, height=32), r"a\.png is 32 x 24"),
        ("no width", without("images", "width"), r"without a width.*a\.png"),
        ("no file name", without("images", "file_name"), "without a file name"),
        ("a file name that is a number", image_entry(file_name=7), "without a file name"),
        ("a file name out of the root", image_entry(file_name="../../a.png"), r"leads out.*\.\./\.\./a\.png"),
        ("an absolute file name", image_entry(file_name="/etc/hostname"), "leads out.*/etc/hostname"),
        ("a very long file name", image_entry(file_name="x" * 5000), "missing image"),
        ("a file name of another case", image_entry(file_name="A.png"), r"missing image.*A\.png"),
        ("an image id twice", image_entry(id=2), "image id used twice|not listed"),
        ("an image id of letters", image_entry(id="first"), "image whose id is no whole number.*first|not listed"),
        ("an image id that is true", image_entry(id=True), "id is no whole number"),
        ("no image id", without("images", "id"), "without an id"),
        ("an image entry that is null", in_json(lambda c: c["images"].append(None)), "image entry that is no object"),
        ("iscrowd '0'", in_json(lambda c: [a.update(iscrowd="0") for a in c["annotations"]]), "never"),
        ("iscrowd false", entry(iscrowd=False), "never"),
        ("iscrowd null", entry(iscrowd=None), "never"),
        ("iscrowd 'no'", entry(iscrowd="no"), f"iscrowd.*{told}"),
        ("iscrowd 2", entry(iscrowd=2), f"iscrowd.*{told}"),
        ("iscrowd a list", entry(iscrowd=[0]), f"iscrowd.*{told}"),
        ("a box 2 pixels over the edge", entry(bbox=[22, 3, 12, 10]), f"edge.*{told}"),
        ("a box outside", entry(bbox=[40, 3, 12, 10]), f"beyond.*{told}"),
        ("a box without area", entry(bbox=[4, 3, 0, 10]), f"without area.*{told}"),
        ("a box of three numbers", entry(bbox=[4, 3, 12]), f"four numbers.*{told}"),
        ("a box of strings", entry(bbox=["4", "3", "12", "10"]), f"four numbers.*{told}"),
        ("a box of corners as a dict", entry(bbox={"x": 4}), f"four numbers.*{told}"),
        ("a box with NaN", entry(bbox=[float("nan"), 3, 12, 10]), f"finite.*{told}"),
        ("a box with infinity", entry(bbox=[4, 3, float("inf"), 10]), f"finite.*{told}"),
        ("a box of 1e300", entry(bbox=[4, 3, 1e300, 10]), f"finite.*{told}"),
        ("no box", without("annotations", "bbox"), f"four numbers.*{told}"),
        ("no mask", entry(segmentation=[]), f"without a mask.*{told}"),
        ("a polygon of two points", entry(segmentation=[[1, 2, 3, 4]]), f"broken mask.*{told}"),
        ("a flat polygon", entry(segmentation=POLYGON), f"broken mask.*{told}"),
        ("one bad polygon of two", entry(segmentation=[POLYGON, [1, 2]]), f"polygon.*{told}"),
        ("a polygon with NaN", entry(segmentation=[[float("nan"), *POLYGON[1:]]]), f"broken mask.*{told}"),
        ("a polygon far away", entry(segmentation=[[9e9, *POLYGON[1:]]]), f"broken mask.*{told}"),
        ("an RLE of another size", entry(segmentation={"size": [3, 3], "counts": [9]}), f"broken mask.*{told}"),
        ("an RLE too short", entry(segmentation={"size": [HEIGHT, WIDTH], "counts": [9]}), f"broken mask.*{told}"),
        ("an RLE cut off", entry(segmentation={"size": [HEIGHT, WIDTH], "counts": "abc"}), f"broken mask.*{told}"),
        ("an unknown category", entry(category_id=9), f"unknown category.*{told}"),
        ("no category", without("annotations", "category_id"), f"unknown category.*{told}"),
        ("an unknown image", entry(image_id=99), "not listed.*image 99"),
        ("an annotation id twice", entry(id=3), "used twice|same"),
        ("no annotation id", without("annotations", "id"), "never"),
        ("an area that is text", entry(area="large"), "never"),
        ("an area that is infinite", entry(area=float("inf")), "never"),
        ("an annotation that is a list", in_json(lambda c: c["annotations"].append([1])), "no object"),
        ("no annotation", in_json(lambda c: c.update(annotations=[])), "no object"),
        ("no annotation to validate on", in_json(lambda c: c.update(annotations=[]), "val"), "no object.*val"),
        ("all are crowds", in_json(lambda c: [a.update(iscrowd=1) for a in c["annotations"]]), "no object"),
        ("no image", in_json(lambda c: c.update(images=[], annotations=[])), f"{train}|no image"),
        ("no list of images", in_json(lambda c: c.pop("images")), f"{train}.*COCO"),
        ("categories as a dict", in_json(lambda c: c.update(categories={})), f"{train}.*COCO"),
        ("no category listed", in_json(lambda c: c.update(categories=[])), f"{train}.*category"),
        ("two categories of one name", in_json(lambda c: c["categories"][1].update(name="cat")), f"{train}.*cat"),
        ("names that differ in case", in_json(lambda c: c["categories"][1].update(name="CAT")), "CAT"),
        (
            "a category id infinite",
            in_json(lambda c: c["categories"][1].update(id=float("inf"))),
            f"{train}.*categories",
        ),
        ("a category id of letters", in_json(lambda c: c["categories"][1].update(id="x")), f"{train}.*categories"),
        ("a category without a name", in_json(lambda c: c["categories"][1].pop("name")), f"{train}.*categories"),
        (
            "val spells a class otherwise",
            in_json(lambda c: c["categories"][0].update(name="Cat"), "val"),
            "'Cat'.*'cat'",
        ),
        ("val has a class more", in_json(lambda c: c["categories"].append({"id": 3, "name": "cow"}), "val"), "cow"),
        (
            "the file is cut off",
            lambda root: (root / f"annotations/{train}").write_text('{"images": ['),
            f"{train}.*JSON",
        ),
        ("the file is empty", lambda root: (root / f"annotations/{train}").write_text(""), f"{train}.*JSON"),
        ("the file is a list", lambda root: (root / f"annotations/{train}").write_text("[]"), f"{train}.*COCO"),
        (
            "a byte order mark",
            lambda root: (root / f"annotations/{train}").write_bytes(
                b"\xef\xbb\xbf" + (root / f"annotations/{train}").read_bytes()
            ),
            "never",
        ),
        (
            "two files of one split",
            lambda root: shutil.copy(root / f"annotations/{train}", root / "annotations/instances_train2017.json"),
            "instances_train|never",
        ),
        ("an image in both splits", lambda root: shutil.copy(root / "train/a.png", root / "val/e.png"), "same"),
        ("nested without end", lambda root: (root / f"annotations/{train}").write_text("[" * 100000), f"{train}"),
    ]
    return [Fault("coco", name, plant, says) for name, plant, says in rows]


def in_text(file: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return plant


def xml_faults(layout: str) -> list[Fault]:
    file = {"voc": "Annotations/a.xml", "labelimg": "train/a.xml"}[layout]
    thing = "object 1 of (train/)?a"
    rows = [
        ("a namespace", in_text(file, "<annotation>", '<annotation xmlns="http://x.org/a">'), "never"),
        (
            "another root",
            lambda root: [
                in_text(file, "<annotation>", "<html>")(root),
                in_text(file, "</annotation>", "</html>")(root),
            ],
            "a.xml.*html",
        ),
        ("cut off", lambda root: (root / file).write_text((root / file).read_text()[:80]), "a.xml"),
        ("empty", lambda root: (root / file).write_text(""), "a.xml"),
        ("gone", lambda root: (root / file).unlink(), "a.xml"),
        (
            "an encoding that there is not",
            in_text(file, "<annotation>", '<?xml version="1.0" encoding="klingon"?><annotation>'),
            "a.xml",
        ),
        ("no size", in_text(file, "<width>32</width>", ""), "never"),
        ("another size", in_text(file, "<width>32</width>", "<width>99</width>"), "not 99 x 24"),
        ("an infinite size", in_text(file, "<width>32</width>", "<width>inf</width>"), "unknown size.*a"),
        ("a size of letters", in_text(file, "<width>32</width>", "<width>wide</width>"), "unknown size.*a"),
        ("a corner of letters", in_text(file, "<xmin>5</xmin>", "<xmin>left</xmin>"), f"four numbers.*{thing}"),
        ("no corner", in_text(file, "<xmin>5</xmin>", ""), f"four numbers.*{thing}"),
        ("a corner that is NaN", in_text(file, "<xmin>5</xmin>", "<xmin>nan</xmin>"), f"finite.*{thing}"),
        ("a corner over the edge", in_text(file, "<xmax>16</xmax>", "<xmax>40</xmax>"), f"edge.*{thing}"),
        ("corners swapped", in_text(file, "<xmax>16</xmax>", "<xmax>2</xmax>"), f"without area.*{thing}"),
        (
            "a box outside",
            lambda root: [
                in_text(file, "<xmin>5</xmin>", "<xmin>50</xmin>")(root),
                in_text(file, "<xmax>16</xmax>", "<xmax>60</xmax>")(root),
            ],
            f"beyond.*{thing}",
        ),
        ("no name", in_text(file, "<name>cat</name>", "<name> </name>"), f"without a name.*{thing}"),
        ("a name in another case", in_text(file, "<name>cat</name>", "<name>Cat</name>"), "'Cat'"),
        ("a name with spaces around", in_text(file, "<name>cat</name>", "<name> cat </name>"), "never"),
        (
            "difficult yes",
            in_text(file, "<difficult>0</difficult>", "<difficult>yes</difficult>"),
            f"difficult.*{thing}",
        ),
        (
            "no object at all",
            lambda root: [path.write_text("<annotation/>") for path in root.rglob("*.xml")],
            "names an object",
        ),
    ]
    return [Fault(layout, name, plant, says) for name, plant, says in rows]


def voc_faults() -> list[Fault]:
    lists = "ImageSets/Main/train.txt"
    rows = [
        ("a line with a suffix", in_text(lists, "a\n", "a.png\n"), "never"),
        ("a line with a folder", in_text(lists, "a\n", "JPEGImages/a.png\n"), "never"),
        ("a second column", in_text(lists, "a\n", "a 1\n"), "never"),
        ("a bad line", in_text(lists, "a\n", "### a list\n"), "missing image.*### a list"),
        ("a line twice", in_text(lists, "a\n", "a\na\n"), "listed twice"),
        ("empty lines", in_text(lists, "a\n", "\n\na\n"), "never"),
        ("Windows line ends", in_text(lists, "a\n", "a\r\n"), "never"),
        ("a list of bytes", lambda root: (root / lists).write_bytes(b"\xff\xfe\x00a"), "train.txt"),
        ("an empty list", lambda root: (root / lists).write_text(""), "train.txt|no image"),
        ("no list", lambda root: (root / lists).unlink(), "train"),
        ("a line out of the root", in_text(lists, "a\n", "../../a\n"), r"missing image.*\.\./\.\./a"),
    ]
    return [Fault("voc", name, plant, says) for name, plant, says in rows]


def labelimg_faults() -> list[Fault]:
    rows = [
        (
            "an annotation without an image",
            lambda root: shutil.copy(root / "train/a.xml", root / "train/z.xml"),
            "z.xml",
        ),
        ("valid for val", lambda root: (root / "val").rename(root / "valid"), "never"),
        ("classes.txt beside", lambda root: (root / "train/classes.txt").write_text("cat\ndog\n"), "classes.txt|never"),
    ]
    return [Fault("labelimg", name, plant, says) for name, plant, says in rows]


def yolo_faults() -> list[Fault]:
    labels, line = "labels/train/a.txt", r"labels/train/a\.txt, line 1"

    def text(content: str) -> Callable[[Path], object]:
        return lambda root: (root / labels).write_text(content)

    def told(content: str) -> Callable[[Path], object]:
        return lambda root: (root / "data.yaml").write_text(content)

    paths = "train: images/train\nval: images/val\n"
    rows = [
        ("a class too many", text("2 .5 .5 .2 .2\n"), f"unknown class.*{line}"),
        ("a class of halves", text("0.5 .5 .5 .2 .2\n"), f"unknown class.*{line}"),
        ("a negative class", text("-1 .5 .5 .2 .2\n"), f"unknown class.*{line}"),
        ("pixels for shares", text("0 10 8 12 10\n"), f"shares.*{line}.*pixels"),
        ("a column short", text("0 .5 .5 .2\n"), f"neither a box.*{line}"),
        ("letters", text("cat .5 .5 .2 .2\n"), f"not numbers.*{line}"),
        ("commas", text("0,.5,.5,.2,.2\n"), f"not numbers.*{line}"),
        ("NaN", text("0 nan .5 .2 .2\n"), f"shares.*{line}"),
        ("infinite", text("0 inf .5 .2 .2\n"), f"shares.*{line}"),
        ("no area", text("0 .5 .5 0 .2\n"), f"without area.*{line}"),
        ("a box over the edge", text("0 .95 .5 .3 .2\n"), f"edge.*{line}"),
        ("a box outside", text("0 1.5 .5 .2 .2\n"), f"beyond.*{line}"),
        ("bytes", lambda root: (root / labels).write_bytes(b"\xff\xfe0 1"), "a.txt"),
        ("no label file", lambda root: (root / labels).unlink(), "a.png.*|label file"),
        (
            "no label at all",
            lambda root: [path.unlink() for path in (root / "labels/train").iterdir()],
            "no image of train",
        ),
        ("no yaml list", told("- a\n"), "data.yaml"),
        ("broken yaml", told("names: [cat\n"), "data.yaml"),
        ("code in yaml", told("names: !!python/object/apply:os.getcwd []\n"), "data.yaml"),
        ("names as a dict", told(paths + "names: {0: cat, 1: dog}\n"), "never"),
        ("no names", told(paths), "data.yaml.*names"),
        ("a number for names", told(paths + "names: 2\n"), "data.yaml.*names"),
        ("a name twice", told(paths + "names: [cat, cat]\n"), "cat"),
        ("nc of another number", told(paths + "nc: 3\nnames: [cat, dog]\n"), "nc is 3"),
        ("no train", told("val: images/val\nnames: [cat, dog]\n"), "train"),
        ("a place that is not there", told("train: images/tain\nval: images/val\nnames: [cat, dog]\n"), "images/tain"),
        (
            "a place out of the root",
            told("train: ../../tmp\nval: images/val\nnames: [cat, dog]\n"),
            "leads out|not there",
        ),
        ("Roboflow's places", told("train: ../images/train\nval: ../images/val\nnames: [cat, dog]\n"), "never"),
        ("a path elsewhere", told("path: /datasets/pets\n" + paths + "names: [cat, dog]\n"), "never"),
        (
            "a list of files",
            lambda root: [
                (root / "train.txt").write_text("".join(f"images/train/{n}.png\n" for n in "abcd")),
                told("train: train.txt\nval: images/val\nnames: [cat, dog]\n")(root),
            ],
            "never",
        ),
        (
            "a list with a file gone",
            lambda root: [
                (root / "train.txt").write_text("images/train/a.png\nimages/train/z.png\n"),
                told("train: train.txt\nval: images/val\nnames: [cat, dog]\n")(root),
            ],
            "missing image.*z.png",
        ),
        (
            "an image in both splits",
            lambda root: shutil.copy(root / "images/train/a.png", root / "images/val/e.png"),
            "same",
        ),
    ]
    return [Fault("yolo", name, plant, says) for name, plant, says in rows]


def class_faults() -> list[Fault]:
    rows = [
        (
            "an image outside the classes",
            lambda root: shutil.copy(root / "train/cat/a.png", root / "train/z.png"),
            "z.png",
        ),
        ("an empty class", lambda root: (root / "train/cow").mkdir(), "cow"),
        ("a class of the same name in capitals", lambda root: write_images(root / "train/Cat", ["z"]), "Cat"),
        ("val has another class", lambda root: write_images(root / "val/cow", ["z"]), "cow"),
        ("val spells a class otherwise", lambda root: (root / "val/cat").rename(root / "val/Cat"), "Cat"),
        ("one class", lambda root: [shutil.rmtree(root / split / "dog") for split in SPLITS], "only class"),
        ("no image to train on", lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "train"),
        ("no image to validate on", lambda root: [shutil.rmtree(path) for path in (root / "val").iterdir()], "val"),
        ("valid for val", lambda root: (root / "val").rename(root / "valid"), "never"),
        ("val and valid", lambda root: shutil.copytree(root / "val", root / "valid"), "valid"),
        ("an image in both splits", lambda root: shutil.copy(root / "train/cat/a.png", root / "val/cat/e.png"), "same"),
        (
            "a file for a folder",
            lambda root: (shutil.rmtree(root / "train"), (root / "train").write_text("x")),
            "train|val",
        ),
    ]
    return [Fault("classes", name, plant, says) for name, plant, says in rows]


def all_faults() -> list[Fault]:
    return [
        *image_faults(),
        *mask_faults(),
        *coco_faults(),
        *xml_faults("voc"),
        *xml_faults("labelimg"),
        *voc_faults(),
        *labelimg_faults(),
        *yolo_faults(),
        *class_faults(),
    ]
