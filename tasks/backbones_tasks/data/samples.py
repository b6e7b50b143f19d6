"""Images and the objects in them, whatever format they were listed in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from . import rle
from .faults import Faults
from .images import UNREADABLE, each_in_threads, stored_size
from .reading import Reading

TOLERANCE = 1.0  # pixels by which a box may lie beyond its image: annotators and 1-based coordinates do that
MOST = 2.0**53  # beyond, whole numbers are not exact, and no image is


@dataclass(frozen=True, eq=False)
class Sample:
    """An image and its objects, N of them, as the annotations have them.

    file: the image; None where it is drawn. image_id: a number, as in COCO. size: (H, W).
    boxes: (N, 4) float64, (x, y, width, height) in pixels. labels: (N,) int64, from 1. areas: (N,) float64, of the
    masks or of the boxes. crowd: (N,) bool, for objects that neither train nor count, as crowds in COCO.
    masks: N counts of compressed RLE, or None where masks are not wanted.
    """

    file: Path | None
    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    masks: list[str] | None

    def target(self) -> dict[str, Any]:
        """The objects but the crowds as torchvision's detectors want them, boxes cut at the image's border."""
        height, width = self.size
        single = ~self.crowd
        boxes = self.boxes[single]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        corners = np.clip(corners, 0, [width, height, width, height])
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(corners).float(), format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.from_numpy(self.labels[single]),
            "image_id": self.image_id,
            "area": torch.from_numpy(self.areas[single]).float(),
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        }
        if self.masks is not None:
            counts = [counts for counts, wanted in zip(self.masks, single, strict=True) if wanted]
            target["masks"] = tv_tensors.Mask(torch.from_numpy(rle.decode(counts, height, width)))
        return target


def ground_truth(samples: Iterable[Sample], categories: Mapping[int, tuple[int, str]]) -> dict[str, Any]:
    """What samples hold, crowds included, in COCO's format.

    Args:
        samples: the images and objects.
        categories: id and name of each label.
    """
    images, annotations = [], []
    for sample in samples:
        height, width = sample.size
        name = sample.file.name if sample.file else f"{sample.image_id}.png"
        images.append({"id": sample.image_id, "file_name": name, "height": height, "width": width})
        for i, (box, label) in enumerate(zip(sample.boxes.tolist(), sample.labels.tolist(), strict=True)):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": sample.image_id,
                "category_id": categories[label][0],
                "bbox": box,
                "area": float(sample.areas[i]),
                "iscrowd": int(sample.crowd[i]),
            }
            if sample.masks is not None:
                annotation["segmentation"] = {"size": [height, width], "counts": sample.masks[i]}
            annotations.append(annotation)
    names = [{"id": number, "name": name} for number, name in categories.values()]
    return {"images": images, "annotations": annotations, "categories": names}


class ObjectList:
    """Gathers the objects of one image that are sound, and the faults of the others.

    Args:
        size: (H, W) of the image.
        masks: whether each object needs a mask.
        faults: where faults are noted.
    """

    def __init__(self, size: tuple[int, int], masks: bool, faults: Faults):
        self.size, self.masks, self.faults = size, masks, faults
        self.rows: list[tuple[list[float], int, float, bool, str | None]] = []

    def add(
        self, where: str, box: Any, label: int, area: Any = None, crowd: bool = False, segmentation: Any = None
    ) -> None:
        """Add an object whose box is (x, y, width, height), or note why it cannot be."""
        height, width = self.size
        fault = box_fault(box, height, width)
        if fault is not None:
            self.faults.add(fault, f"{where}, {box}")
            return
        clipped = clip_box(box, height, width)
        counts = None
        if self.masks:
            if not segmentation:
                self.faults.add("object without a mask", where)
                return
            try:
                counts = rle.encode(self._sound(where, segmentation), height, width)
            except ValueError as error:
                self.faults.add("broken mask", f"{where}, {error}")
                return
            covered = rle.area(counts, height, width)
            if not covered:
                self.faults.add("mask without a pixel", where)
                return
        if clipped is not box:
            self.faults.add("box over the image's edge, cut there", f"{where}, {box}", repaired=True)
        if isinstance(area, bool) or not isinstance(area, int | float) or not 0 <= area < np.inf or clipped is not box:
            area = clipped[2] * clipped[3] if counts is None else covered
        self.rows.append((clipped, label, area, crowd, counts))

    def _sound(self, where: str, segmentation: Any) -> Any:
        """A segmentation without those of its polygons that are broken, if others are not."""
        if not isinstance(segmentation, list) or len(segmentation) < 2:
            return segmentation
        kept, problems = [], []
        for polygon in segmentation:
            try:
                rle.check_polygon(polygon, *self.size)
                kept.append(polygon)
            except ValueError as error:
                problems.append(f"{where}, {error}")
        if not kept:
            return segmentation
        for problem in problems:
            self.faults.add("broken polygon among others, left out", problem, repaired=True)
        return kept

    def sample(self, file: Path, image_id: int) -> Sample:
        boxes, labels, areas, crowd, masks = zip(*self.rows, strict=True) if self.rows else ((),) * 5
        return Sample(
            file=file,
            image_id=image_id,
            size=self.size,
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.array(labels, dtype=np.int64),
            areas=np.array(areas, dtype=np.float64),
            crowd=np.array(crowd, dtype=bool),
            masks=list(masks) if self.masks else None,
        )


def box_fault(box: Any, height: int, width: int) -> str | None:
    """What is wrong with a box (x, y, width, height) beyond repair, if anything is."""
    numbers = isinstance(box, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    if not numbers or len(box) != 4:
        return "box that is not four numbers"
    x, y, w, h = box
    if not all(-MOST < value < MOST for value in box):
        return "box with a number that is not finite"
    if w <= 0 or h <= 0:
        return "box without area"
    outside = min(x + w, y + h, width - x, height - y) <= 0
    return "box beyond the image" if outside else None


def clip_box(box: list[float], height: int, width: int) -> list[float]:
    """A box with some of it in the image, cut at the edge; as it is if it is within `TOLERANCE` of that."""
    x, y, w, h = box
    if max(-x, -y, x + w - width, y + h - height) <= TOLERANCE:
        return box
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]


def check_images(samples: list[Sample], faults: Faults, reading: Reading) -> list[Sample]:
    """Read every image once; returns the samples whose image can be read and has the size that is listed."""
    found = each_in_threads(lambda sample: _image_fault(sample, reading), samples, "checking images")
    for sample, fault in zip(samples, found, strict=True):
        if fault is not None:
            kind, detail = fault
            faults.add(kind, f"{faults.name(sample.file)}{detail}")
    return [sample for sample, fault in zip(samples, found, strict=True) if fault is None]


def _image_fault(sample: Sample, reading: Reading) -> tuple[str, str] | None:
    """The kind of fault, and what is to be said of the file."""
    try:
        found = reading.read(sample.file).shape[:2]
    except UNREADABLE as error:
        return "image that cannot be read", f", {error}"
    height, width = sample.size
    if found == sample.size:
        return None
    turned = " once turned upright by its EXIF orientation" if stored_size(sample.file) == (width, height) else ""
    return "image of another size than listed", f" is {found[1]} x {found[0]}{turned}, not {width} x {height}"
