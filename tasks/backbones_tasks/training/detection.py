"""Detection and instance segmentation: losses, scores, pictures and prediction of torchvision's detectors."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import rle
from ..data.detection import DetectionData
from ..data.reading import in_channels, to_unit
from ..models.detector import DENSE, MASKED, build_detector, check_options, map_indices
from ..pictures.detection import Objects, draw_objects, save_objects
from .coco import CocoEvaluation
from .task import Task

SHOWN = 0.5  # least score of what pictures show, unless told

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionTask(Task):
    """A detector and all that its training needs.

    Called with a list of images (C, H, W) in [0, 1] of any sizes, it returns what torchvision's detectors return: a
    dict per image of boxes, labels, scores and, of Mask R-CNN, masks.

    Args:
        backbone: a name, or a dict of `build_backbone` options that includes "name"
        detector: "faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet" or "fcos"
        detector_options: options of `build_detector`, such as `fpn_channels`, `min_size` or `score_thresh`; where none
            are given, narrow heads that train fast on a CPU
        image_size: longer side of the images in pixels, to which training images are brought by their augmentation,
            and others by the model; None leaves it to `min_size` and `max_size`, for all images
        **options: those of `Task`
    """

    name = "detection"
    data_class = DetectionData
    linked = (*Task.linked, "image_size")
    metric = "box_AP"
    scores = ("box_AP", "box_AP50", "box_AP75")
    epochs = 5
    predicts = (
        "Find objects in images; writes OUT/overlays, and OUT/results.json with bbox (x, y, width, height in pixels), "
        "score and, of mask_rcnn, segmentation as RLE, as in COCO's results."
    )

    def __init__(
        self,
        backbone: str | dict[str, Any] = "pvt_v2_b0",
        detector: str = "faster_rcnn",
        detector_options: dict[str, Any] | None = None,
        image_size: int | None = None,
        **options,
    ):
        super().__init__(**options)
        if detector_options is None:
            detector_options = narrow(detector)
        sizes = {"min_size": image_size, "max_size": image_size, "_skip_resize": True} if image_size else {}
        backbone = in_channels(backbone, self.reading)
        self.model = build_detector(
            detector,
            backbone=backbone,
            num_classes=self.hparams["num_classes"],
            **{**sizes, **detector_options},
        )
        self.remember(backbone, detector=detector, detector_options=detector_options, image_size=image_size)
        self.masks = detector in MASKED
        if self.masks:
            self.scores += ("mask_AP", "mask_AP50", "mask_AP75")
        self.evaluation: CocoEvaluation | None = None

    @classmethod
    def check_options(cls, options: Any) -> None:
        super().check_options(options)
        check_options(options.detector, options.detector_options or {})

    @classmethod
    def link(cls, parser: Any) -> None:
        parser.link_arguments("model.detector", "data.masks", compute_fn=lambda detector: detector in MASKED)

    @classmethod
    def map_indices(cls, options: Mapping[str, Any], strides: Mapping[int, int]) -> list[int]:
        return map_indices(strides, options["detector"])

    def describe(self) -> str:
        return f"{self.hparams['detector']} on {self.hparams['backbone']['name']}"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        loss = sum(losses.values())
        self.log_loss("train_loss", loss, len(images))
        for name, part in losses.items():
            self.log_loss(name if name.startswith("loss_") else f"loss_{name}", part.detach(), len(images))
        return loss

    def save_picture(self, file: Path, samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        images = [image for image, _ in samples]
        found = [self([image.to(self.device)])[0] for image in images]
        save_objects(
            file,
            [self.reading.picture(image) for image in images],
            [_objects(target) for _, target in samples],
            [_objects(prediction, SHOWN) for prediction in found],
            self.class_names,
        )

    @classmethod
    def add_predict_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--threshold", type=float, default=SHOWN, help="least score of what is drawn and listed; 0 for all"
        )

    def predict_image(
        self, image: np.ndarray, options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], list[dict[str, Any]]]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        (found,) = self([to_unit(pixels.to(self.device))])
        return self.results(image, found, options)

    def results(
        self, image: np.ndarray, output: dict[str, Tensor], options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], list[dict[str, Any]]]:
        objects = _objects(output, options.threshold)
        return {"overlays": draw_objects(self.reading.picture(image), objects, self.class_names)}, self._entries(
            objects, image.shape[:2]
        )

    def _entries(self, objects: Objects, size: tuple[int, int]) -> list[dict[str, Any]]:
        entries = []
        for box, label, score in zip(objects.boxes, objects.labels, objects.scores, strict=True):
            x0, y0, x1, y1 = box.astype(float).round(2).tolist()
            bbox = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            name = self.class_names[label]
            entries.append({"category": name, "category_id": int(label), "score": round(float(score), 4), "bbox": bbox})
        if objects.masks is not None and entries:
            for entry, counts in zip(entries, rle.encode_array(objects.masks), strict=True):
                entry["segmentation"] = {"size": list(size), "counts": counts}
        return entries

    def start(self, split: str) -> None:
        truth = self.data.datasets[split].coco()
        self.evaluation = CocoEvaluation(truth, self.class_names, self.masks)

    def evaluate(self, batch: Batch, split: str) -> None:
        images, targets = batch
        self.evaluation.update(targets, self(images))

    def finish(self, split: str) -> dict[str, float]:
        return self.evaluation.compute()

    def save_results(self, folder: Path, split: str) -> None:
        self.evaluation.save(folder / f"coco_{split}")


def narrow(detector: str) -> dict[str, Any]:
    """Options of a detector that trains fast on a CPU."""
    options = {"fpn_channels": 64}
    if detector not in DENSE:
        options |= {"box_channels": 256, "box_batch_size_per_image": 64}
    if detector in MASKED:
        options |= {"mask_channels": 64}
    return options


def _objects(found: Mapping[str, Tensor], threshold: float = 0.0) -> Objects:
    """A target, or the part of a prediction that reaches a score, as arrays."""
    kept = found["scores"] >= threshold if "scores" in found else slice(None)
    values = {name: found[name][kept].cpu().numpy() for name in ("boxes", "labels", "scores", "masks") if name in found}
    if "masks" in values:
        masks = values["masks"]
        values["masks"] = masks[:, 0] > 0.5 if masks.ndim == 4 else masks > 0
    return Objects(**values)
