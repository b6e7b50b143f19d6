"""Segmentation: loss, scores, pictures and prediction of segmenters."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from segmentation_models_pytorch.losses import DiceLoss
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from .data import SegmentationData
from .images import to_pixels
from .pictures import index_png, overlay, palette, save_predictions
from .segmenter import build_segmenter, find_architecture
from .sliding import slide
from .task import Normalise, Task

AUX_WEIGHT = 0.4  # as in PSPNet and in mmsegmentation's UPerNet

Batch = tuple[torch.Tensor, torch.Tensor]


class SegmentationTask(Task):
    """A segmenter and all that its training needs.

    Called with images (B, 3, H, W) in [0, 1] of any size, it returns logits (B, num_classes, H, W).

    Args:
        backbone: a name, or a dict of `build_backbone` options that includes "name"
        decoder: "upernet" or "smp/NAME"
        decoder_options: options of the decoder, such as `decoder_channels`; 64 of these in UPerNet where none are given
        aux: train a fully convolutional head on the stride-16 map as well
        dice: weight of a Dice loss beside the cross-entropy
        ignore_index: value of pixels that neither train nor count
        **options: those of `Task`
    """

    name = "segmentation"
    data_class = SegmentationData
    linked = ("num_classes", "class_names", "ignore_index")
    metric = "mIoU"
    scores = ("mIoU", "pixel_acc")
    epochs = 6
    predicts = "Label every pixel of images; writes OUT/overlays and OUT/masks, whose pixels are class indices."

    def __init__(
        self,
        backbone: str | dict[str, Any] = "pvt_v2_b0",
        decoder: str = "upernet",
        decoder_options: dict[str, Any] | None = None,
        aux: bool = False,
        dice: float = 0.0,
        ignore_index: int = 255,
        **options,
    ):
        super().__init__(**options)
        if decoder_options is None:
            decoder_options = {"decoder_channels": 64} if decoder == "upernet" else {}
        classes = self.hparams["num_classes"]
        self.model = build_segmenter(decoder, backbone=backbone, num_classes=classes, aux=aux, **decoder_options)
        self.remember(
            backbone, decoder=decoder, decoder_options=decoder_options, aux=aux, dice=dice, ignore_index=ignore_index
        )
        self.normalise = Normalise(self.model.backbone)
        self.dice_loss = DiceLoss("multiclass", from_logits=True, ignore_index=ignore_index) if dice else None
        self.confusion = MulticlassConfusionMatrix(classes, ignore_index=ignore_index, validate_args=False)

    @classmethod
    def check_options(cls, options: Any) -> None:
        super().check_options(options)
        find_architecture(options.decoder)

    def describe(self) -> str:
        return f"{self.hparams['decoder']} on {self.hparams['backbone']['name']}"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.normalise(images))

    def loss(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the pixels that count, plus the weighted Dice loss; zero where no pixel counts."""
        ignore_index = self.hparams["ignore_index"]
        count = (masks != ignore_index).sum().clamp(min=1)
        loss = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum") / count
        if self.dice_loss is not None:
            loss = loss + self.hparams["dice"] * self.dice_loss(logits, masks)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        images, masks = batch
        logits = self(images)
        if self.hparams["aux"]:
            logits, aux = logits
            loss = self.loss(logits, masks) + AUX_WEIGHT * self.loss(aux, masks)
        else:
            loss = self.loss(logits, masks)
        self.log_loss("train_loss", loss, len(images))
        return loss

    def save_picture(self, file: Path, samples: Sequence[Batch]) -> None:
        predictions = [self(image[None].to(self.device)).argmax(1)[0].cpu().numpy() for image, _ in samples]
        images = [to_pixels(image) for image, _ in samples]
        truths = [mask.numpy() for _, mask in samples]
        save_predictions(file, images, truths, predictions, self.class_names, self.hparams["ignore_index"])

    @classmethod
    def add_predict_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--window", type=_side, default=1024, help="larger images are read in windows of this side")
        parser.add_argument("--overlap", type=_share, default=0.25, help="share of a window that its neighbour covers")

    def predict_image(self, image: np.ndarray, options: argparse.Namespace) -> tuple[dict[str, Image.Image], None]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        probabilities = slide(
            lambda part: self(part.to(self.device).float() / 255), pixels, options.window, options.overlap
        )
        mask = probabilities.argmax(0).cpu().numpy()
        colours = palette(len(self.class_names))
        return {"overlays": Image.fromarray(overlay(image, mask, colours)), "masks": index_png(mask, colours)}, None

    def evaluate(self, batch: Batch, split: str) -> None:
        images, masks = batch
        logits = self(images)
        self.confusion.update(logits.argmax(1), masks)
        # image by image: the mean over a batch would depend on which images are in it
        losses = [self.loss(*pair) for pair in zip(logits.split(1), masks.split(1), strict=True)]
        self.log_loss(f"{split}_loss", torch.stack(losses).mean(), len(images))

    def finish(self, split: str) -> None:
        matrix = self.confusion.compute().double()  # rows are the truth
        self.confusion.reset()
        hits = matrix.diag()
        union = matrix.sum(0) + matrix.sum(1) - hits
        iou = hits / union  # nan for a class that is neither there nor predicted; it does not count
        self.log_scores(
            {"mIoU": iou.nanmean().nan_to_num(), "pixel_acc": hits.sum() / matrix.sum().clamp(min=1)}
            | {f"IoU_{name}": value for name, value in zip(self.class_names, iou, strict=True)}
        )


def _side(text: str) -> int:
    if int(text) < 32:
        raise argparse.ArgumentTypeError(f"{text} must be at least 32")
    return int(text)


def _share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to under 1")
    return float(text)
