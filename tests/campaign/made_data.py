"""Data sets of other kinds made from the shared ones: bands of 16 bits, masks in colour, a single class, YOLO's layout.

    python tests/campaign/made_data.py SHARED OUT [IMAGES]

SHARED has camvid and bccd_coco; at most so many IMAGES of each split are taken.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (240, 180)
CAR = 8  # CamVid's class


def camvid(shared: Path, split: str, most: int) -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """Name, image and class indices of a split, at half the size."""
    for file in sorted((shared / "camvid" / "images" / split).glob("*.jpg"))[:most]:
        mask = Image.open(shared / "camvid" / "labels" / split / f"{file.stem}.png")
        yield file.stem, Image.open(file).resize(SIZE), np.asarray(mask.resize(SIZE, Image.Resampling.NEAREST))


def write_bands(shared: Path, out: Path, most: int) -> None:
    """RGB and a fourth band, the difference of green and red, as TIFF of 12 bits in 16, values from 0 to 4095."""
    import rasterio

    for split in ("train", "val"):
        images, labels = (out / kind / split for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for name, image, mask in camvid(shared, split, most):
            rgb = np.asarray(image).astype(np.int32)
            fourth = (rgb[..., 1] - rgb[..., 0] + 255) // 2
            bands = np.concatenate([rgb, fourth[..., None]], axis=2) * 16
            profile = {"driver": "GTiff", "count": 4, "dtype": "uint16", "width": SIZE[0], "height": SIZE[1]}
            with rasterio.open(images / f"{name}.tif", "w", photometric="MINISBLACK", **profile) as dataset:
                dataset.write(bands.transpose(2, 0, 1).astype(np.uint16))
            Image.fromarray(mask).save(labels / f"{name}.png")
    shutil.copy(shared / "camvid" / "classes.json", out)


def write_colours(shared: Path, out: Path, most: int) -> None:
    """Masks of RGB colours, which classes.json maps to classes."""
    names = json.loads((shared / "camvid" / "classes.json").read_text())["classes"]
    colours = [[37 * i % 256, 91 * i % 256, 200 - 15 * i] for i in range(len(names))]
    for split in ("train", "val"):
        images, labels = (out / kind / split for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for name, image, mask in camvid(shared, split, most):
            image.save(images / f"{name}.png")
            Image.fromarray(np.array(colours, dtype=np.uint8)[mask]).save(labels / f"{name}.png")
    told = {"classes": names[:-1], "colours": colours[:-1], "ignore_index": [colours[-1]]}
    (out / "classes.json").write_text(json.dumps(told))


def write_single(shared: Path, out: Path, most: int) -> None:
    """One class, cars, as 255, and 0 for the rest."""
    for split in ("train", "val"):
        images, labels = (out / kind / split for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for name, image, mask in camvid(shared, split, most):
            image.save(images / f"{name}.png")
            Image.fromarray(np.where(mask == CAR, 255, 0).astype(np.uint8)).save(labels / f"{name}.png")
    (out / "classes.json").write_text(json.dumps({"classes": ["car"], "values": [255]}))


def write_yolo(shared: Path, out: Path, most: int) -> None:
    """BCCD's blood cells in YOLO's layout."""
    for split in ("train", "val"):
        content = json.loads((shared / "bccd_coco" / f"instances_{split}.json").read_text())
        categories = {entry["id"]: i for i, entry in enumerate(content["categories"])}
        images, labels = (out / kind / split for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for entry in content["images"][:most]:
            shutil.copy(shared / "bccd_coco" / split / entry["file_name"], images)
            lines = []
            for found in content["annotations"]:
                if found["image_id"] == entry["id"]:
                    x, y, w, h = found["bbox"]
                    sides = entry["width"], entry["height"]
                    shares = [(x + w / 2) / sides[0], (y + h / 2) / sides[1], w / sides[0], h / sides[1]]
                    lines.append(" ".join(map(str, [categories[found["category_id"]], *shares])))
            (labels / f"{Path(entry['file_name']).stem}.txt").write_text("\n".join(lines))
    names = [entry["name"] for entry in content["categories"]]
    (out / "data.yaml").write_text(f"train: images/train\nval: images/val\nnc: {len(names)}\nnames: {names}\n")


MADE = {"bands": write_bands, "colours": write_colours, "single": write_single, "yolo": write_yolo}

if __name__ == "__main__":
    for name, write in MADE.items():
        write(Path(sys.argv[1]), Path(sys.argv[2]) / name, int(sys.argv[3]) if len(sys.argv) > 3 else 10**6)
