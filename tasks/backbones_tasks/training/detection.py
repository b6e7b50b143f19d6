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
from ..models.heads import DETECTORS
from ..pictures.detection import Objects, draw_objects, save_objects
from .coco import CocoEvaluation
from .coco_results import CocoIds, save_coco
from .recipes import SET_PREDICTION
from .task import Task

SHOWN = 0.5  # least score of what pictures show, unless told

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionTask(Task):
    """A detector and all that its training needs.

    Called with a list of images (C, H, W) in [0, 1] of any sizes, it returns what torchvision's detectors return: a
    dict per image of boxes, labels, scores and, of Mask R-CNN, masks.

    Args:
        backbone: a name, or a dict of `build_backbone` options that includes "name"
        detector: "faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet", "fcos", or "hf/NAME" of transformers
        detector_options: options of `build_detector`, such as `fpn_channels`, `num_queries` or `score_thresh`; where
            none are given, narrow heads that train fast on a CPU
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
        "Find objects in images; writes OUT/overlays, OUT/results.json with what they show, and OUT/coco with all that "
        "was found, as pycocotools' `loadRes` takes it: results_box.json, and results_mask.json of mask_rcnn."
    )

    def __init__(
        self,
        backbone: str | dict[str, Any] = "pvt_v2_b0",
        detector: str = "faster_rcnn",
        detector_options: dict[str, Any] | None = None,
        image_size: int | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        if detector_options is None:
            detector_options = narrow(detector)
        sizes = {"min_size": image_size, "max_size": image_size, "_skip_resize": True} if image_size else {}
        if detector in DETECTORS:
            self.recipe = SET_PREDICTION
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
        loss = self.taught(sum(losses.values()), len(images))
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
        shown = "least score of what is drawn, and listed in results.json; 0 for all"
        parser.add_argument("--threshold", type=float, default=SHOWN, help=shown)
        parser.add_argument(
            "--annotations",
            type=Path,
            metavar="FILE",
            help="of the images, in COCO's format, such as instances_val.json: OUT/coco then has its ids of images and "
            "categories; else images are numbered from 1, in the order of OUT/coco/images.json",
        )

    def check_prediction(self, options: argparse.Namespace) -> None:
        if options.annotations is not None:
            CocoIds.read(options.annotations, self.class_names)

    def predict_image(
        self, image: np.ndarray, options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], dict[str, Any]]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        (found,) = self([to_unit(pixels.to(self.device))])
        return self.results(image, found, options)

    def results(
        self, image: np.ndarray, output: dict[str, Tensor], options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], dict[str, Any]]:
        """The picture, and the image's size (H, W) with all objects, whatever their scores."""
        shown = _objects(output, options.threshold)
        objects = _entries(_objects(output), image.shape[:2])
        picture = draw_objects(self.reading.picture(image), shown, self.class_names)
        return {"overlays": picture}, {"size": list(image.shape[:2]), "objects": objects}

    def listed(self, result: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
        entries = []
        for found in result["objects"]:
            if found["score"] < options.threshold:
                continue
            numbers = {"score": round(found["score"], 4), "bbox": [round(value, 2) for value in found["bbox"]]}
            entries.append({"category": self.class_names[found["label"]], "category_id": found["label"], **numbers})
            if "segmentation" in found:
                entries[-1]["segmentation"] = found["segmentation"]
        return entries

    def save_predictions(self, folder: Path, results: Mapping[str, Any], options: argparse.Namespace) -> list[Path]:
        return save_coco(folder / "coco", results, self.class_names, options.annotations)

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
    if detector in DETECTORS:
        return dict(DETECTORS[detector].narrow)
    options = {"fpn_channels": 64}
    if detector not in DENSE:
        options |= {"box_channels": 256, "box_batch_size_per_image": 64}
    if detector in MASKED:
        options |= {"mask_channels": 64}
    return options


def _entries(objects: Objects, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Objects as label, score, bbox (x, y, width, height) and, of masks, segmentation as compressed RLE."""
    entries = []
    for box, label, score in zip(objects.boxes, objects.labels, objects.scores, strict=True):
        x0, y0, x1, y1 = box.astype(float).tolist()
        entries.append({"label": int(label), "score": float(score), "bbox": [x0, y0, x1 - x0, y1 - y0]})
    if objects.masks is not None and entries:
        for entry, counts in zip(entries, rle.encode_array(objects.masks), strict=True):
            entry["segmentation"] = {"size": list(size), "counts": counts}
    return entries


def _objects(found: Mapping[str, Tensor], threshold: float = 0.0) -> Objects:
    """A target, or the part of a prediction that reaches a score, as arrays."""
    kept = found["scores"] >= threshold if "scores" in found else slice(None)
    values = {name: found[name][kept].cpu().numpy() for name in ("boxes", "labels", "scores", "masks") if name in found}
    if "masks" in values:
        masks = values["masks"]
        values["masks"] = masks[:, 0] > 0.5 if masks.ndim == 4 else masks > 0
    return Objects(**values)
