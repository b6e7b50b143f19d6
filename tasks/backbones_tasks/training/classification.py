"""Classification: loss, scores, pictures and prediction of classifiers."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from backbones.errors import InputError

from ..data.classification import ClassificationData, evaluation_transform
from ..data.reading import in_channels, to_unit
from ..files import whole
from ..models.classifier import build_classifier, map_indices
from ..pictures.classification import save_confusion, save_labelled
from .mixing import make_mixup, mix_labels
from .normalisation import Normalise
from .task import Task

Batch = tuple[Tensor, Tensor]


class ClassificationTask(Task):
    """A classifier and all that its training needs.

    Called with images (B, C, H, W) in [0, 1] of any size, it returns logits (B, num_classes); distilled models in
    training mode, a pair of them.

    Args:
        backbone: a name, or a dict of `build_backbone` options that includes "name"
        pool: over the last map, or of ViT the class token (token, cls) or both; what the architecture was published
            with unless given
        drop_rate: dropout before the last layer
        label_smoothing: share of the target that is spread over all classes
        mixup: strength of mixing whole images, the alpha of a beta distribution; 0 is off
        cutmix: the same for pasting parts of images into others
        mixup_prob: probability that a batch is mixed, by either
        mixup_switch_prob: probability that it is by cutmix, where both are on
        image_size: side in pixels that images are brought to
        crop: share of their shorter side that is seen, training aside
        **options: those of `Task`
    """

    name = "classification"
    data_class = ClassificationData
    linked = (*Task.linked, "image_size", "crop")
    metric = "top1"
    scores = ("top1", "top5")
    signals = ("soft", "hard")
    epochs = 15
    predicts = "Tell the class of images; writes OUT/results.json with the likeliest classes of each."

    def __init__(
        self,
        backbone: str | dict[str, Any] = "pvt_v2_b0",
        pool: Literal["avg", "max", "avgmax", "catavgmax", "token", "cls", "both"] | None = None,
        drop_rate: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        image_size: int = 224,
        crop: float = 0.875,
        **options: Any,
    ):
        super().__init__(**options)
        classes = self.hparams["num_classes"]
        backbone = in_channels(backbone, self.reading)
        self.model = build_classifier(backbone=backbone, num_classes=classes, pool=pool, drop_rate=drop_rate)
        own = {"pool": pool, "drop_rate": drop_rate, "label_smoothing": label_smoothing}
        mixing = {"mixup": mixup, "cutmix": cutmix, "mixup_prob": mixup_prob, "mixup_switch_prob": mixup_switch_prob}
        self.remember(backbone, **own, **mixing, image_size=image_size, crop=crop)
        self.normalise = Normalise(self.model.backbone)
        self.mix = make_mixup(self.hparams, classes)
        self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)
        self.among_five = SumMetric()

    @classmethod
    def map_indices(cls, options: Mapping[str, Any], strides: Mapping[int, int]) -> list[int]:
        return map_indices(strides)

    def describe(self) -> str:
        return f"classifier on {self.hparams['backbone']['name']}"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mix is not None:
            images, labels = mix_labels(self.mix, images, labels)
        logits = self(images)
        heads = logits if isinstance(logits, tuple) else (logits,)
        smoothing = self.hparams["label_smoothing"] if labels.ndim == 1 else 0.0  # timm's mixed labels are smooth
        by_labels = heads if self.teacher is None else heads[:1]  # of a distilled one, the second has a teacher
        losses = [F.cross_entropy(head, labels, label_smoothing=smoothing) for head in by_labels]
        loss = self.taught(sum(losses) / len(losses), len(images), heads[-1], images)
        self.log_loss("train_loss", loss, len(images))
        return loss

    def named_teacher(self, options: Mapping[str, Any]) -> nn.Module:
        classes = len(self.class_names)
        model = build_classifier(backbone=options, num_classes=classes)
        report = model.backbone.load_report if model.head is None else None
        if report is None or report.missing or report.mismatched:
            raise InputError(
                f"model.teacher: {options['name']} has no published classifier of {classes} classes; give a checkpoint "
                "of a run on these data"
            )
        return nn.Sequential(Normalise(model.backbone), model)

    def save_picture(self, file: Path, samples: Sequence[Batch]) -> None:
        predictions = [self(image[None].to(self.device)).argmax(1).item() for image, _ in samples]
        save_labelled(
            file,
            [self.reading.picture(image) for image, _ in samples],
            [self.class_names[label] for _, label in samples],
            [self.class_names[label] for label in predictions],
        )

    @classmethod
    def add_predict_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--top", type=int, default=5, help="how many classes to name, the likeliest first")

    def predict_image(self, image: np.ndarray, options: argparse.Namespace) -> tuple[dict[str, Image.Image], list]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels = evaluation_transform(self.hparams["image_size"], self.hparams["crop"])(pixels)
        return self.results(image, self(to_unit(pixels[None].to(self.device)))[0], options)

    def results(
        self, image: np.ndarray, output: Tensor, options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], list[dict[str, Any]]]:
        shares = output.softmax(0)
        values, labels = shares.topk(min(options.top, len(shares)))
        names = [self.class_names[label] for label in labels]
        return {}, [{"class": n, "score": round(v, 4)} for n, v in zip(names, values.tolist(), strict=True)]

    def evaluate(self, batch: Batch, split: str) -> None:
        images, labels = batch
        logits = self(images)
        self.confusion.update(logits.argmax(1), labels)
        self.among_five.update(logits.topk(min(5, logits.shape[1])).indices == labels[:, None])
        self.log_loss(f"{split}_loss", F.cross_entropy(logits, labels), len(images))

    def finish(self, split: str) -> dict[str, Tensor]:
        matrix = self.confusion.compute()  # rows are the truth
        self.confusion.reset()
        five = self.among_five.compute()
        self.among_five.reset()
        scores = {"top1": matrix.diag().sum() / matrix.sum(), "top5": five / matrix.sum()}
        right = matrix.diag() / matrix.sum(1)  # nan for a class of which there is no image
        self.confused = matrix.cpu().numpy()
        return scores | {f"top1_{name}": share for name, share in zip(self.class_names, right, strict=True)}

    def save_results(self, folder: Path, split: str) -> None:
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with whole(folder / f"confusion_{split}.png") as unfinished:
                save_confusion(unfinished, self.confused, self.class_names)
