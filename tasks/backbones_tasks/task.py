"""Training of segmenters: loss, metrics, optimizer and schedule, under pytorch-lightning."""

from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from segmentation_models_pytorch.losses import DiceLoss
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from backbones.errors import InputError

from .data import mix
from .segmenter import build_segmenter

AUX_WEIGHT = 0.4  # as in PSPNet and in mmsegmentation's UPerNet


class SegmentationTask(LightningModule):
    """A segmenter and all that its training needs.

    Called with images (B, 3, H, W) in [0, 1] of any size, it returns logits (B, num_classes, H, W).

    Args:
        backbone: a name, or a dict of `build_backbone` options that includes "name"
        decoder: "upernet" or "smp/NAME"
        decoder_options: options of the decoder, such as `decoder_channels`; 64 of these in UPerNet where none are given
        aux: train a fully convolutional head on the stride-16 map as well
        dice: weight of a Dice loss beside the cross-entropy
        lr: learning rate of the last layers, after warm-up
        weight_decay: of AdamW; norms and biases have none
        layer_decay: factor to the learning rate per layer towards the input; 1 is off, 0.65 to 0.9 suits fine-tuning
        schedule: how the learning rate falls, step by step, to zero
        poly_power: exponent of the "poly" schedule
        warmup: share of all steps in which the learning rate rises linearly
        num_classes: number of classes
        class_names: their names
        ignore_index: value of pixels that neither train nor count
        seed: decides drop path and dropout, step by step, so that a resumed run equals an uninterrupted one
    """

    def __init__(
        self,
        backbone: str | dict[str, Any] = "pvt_v2_b0",
        decoder: str = "upernet",
        decoder_options: dict[str, Any] | None = None,
        aux: bool = False,
        dice: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        schedule: Literal["cosine", "poly"] = "cosine",
        poly_power: float = 0.9,
        warmup: float = 0.1,
        num_classes: int = 2,
        class_names: list[str] | None = None,
        ignore_index: int = 255,
        seed: int = 0,
    ):
        super().__init__()
        if decoder_options is None:
            decoder_options = {"decoder_channels": 64} if decoder == "upernet" else {}
        self.segmenter = build_segmenter(
            decoder, backbone=backbone, num_classes=num_classes, aux=aux, **decoder_options
        )
        # What a checkpoint carries: plain values, the backbone's full name, and no need for the weights it began with.
        options = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
        options = {k: v for k, v in options.items() if k != "pretrained"}
        self.save_hyperparameters(
            {
                "backbone": {**options, "name": self.segmenter.backbone.canonical_name},
                "decoder": decoder,
                "decoder_options": decoder_options,
                "aux": aux,
                "dice": dice,
                "lr": lr,
                "weight_decay": weight_decay,
                "layer_decay": layer_decay,
                "schedule": schedule,
                "poly_power": poly_power,
                "warmup": warmup,
                "num_classes": num_classes,
                "class_names": class_names or [f"class {i}" for i in range(num_classes)],
                "ignore_index": ignore_index,
                "seed": seed,
            },
            logger=False,
        )
        config = self.segmenter.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, -1, 1, 1))
        self.dice_loss = DiceLoss("multiclass", from_logits=True, ignore_index=ignore_index) if dice else None
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)

    @property
    def class_names(self) -> list[str]:
        return self.hparams["class_names"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.segmenter((images - self.mean) / self.std)

    def loss(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the pixels that count, plus the weighted Dice loss; zero where no pixel counts."""
        ignore_index = self.hparams["ignore_index"]
        count = (masks != ignore_index).sum().clamp(min=1)
        loss = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum") / count
        if self.dice_loss is not None:
            loss = loss + self.hparams["dice"] * self.dice_loss(logits, masks)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # drop path and dropout draw from here on: the same in a resumed run as in an uninterrupted one
        torch.manual_seed(mix(self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, masks = batch
        logits = self(images)
        if self.hparams["aux"]:
            logits, aux = logits
            loss = self.loss(logits, masks) + AUX_WEIGHT * self.loss(aux, masks)
        else:
            loss = self.loss(logits, masks)
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True
        )
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val_loss")

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test_loss")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics()

    def on_test_epoch_end(self) -> None:
        self._log_metrics()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a learning rate per layer, and a schedule per step, both timm's."""
        options = self.hparams
        optimizer = create_optimizer_v2(
            self.segmenter,
            opt="adamw",
            lr=options["lr"],
            weight_decay=options["weight_decay"],
            layer_decay=options["layer_decay"] if options["layer_decay"] < 1 else None,
        )
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        kind, extra = (
            (CosineLRScheduler, {})
            if options["schedule"] == "cosine"
            else (PolyLRScheduler, {"power": options["poly_power"]})
        )
        scheduler = kind(
            optimizer,
            t_initial=steps,
            warmup_t=round(options["warmup"] * steps),
            warmup_lr_init=options["lr"] / 100,
            t_in_epochs=False,
            **extra,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The schedule is a function of the step alone; restoring its state would undo a changed --trainer.max_epochs.
        checkpoint["lr_schedulers"] = []

    def _evaluate(self, batch: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
        images, masks = batch
        logits = self(images)
        self.confusion.update(logits.argmax(1), masks)
        self.log(name, self.loss(logits, masks), batch_size=len(images), sync_dist=True)

    def _log_metrics(self) -> None:
        matrix = self.confusion.compute().double()  # rows are the truth
        self.confusion.reset()
        hits = matrix.diag()
        union = matrix.sum(0) + matrix.sum(1) - hits
        iou = hits / union  # nan for a class that is neither there nor predicted; it does not count
        self.log("mIoU", iou.nanmean().nan_to_num(), prog_bar=True, sync_dist=True)
        self.log("pixel_acc", hits.sum() / matrix.sum().clamp(min=1), sync_dist=True)
        self.log_dict({f"IoU_{name}": value for name, value in zip(self.class_names, iou, strict=True)}, sync_dist=True)
