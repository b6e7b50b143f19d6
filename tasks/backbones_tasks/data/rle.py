"""COCO's segmentations, polygons and run lengths, as compressed run lengths, once they are known to be sound.

pycocotools trusts what it is given: it reads past the end of broken counts, and takes four coordinates for a box.
"""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def encode(segmentation: Any, height: int, width: int) -> str:
    """The counts of COCO's compressed RLE of a segmentation in an image of `height` x `width`.

    Raises:
        ValueError: says what is wrong with the segmentation.
    """
    if isinstance(segmentation, list):
        return _encode_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("is neither polygons nor an RLE of size and counts")
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"RLE of size {size} in an image of [{height}, {width}]")
    compressed = isinstance(counts, str)
    runs = _decompress(counts) if compressed else _whole_numbers(counts)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"RLE of {runs.sum()} pixels, {height * width} expected")
    return counts if compressed else _string(coco_mask.frPyObjects(segmentation, height, width))


def encode_array(masks: np.ndarray) -> list[str]:
    """The counts of each of (N, H, W) boolean masks."""
    return [_string(rle) for rle in coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))]


def decode(counts: list[str], height: int, width: int) -> np.ndarray:
    """Masks (N, H, W) uint8 of counts."""
    if not counts:
        return np.zeros((0, height, width), dtype=np.uint8)
    masks = coco_mask.decode([{"size": [height, width], "counts": value} for value in counts])  # (H, W, N)
    return np.ascontiguousarray(masks.transpose(2, 0, 1))


def area(counts: str, height: int, width: int) -> int:
    """Pixels of a mask."""
    return int(coco_mask.area({"size": [height, width], "counts": counts}))


def _string(rle: dict[str, Any]) -> str:
    return rle["counts"].decode("ascii")


def check_polygon(polygon: Any, height: int, width: int) -> None:
    """Raise ValueError that says what is wrong with a polygon [x, y, x, y, ...]."""
    try:
        points = np.asarray(polygon, dtype=float)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("polygon that is not a list of numbers") from None
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError(f"polygon of shape {list(points.shape)}; three or more x, y are expected in one list")
    if not np.isfinite(points).all():
        raise ValueError("polygon with a coordinate that is not finite")
    # rasterising walks along the edges, at any distance
    if (np.abs(points.reshape(-1, 2)) > 2 * np.array([width, height])).any():
        raise ValueError("polygon far beyond the image")


def _encode_polygons(polygons: list, height: int, width: int) -> str:
    for polygon in polygons:
        check_polygon(polygon, height, width)
    if not polygons:
        raise ValueError("is empty")
    return _string(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


def _whole_numbers(counts: Any) -> np.ndarray:
    try:
        runs = np.asarray(counts)
        if runs.ndim == 1 and np.issubdtype(runs.dtype, np.integer):
            return runs.astype(np.int64)
    except (ValueError, OverflowError):
        pass
    raise ValueError("RLE whose counts are not whole numbers")


def _decompress(text: str) -> np.ndarray:
    """Run lengths of a compressed RLE: 5 bits to a character, the sixth says that more follow (rleToString)."""
    codes = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0  # of a number
    if not len(codes) or ((codes < 0) | (codes > 63)).any() or not last[-1]:
        raise ValueError("RLE whose counts are cut off or no RLE")
    starts = np.flatnonzero(np.r_[True, last[:-1]])
    place = 5 * (np.arange(len(codes)) - np.repeat(starts, np.diff(np.r_[starts, len(codes)])))
    if place.max() > 30:
        raise ValueError("RLE with a run that no image has")
    runs = np.add.reduceat((codes & 31) << place, starts)
    negative = (codes[last] & 16) > 0
    runs = np.where(negative, runs - (32 << place[last]), runs)
    # from the fourth on, each is told as the difference to the one two before
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    return runs
