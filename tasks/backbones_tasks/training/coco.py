"""COCO's evaluation of boxes and masks, by pycocotools, over one process or many."""

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.errors import InputError

from ..data import rle
from ..files import whole

AREAS = ("all", "small", "medium", "large")
KINDS = {"box": "bbox", "mask": "segm"}  # our names and pycocotools'


class CocoEvaluation:
    """Average precision of boxes, and of masks, as COCO defines it.

    ```
    evaluation = CocoEvaluation(dataset.coco(), data.class_names)
    for images, targets in loader:
        evaluation.update(targets, model(images))
    evaluation.compute()["box_AP50"]
    ```

    Images that were not seen do not count; those seen twice, or by two processes, count once.

    Args:
        truth: images, annotations and categories in COCO's format, as `DetectionDataset.coco` returns them, or as
            read from a file.
        class_names: names of the categories by label; the first is the background.
        masks: evaluate masks as well; annotations and predictions must have them.
    """

    def __init__(self, truth: Mapping[str, Any], class_names: Sequence[str], masks: bool = False):
        self.truth, self.kinds = truth, ("box", "mask") if masks else ("box",)
        ids = {category["name"]: category["id"] for category in truth["categories"]}
        if not ids.keys() & set(class_names[1:]):
            raise InputError(f"the truth has the categories {', '.join(ids)}, but the classes are {class_names[1:]}")
        self.category_ids = {label: ids[name] for label, name in enumerate(class_names) if label and name in ids}
        self.sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self.results: dict[int, list[dict[str, Any]]] = {}

    def update(self, targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Add what a detector said about images.

        Args:
            targets: with the `image_id` of each image; nothing else is read.
            predictions: of torchvision's detectors: boxes (N, 4) as (x0, y0, x1, y1) in pixels of the image, labels
                (N,) from 1, scores (N,), and masks (N, 1, H, W) of probabilities if masks are evaluated.

        Raises:
            InputError: an image that is not in the truth, or predictions without masks.
        """
        for target, prediction in zip(targets, predictions, strict=True):
            image_id = int(target["image_id"])
            if image_id not in self.sizes:
                raise InputError(f"image_id {image_id} is not among the {len(self.sizes)} images of the truth")
            if "mask" in self.kinds and "masks" not in prediction:
                raise InputError("masks are to be evaluated, but the predictions have none; use a mask_rcnn")
            self.results[image_id] = self._results(image_id, prediction)

    def compute(self) -> dict[str, float]:
        """The scores over all processes, the same on each; `nan` where the truth has no such object.

        `box_AP` is the mean over IoU 0.50 to 0.95, `box_AP50` and `box_AP75` are at one IoU; `box_AP_small` is over
        objects below 32 x 32 pixels, `box_AP_large` from 96 x 96 on, `box_AP_medium` between; `box_AP/NAME` is of one
        class. With masks, the same of `mask_AP`.
        """
        results = self._gather()
        scores: list[Any] = [self._scores(results) if _rank() == 0 else None]
        if _distributed():
            dist.broadcast_object_list(scores)
        return scores[0]

    def save(self, folder: str | Path) -> list[Path]:
        """Write `results_box.json`, `results_mask.json` and `truth.json` in COCO's formats; every process must call.

        Boxes and masks have files of their own, as COCO's server expects: from a common one, pycocotools would take
        the areas of masks to be those of their boxes. The truth is of the images that were seen, crowds included.
        """
        results = self._gather()
        if _rank():
            return []
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        contents = {f"results_{kind}": _entries(results, kind) for kind in self.kinds}
        contents["truth"] = self._seen(results)
        for name, content in contents.items():
            with whole(folder / f"{name}.json") as unfinished:
                unfinished.write_text(json.dumps(content), encoding="utf-8")
        return [folder / f"{name}.json" for name in contents]

    def _results(self, image_id: int, prediction: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Entries of a results file, in COCO's category ids."""
        corners = prediction["boxes"].detach().double().cpu().reshape(-1, 4)
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
        labels, scores = prediction["labels"].tolist(), prediction["scores"].detach().double().tolist()
        entries = [
            {"image_id": image_id, "category_id": self.category_ids.get(label), "bbox": box, "score": score}
            for label, box, score in zip(labels, boxes, scores, strict=True)
        ]
        if "mask" in self.kinds and entries:
            masks = prediction["masks"].detach()[:, 0] > 0.5
            size = self.sizes[image_id]
            if masks.shape[1:] != size:
                raise InputError(
                    f"masks of image {image_id} are {tuple(masks.shape[1:])}, but the image is {size} (height, width)"
                )
            for entry, counts in zip(entries, rle.encode_array(masks.cpu().numpy()), strict=True):
                entry["segmentation"] = {"size": list(size), "counts": counts}
        return [entry for entry in entries if entry["category_id"] is not None]  # the truth has no such category

    def _gather(self) -> dict[int, list[dict[str, Any]]]:
        """The results of all processes, by image, in one order."""
        shares = [self.results]
        if _distributed():
            shares = [None] * dist.get_world_size()
            dist.all_gather_object(shares, self.results)
        merged = {image_id: entries for share in reversed(shares) for image_id, entries in share.items()}
        return dict(sorted(merged.items()))

    def _seen(self, results: Mapping[int, Any]) -> dict[str, Any]:
        """The truth about the images that were seen, in copies, because pycocotools writes into them."""
        annotations = [entry for entry in self.truth["annotations"] if entry["image_id"] in results]
        return {
            "images": [image for image in self.truth["images"] if image["id"] in results],
            # numbered from 1: pycocotools takes a hit on annotation 0 for none
            "annotations": [{**entry, "id": number} for number, entry in enumerate(annotations, start=1)],
            "categories": self.truth["categories"],
        }

    def _scores(self, results: Mapping[int, list[dict[str, Any]]]) -> dict[str, float]:
        names = {category["id"]: category["name"] for category in self.truth["categories"]}
        scores: dict[str, float] = {}
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            for kind in self.kinds:
                truth = _index(self._seen(results))
                entries = _entries(results, kind)
                # loadRes cannot take an empty list
                found = truth.loadRes(entries) if entries else _index({**truth.dataset, "annotations": []})
                evaluation = COCOeval(truth, found, KINDS[kind])
                evaluation.evaluate()
                evaluation.accumulate()
                precision = evaluation.eval["precision"][..., -1]  # IoU, recall, class, area; 100 per image and class
                thresholds = evaluation.params.iouThrs
                scores[f"{kind}_AP"] = _mean(precision[:, :, :, 0])
                for iou in (50, 75):
                    scores[f"{kind}_AP{iou}"] = _mean(precision[np.isclose(thresholds, iou / 100), :, :, 0])
                for i, area in enumerate(AREAS[1:], start=1):
                    scores[f"{kind}_AP_{area}"] = _mean(precision[:, :, :, i])
                for i, category_id in enumerate(evaluation.params.catIds):
                    scores[f"{kind}_AP/{names[category_id]}"] = _mean(precision[:, :, i, 0])
        return scores


def _entries(results: Mapping[int, list[dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    other = "segmentation" if kind == "box" else "bbox"
    return [{k: v for k, v in entry.items() if k != other} for entries in results.values() for entry in entries]


def _index(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float:
    counted = precision[precision > -1]
    return float(counted.mean()) if counted.size else math.nan


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0
