"""Segmentation: loss, scores, pictures and prediction of segmenters."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from backbones.errors import InputError, MissingDependency

from ..data.images import UnreadableImage, is_large
from ..data.raster import Raster
from ..data.reading import in_channels, to_unit
from ..data.segmentation import SegmentationData
from ..models.heads import SEGMENTERS
from ..models.segmenter import build_segmenter, check_options, map_indices
from ..pictures.colours import index_png, overlay, palette
from ..pictures.segmentation import save_predictions
from .inference import MIN_WINDOW, Inference, average
from .losses import SegmentationLoss, balanced_weights
from .mixing import make_mixup, mix_masks, mixed_loss
from .normalisation import Normalise
from .recipes import SET_PREDICTION
from .sliding import slide
from .task import Task

AUX_WEIGHT = 0.4  # as in PSPNet and in mmsegmentation's UPerNet
REST = "the rest"  # what a pixel is that is not of the only class
WINDOW = 1024  # what `predict` takes larger images in, unless told

Batch = tuple[torch.Tensor, torch.Tensor]


class SegmentationTask(Task):
    """A segmenter and all that its training needs.

    Called with images (B, C, H, W) in [0, 1] of any size, it returns logits (B, num_classes, H, W); for
    a single class, which is told from the rest, (B, 2, H, W), the rest first.

    Args:
        backbone: a name, or a dict of `build_backbone` options that includes "name"
        decoder: "upernet", "smp/NAME", or "hf/NAME" of transformers; those that give classes to masks have losses of
            their own, and `loss` is then only what is told of validation images
        decoder_options: options of the decoder, such as `decoder_channels`; where none are given, 64 of these in
            UPerNet, and narrow heads of transformers
        aux: train a fully convolutional head on the stride-16 map as well
        loss: a sum of ce (cross-entropy), ohem (cross-entropy of the hard pixels), dice, focal and lovasz, such as
            "ce+dice" or "ohem+0.5*lovasz"
        loss_options: options of these by name, such as {ohem: {thresh: 0.9}, focal: {gamma: 3}}
        class_weights: of each class in the loss; "balanced" computes them from the training masks, so that all classes
            count equally
        mixup: strength of mixing whole images, the alpha of a beta distribution; 0 is off. The loss is then by both
            masks, each with its share
        cutmix: the same for pasting parts of images, with their masks, into others
        mixup_prob: probability that a batch is mixed, by either
        mixup_switch_prob: probability that it is by cutmix, where both are on
        inference: how images are labelled when they are measured, and by `predict` unless it is told otherwise
        ignore_index: value of pixels that neither train nor count
        **options: those of `Task`
    """

    name = "segmentation"
    data_class = SegmentationData
    linked = (*Task.linked, "ignore_index")
    alone = ("inference",)
    metric = "mIoU"
    scores = ("mIoU", "pixel_acc")
    signals = ("soft", "hard", "maps")
    epochs = 6
    predicts = "Label every pixel of images; writes OUT/overlays and OUT/masks, whose pixels are class indices."

    def __init__(
        self,
        backbone: str | dict[str, Any] = "pvt_v2_b0",
        decoder: str = "upernet",
        decoder_options: dict[str, Any] | None = None,
        aux: bool = False,
        loss: str = "ce",
        loss_options: dict[str, dict[str, Any]] | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        inference: Inference = Inference(),  # noqa: B008  (never changed)
        ignore_index: int = 255,
        **options: Any,
    ):
        super().__init__(**options)
        if decoder_options is None:
            decoder_options = {"decoder_channels": 64} if decoder == "upernet" else {}
            if decoder in SEGMENTERS:
                decoder_options = dict(SEGMENTERS[decoder].narrow)
        if decoder in SEGMENTERS and SEGMENTERS[decoder].masks:
            self.recipe = SET_PREDICTION
            self.signals = ("maps",)  # pixels have no logits there
        classes = self.hparams["num_classes"]
        backbone = in_channels(backbone, self.reading)
        self.model = build_segmenter(decoder, backbone=backbone, num_classes=classes, aux=aux, **decoder_options)
        self.inference = Inference(**inference) if isinstance(inference, Mapping) else inference
        self.remember(
            backbone,
            decoder=decoder,
            decoder_options=decoder_options,
            aux=aux,
            loss=loss,
            loss_options=loss_options or {},
            class_weights=class_weights,
            mixup=mixup,
            cutmix=cutmix,
            mixup_prob=mixup_prob,
            mixup_switch_prob=mixup_switch_prob,
            inference=asdict(self.inference),
            ignore_index=ignore_index,
        )
        self.mix = make_mixup(self.hparams, classes)
        self.normalise = Normalise(self.model.inner_backbone)
        #: what a pixel can be: of which class, or, where there is only one, of it or not
        self.outcomes = self.class_names if classes > 1 else [REST, *self.class_names]
        self.loss = self._make_loss(None if class_weights == "balanced" else class_weights)
        self.confusion = MulticlassConfusionMatrix(len(self.outcomes), ignore_index=ignore_index, validate_args=False)

    @classmethod
    def check_options(cls, options: Any) -> None:
        super().check_options(options)
        check_options(options.decoder, options.decoder_options or {})
        SegmentationLoss(options.loss, options.loss_options)
        if options.decoder in SEGMENTERS and SEGMENTERS[options.decoder].masks:
            usual = {"loss": "ce", "loss_options": None, "class_weights": None, "aux": False, "mixup": 0, "cutmix": 0}
            for name, value in usual.items():
                if getattr(options, name) not in (value, {}):
                    raise InputError(f"{options.decoder} has losses of its own: leave model.{name} out")
        Inference(**vars(options.inference))

    @classmethod
    def map_indices(cls, options: Mapping[str, Any], strides: Mapping[int, int]) -> list[int]:
        return map_indices(strides, options["decoder"], **(options["decoder_options"] or {}))

    def describe(self) -> str:
        return f"{self.hparams['decoder']} on {self.hparams['backbone']['name']}"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.hparams["class_weights"] == "balanced":
            data = self.data
            if not isinstance(data, SegmentationData):
                raise InputError("class_weights='balanced' counts the pixels of SegmentationData; give a list instead")
            self.hparams["class_weights"] = balanced_weights(data.count_pixels("train"))
            self.loss = self._make_loss(self.hparams["class_weights"])

    def _make_loss(self, class_weights: Sequence[float] | None) -> SegmentationLoss:
        if class_weights is not None and len(class_weights) != len(self.outcomes):
            raise InputError(
                f"class_weights: {len(class_weights)} numbers for {len(self.outcomes)} classes, which are "
                f"{', '.join(self.outcomes)}"
            )
        options = self.hparams
        binary = len(self.class_names) == 1
        return SegmentationLoss(
            options["loss"], options["loss_options"], options["ignore_index"], class_weights, binary
        )

    def forward(self, images: torch.Tensor) -> Any:
        logits = super().forward(images)
        return tuple(map(self._as_pair, logits)) if isinstance(logits, tuple) else self._as_pair(logits)

    def _as_pair(self, logits: torch.Tensor) -> torch.Tensor:
        """A single class's logit x (B, 1, H, W) as (0, x), whose softmax is the sigmoid of x; others as they are."""
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if len(self.class_names) == 1 else logits

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        images, masks = batch
        if hasattr(self.model, "losses"):
            parts = self.model.losses(self.normalise(images), masks, self.hparams["ignore_index"])
            for name, part in parts.items():
                self.log_loss(name, part.detach(), len(images))
            loss = self.taught(sum(parts.values()), len(images))
            self.log_loss("train_loss", loss, len(images))
            return loss
        told = [(1.0, masks)]
        if self.mix is not None:
            images, told = mix_masks(self.mix, images, masks)
        logits = self(images)
        if self.hparams["aux"]:
            logits, aux = logits
            loss = mixed_loss(self.loss, logits, told) + AUX_WEIGHT * mixed_loss(self.loss, aux, told)
        else:
            loss = mixed_loss(self.loss, logits, told)
        if self.lesson is not None:
            counted = sum(share * (mask != self.hparams["ignore_index"]) for share, mask in told)
            loss = self.taught(loss, len(images), logits, images, counted)
        self.log_loss("train_loss", loss, len(images))
        return loss

    def save_picture(self, file: Path, samples: Sequence[Batch]) -> None:
        logits = [self.inference.logits(self, image[None].to(self.device)) for image, _ in samples]
        predictions = [scores.argmax(1)[0].cpu().numpy() for scores in logits]
        images = [self.reading.picture(image) for image, _ in samples]
        truths = [mask.numpy() for _, mask in samples]
        save_predictions(file, images, truths, predictions, self.outcomes, self.hparams["ignore_index"])

    @classmethod
    def add_predict_options(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        trained = "as in training unless given"
        add("--window", type=_side, help=f"larger images are taken in windows of this side; {trained}, or {WINDOW}")
        add("--overlap", type=_share, help=f"share of a window that its neighbour covers, too; {trained}")
        add("--scales", type=_scale, nargs="+", help=f"average over images resized by these factors; {trained}")
        add("--flip", action=argparse.BooleanOptionalAction, help=f"average over mirrored images, too; {trained}")
        add(
            "--mask_format",
            choices=("png", "tif"),
            default="png",
            help="tif: read images in windows, and write tiled masks that keep the georeference, with reduced "
            "overlays, in memory that the height of an image does not change; so it is always with images over "
            "PIL.Image.MAX_IMAGE_PIXELS, 89 million pixels",
        )

    def predict_image(self, image: np.ndarray, options: argparse.Namespace) -> tuple[dict[str, Image.Image], None]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        bands = self._label(lambda top, bottom: pixels[..., top:bottom, :], pixels.shape[-2:], options)
        return self._pictures(image, np.concatenate(list(bands))), None

    def results(
        self, image: np.ndarray, output: torch.Tensor, options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], None]:
        return self._pictures(image, self._as_pair(output[None])[0].argmax(0).cpu().numpy()), None

    def _pictures(self, image: np.ndarray, mask: np.ndarray) -> dict[str, Image.Image]:
        colours = palette(len(self.outcomes))
        return {
            "overlays": Image.fromarray(overlay(self.reading.picture(image), mask, colours)),
            "masks": index_png(mask, colours),
        }

    def predict_file(self, file: Path, place: Callable[[str, str], Path], options: argparse.Namespace) -> Any:
        """As `Task` does; what is large, or wanted as TIFF, is read and written in windows."""
        large = is_large(file)
        if not large and options.mask_format == "png":
            return super().predict_file(file, place, options)
        try:
            raster = Raster(file, self.reading)
        except MissingDependency as error:
            if options.mask_format == "tif":
                raise
            raise UnreadableImage(str(error)) from error  # other images may well be read
        colours = palette(len(self.outcomes))
        bar = tqdm(total=0, desc=file.name, unit="row", leave=False, disable=None)
        with raster, bar:
            bar.reset(total=raster.height)

            def rows(top: int, bottom: int) -> torch.Tensor:
                bar.update(top - bar.n)
                return torch.from_numpy(raster.rows(top, bottom)).permute(2, 0, 1)[None]

            mask = place("masks", ".tif")
            raster.write(mask, self._label(rows, (raster.height, raster.width), options), colours)
            raster.overlay(mask, colours).save(place("overlays", ".png"))

    def _label(
        self, rows: Callable[[int, int], torch.Tensor], size: tuple[int, int], options: argparse.Namespace
    ) -> Iterator[np.ndarray]:
        """Class indices of an image in bands of rows (rows, W); `rows` gives it as (1, C, rows, W)."""
        given = {name: getattr(options, name) for name in ("window", "overlap", "scales", "flip")}
        told = asdict(self.inference) | {name: value for name, value in given.items() if value is not None}
        inference = Inference(**told)
        dtype = torch.uint8 if len(self.class_names) <= 256 else torch.int32
        bands = slide(
            lambda part: average(self, to_unit(part.to(self.device)), inference.scales, inference.flip),
            rows,
            size,
            inference.window or WINDOW,
            inference.overlap,
            reduce=lambda probabilities: probabilities.argmax(1).to(dtype),
        )
        return (band[0].cpu().numpy() for band in bands)

    def evaluate(self, batch: Batch, split: str) -> None:
        images, masks = batch
        logits = self.inference.logits(self, images)
        self.confusion.update(logits.argmax(1), masks)
        # image by image: the mean over a batch would depend on which images are in it
        losses = [self.loss(*pair) for pair in zip(logits.split(1), masks.split(1), strict=True)]
        self.log_loss(f"{split}_loss", torch.stack(losses).mean(), len(images))

    def finish(self, split: str) -> dict[str, torch.Tensor]:
        matrix = self.confusion.compute().double()  # rows are the truth
        self.confusion.reset()
        hits = matrix.diag()
        union = matrix.sum(0) + matrix.sum(1) - hits
        iou = hits / union  # nan for a class that is neither there nor predicted; it does not count
        iou = iou[-len(self.class_names) :]  # of a single class, not of the rest
        scores = {"mIoU": iou.nanmean(), "pixel_acc": hits.sum() / matrix.sum()}  # nan where no pixel counts
        return scores | {f"IoU_{name}": value for name, value in zip(self.class_names, iou, strict=True)}


def _side(text: str) -> int:
    if int(text) < MIN_WINDOW:
        raise argparse.ArgumentTypeError(f"{text} must be at least {MIN_WINDOW}")
    return int(text)


def _scale(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} must be over 0")
    return float(text)


def _share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to under 1")
    return float(text)
