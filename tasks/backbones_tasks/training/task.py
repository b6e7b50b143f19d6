"""What every task shares: its model, optimizer, schedule, seeds and scores, under pytorch-lightning."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from backbones import backbone_info
from backbones.compiling import compile_blocks
from backbones.errors import InputError
from backbones.plain import json_values
from backbones.weights import require_whole

from ..data.images import UNREADABLE, UnreadableImage
from ..data.loading import mix
from ..data.reading import Reading
from ..files import whole
from ..options import nearest
from ..ranges import check_ranges


@dataclass(frozen=True)
class Recipe:
    """What training goes by, unless told.

    lr, weight_decay: of all but norms, biases and position tables. published_lr: factor for what published weights
    hold. clip: the greatest norm of all gradients.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    published_lr: float = 1.0
    clip: float = 1.0


#: For what is trained by matching sets of predictions: DETR's norm, and about its rates.
SET_PREDICTION = Recipe(lr=2e-4, weight_decay=1e-4, published_lr=0.1, clip=0.1)


class Task(LightningModule):
    """A model and all that its training needs; one subclass for each of `training.tasks.TASKS`.

    Args:
        optimizer: one of timm's, by name
        optimizer_options: its own, such as `betas` or `momentum`
        lr: learning rate of the last layers, after warm-up; 1e-3 unless given, 2e-4 for heads of transformers
        weight_decay: norms, biases and position tables have none; 0.05 unless given, 1e-4 for heads of transformers
        layer_decay: factor to the learning rate per layer towards the input, 1 for none. Unless given: what
            `backbones info NAME` tells, 0.75 for most plain vision transformers, if the backbone starts from published
            weights and `backbone_lr` is 1; else none
        backbone_lr: factor to the learning rate of all that published weights hold; 0.1 to 0.5 suits fine-tuning. 1
            unless given; 0.1 for heads of transformers on published weights without a `layer_decay`
        freeze_epochs: how many epochs the backbone stays as it is, in eval mode and without gradients, while the rest
            trains
        unfreeze_every: after those, its deepest stage trains, and one more every so many epochs, the stem last; 0
            thaws all at once
        schedule: how the learning rate falls, step by step: one of timm's, by name
        schedule_options: its own, as `timm.scheduler.create_scheduler_v2` has them, such as `decay_rate`, which is the
            exponent of "poly" (0.9 unless given), or `decay_milestones` in epochs
        warmup: share of all steps in which the learning rate rises linearly
        ema: decay of a moving average of the weights, which is then what is measured and saved; 0 is off, 0.999 to
            0.9999 are usual
        num_classes: number of classes
        class_names: their names
        reading: how image files are read, in training and in prediction; see `data.reading.Reading`
        compile: compile the blocks of the model for training, for images of any size; the first steps take minutes, and
            checkpoints are as without
        seed: decides drop path and dropout, step by step, so that a resumed run equals an uninterrupted one
    """

    #: What the user calls it.
    name: ClassVar[str]
    #: Where its images come from.
    data_class: ClassVar[type[LightningDataModule]]
    #: Options that the data decide.
    linked: ClassVar[tuple[str, ...]] = ("num_classes", "class_names", "reading")
    #: Options that have no meaning for one head among others.
    alone: ClassVar[tuple[str, ...]] = ()
    #: What the best checkpoint has most of.
    metric: ClassVar[str]
    #: Scores from 0 to 1 to be shown after each epoch, the metric among them.
    scores: ClassVar[tuple[str, ...]]
    #: How many epochs, unless told.
    epochs: ClassVar[int]
    #: What prediction does to images, and what it writes.
    predicts: ClassVar[str]

    #: What is trained; its `backbone` is the backbone.
    model: nn.Module
    #: Where results go that are more than scores; None for nowhere.
    folder: Path | None = None
    #: What heads are trained with, unless told.
    recipe: Recipe = Recipe()
    #: The task that this is a head of, if it is, and the head's name.
    within: tuple["Task", str] | None = None

    def __init__(
        self,
        *,
        optimizer: str = "adamw",
        optimizer_options: dict[str, Any] | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        layer_decay: float | None = None,
        backbone_lr: float | None = None,
        freeze_epochs: int = 0,
        unfreeze_every: int = 0,
        schedule: str = "cosine",
        schedule_options: dict[str, Any] | None = None,
        warmup: float = 0.1,
        ema: float = 0.0,
        num_classes: int = 2,
        class_names: list[str] | None = None,
        reading: dict[str, Any] | None = None,
        compile: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.reading = Reading(**(reading or {}))
        self.compiles = compile
        self.save_hyperparameters(
            {
                "optimizer": optimizer,
                "optimizer_options": optimizer_options or {},
                "lr": lr,
                "weight_decay": weight_decay,
                "layer_decay": layer_decay,
                "backbone_lr": backbone_lr,
                "freeze_epochs": freeze_epochs,
                "unfreeze_every": unfreeze_every,
                "schedule": schedule,
                "schedule_options": schedule_options or {},
                "warmup": warmup,
                "ema": ema,
                "num_classes": num_classes,
                "class_names": class_names or [f"class {i}" for i in range(num_classes)],
                "reading": self.reading.plain(),
                "seed": seed,
            },
            logger=False,
        )
        self.normalise: nn.Module = nn.Identity()  # what `model` wants of images in [0, 1]

    # What a task says

    @classmethod
    def check_options(cls, options: Any) -> None:
        """Raise InputError for options that cannot work, as far as that is known without building anything."""
        backbone = options.backbone
        name = backbone if isinstance(backbone, str) else backbone.get("name")
        if name is None:
            raise InputError(f'model.backbone: the options {sorted(backbone)} lack "name"')
        backbone_info(name)  # an unknown name is refused here, with the nearest one
        optimizers = list_optimizers()
        if options.optimizer.lower() not in optimizers:
            raise InputError(
                f"model.optimizer={options.optimizer!r} is unknown; {nearest(options.optimizer, optimizers)}"
            )
        own = options.optimizer_options or {}
        parameters = nn.Linear(1, 1)
        try:
            create_optimizer_v2(parameters, options.optimizer, options.lr or 1.0, options.weight_decay or 0.0, **own)
        except (TypeError, ValueError, AssertionError, LookupError) as error:
            raise InputError(f"model.optimizer={options.optimizer!r}, optimizer_options={own}: {error}") from error
        make_schedule({**vars(options), "lr": 1.0}, SGD(parameters.parameters(), lr=1.0), steps=10, epochs=2)

    @classmethod
    def check_arguments(cls, arguments: Sequence[str]) -> None:
        """Raise InputError for what would be taken in another way than it is meant."""

    @classmethod
    def link(cls, parser: Any) -> None:
        """Link options of the data to those of the model, beside `linked`, on jsonargparse's parser."""

    @classmethod
    def map_indices(cls, options: Mapping[str, Any], strides: Mapping[int, int]) -> list[int]:
        """Which of a backbone's maps its model takes, given the stride of each by its index."""
        raise NotImplementedError

    def start(self, split: str) -> None:
        """Begin to measure on "val" or "test"."""

    def evaluate(self, batch: Any, split: str) -> None:
        """Measure a batch; a loss, if there is one, is logged as `val_loss` or `test_loss`."""
        raise NotImplementedError

    def finish(self, split: str) -> dict[str, Any]:
        """The scores of all batches since `start`."""
        raise NotImplementedError

    def save_results(self, folder: Path, split: str) -> None:
        """Write into a folder what there is to the scores of `finish`; every process calls."""

    def describe(self) -> str:
        """What is trained, in a few words."""
        raise NotImplementedError

    def save_picture(self, file: Path, samples: Sequence[Any]) -> None:
        """Write a picture of the validation data set's samples beside their truth and the prediction."""
        raise NotImplementedError

    @classmethod
    def add_predict_options(cls, parser: argparse.ArgumentParser) -> None:
        """Options of `backbones predict` that only this task has."""

    def predict_image(
        self, image: np.ndarray, options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], dict[str, Any] | None]:
        """What to write for an image (H, W, C), as it is read: a picture per folder, and what results.json lists."""
        raise NotImplementedError

    def results(
        self, image: np.ndarray, output: Any, options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], list[Any] | None]:
        """The same, given what `model` says of the image."""
        raise NotImplementedError

    def predict_file(
        self, file: Path, place: Callable[[str, str], Path], options: argparse.Namespace
    ) -> dict[str, Any] | list[Any] | None:
        """Predict on an image file, and write pictures where `place(folder, suffix)` says.

        Returns:
            an entry of results.json, if any

        Raises:
            UnreadableImage: the file cannot be read
        """
        try:
            image = self.reading.read(file)
        except UNREADABLE as error:
            raise UnreadableImage(str(error)) from error
        pictures, result = self.predict_image(image, options)
        for folder, picture in pictures.items():
            with whole(place(folder, ".png")) as unfinished:
                picture.save(unfinished)
        return result

    def check_prediction(self, options: argparse.Namespace) -> None:
        """Raise InputError for options of `backbones predict` that do not go with this model."""

    def listed(self, result: Any, options: argparse.Namespace) -> Any:
        """What results.json says of an image, given what `predict_image` returned."""
        return result

    def save_predictions(self, folder: Path, results: Mapping[str, Any], options: argparse.Namespace) -> list[Path]:
        """Write what there is beside results.json, given what `predict_image` returned of each image, by its name."""
        return []

    # What subclasses use

    def remember(self, backbone: str | Mapping[str, Any] | nn.Module, **options: Any) -> None:
        """Put into checkpoints what `model` was built of.

        They carry plain values, the backbone's full name, and what is to be known of the weights it began with, but
        no need for these. Where no `layer_decay` is given, what those call for is decided here.
        """
        built = dict(backbone) if isinstance(backbone, Mapping) else {"name": backbone}
        inner = self.model.inner_backbone
        weights = ("pretrained", *inner.weight_options)  # of which torchvision's `weights` is one
        published = any(built.get(name) for name in weights)
        for name in ("lr", "weight_decay"):
            if self.hparams[name] is None:
                options[name] = getattr(self.recipe, name)
        if self.hparams["backbone_lr"] is None:
            slow = published and self.hparams["layer_decay"] is None
            options["backbone_lr"] = self.recipe.published_lr if slow else 1.0
        if self.hparams["layer_decay"] is None:
            own = published and options.get("backbone_lr", self.hparams["backbone_lr"]) == 1
            options["layer_decay"] = inner.spec.layer_decay if own else 1.0
        check_ranges(self.name, "model", {**self.hparams, **options})
        built = {**inner.implied_options, **{k: v for k, v in built.items() if k not in weights}}
        built["pretrained_cfg"] = json_values(inner.pretrained_cfg)  # images are normalised as those weights want it
        self.save_hyperparameters({"backbone": {**built, "name": inner.canonical_name}, **options}, logger=False)

    def log_loss(self, name: str, loss: Tensor, batch_size: int) -> None:
        """The mean of a loss over the epoch."""
        bar = name == "train_loss"
        weight = float(batch_size)  # Lightning rounds the mean of integers over processes down
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=bar, batch_size=weight, sync_dist=True)

    def log_scores(self, scores: Mapping[str, Any]) -> None:
        """Scores of the whole epoch, the same on every process."""
        for name, value in scores.items():
            self.log(name, value, prog_bar=name == self.metric, sync_dist=True)

    def is_best(self, score: float) -> bool:
        """Whether an epoch of this score is the best yet; measuring a checkpoint always is, and NaN never."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            return True
        best = self.trainer.checkpoint_callback.best_model_score
        return math.isfinite(score) and (best is None or score > best)

    # Lightning

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.within is None:
            self.model.to(memory_format=torch.channels_last)
            if self.compiles:
                compile_blocks(self.model)

    def forward(self, images: Any) -> Any:
        """What the model says of images in [0, 1]; once trained, a head says it as in a pass that serves all heads."""
        if self.within is not None and not self.training:
            task, head = self.within
            return task.model(images, heads=[head])[head]
        return self.model(self.normalise(images))

    def log(self, name: str, value: Any, **options: Any) -> None:
        if self.within is None:
            super().log(name, value, **options)
        else:
            task, head = self.within
            task.log(f"{head}/{name}", value, **options)

    @property
    def data(self) -> LightningDataModule:
        """Where its images come from, as the trainer has them."""
        if self.within is None:
            return self.trainer.datamodule
        task, head = self.within
        return task.data.parts[head]

    @property
    def class_names(self) -> list[str]:
        return self.hparams["class_names"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # drop path and dropout draw from here on: the same in a resumed run as in an uninterrupted one
        torch.manual_seed(mix(self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank))

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1 and self.trainer.state.fn == TrainerFn.FITTING:
            # each process has seen images of its own; what is measured is what the first one saves
            distribute_bn(self.model, self.trainer.world_size)
        self.start("val")

    def on_test_epoch_start(self) -> None:
        self.start("test")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._conclude("val")

    def on_test_epoch_end(self) -> None:
        self._conclude("test")

    def _conclude(self, split: str) -> None:
        scores = self.finish(split)
        self.log_scores(scores)
        if self.folder is not None and self.is_best(scores[self.metric]):
            self.save_results(self.folder, split)

    def pictured(self, count: int) -> Any:
        """So many samples, evenly spread, of the validation data set, for `save_picture`."""
        dataset = self.data.datasets["val"]
        chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
        return [dataset[i] for i in chosen]

    def make_optimizer(self) -> Optimizer:
        """timm's optimizer; norms, biases and position tables do not decay, and layers have an `lr_scale` each."""
        options = self.hparams
        optimizer = create_optimizer_v2(
            self.model,
            opt=options["optimizer"],
            lr=options["lr"],
            weight_decay=options["weight_decay"],
            layer_decay=options["layer_decay"] if options["layer_decay"] < 1 else None,
            **options["optimizer_options"],
        )
        if options["backbone_lr"] != 1:
            published = set(self.model.backbone_parameters())
            for group in list(optimizer.param_groups):
                inside = [p for p in group["params"] if p in published]
                group["params"] = [p for p in group["params"] if p not in published]
                scale = options["backbone_lr"] * group.get("lr_scale", 1.0)
                optimizer.param_groups.append({**group, "params": inside, "lr_scale": scale})
            optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and timm's schedule step by step."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        self.trainer.fit_loop.setup_data()  # with --trainer.max_steps, nobody has counted the batches yet
        optimizer = self.make_optimizer()
        epochs = steps / math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        scheduler = make_schedule(self.hparams, optimizer, steps, epochs)
        if scheduler is None:  # "none"; schedules scale by layer
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip = self.recipe.clip if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm=gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = self.name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_whole(self, checkpoint["state_dict"], "the checkpoint")  # before Lightning changes anything
        # The schedule is a function of the step alone; restoring its state would undo a changed --trainer.max_epochs.
        checkpoint["lr_schedulers"] = []


def make_schedule(options: Mapping[str, Any], optimizer: Optimizer, steps: int, epochs: float) -> Scheduler | None:
    """timm's learning-rate schedule of a task's options, stepped by batch over all `steps`; None for "none"."""
    name = options["schedule"]
    own = {"decay_rate": 0.9} if name == "poly" else {}
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=epochs,
            warmup_epochs=options["warmup"] * epochs,
            warmup_lr=options["lr"] / 100,
            step_on_epochs=False,
            updates_per_epoch=steps / epochs,
            **own | (options["schedule_options"] or {}),
        )
    except (TypeError, ValueError, AssertionError) as error:  # a wrong option or name, or one that goes by epochs
        raise InputError(f"model.schedule={name!r}, schedule_options={options['schedule_options']}: {error}") from error
    if scheduler is None and name != "none":  # what timm has long said of a name that it does not know
        raise InputError(f"model.schedule={name!r}: Unknown scheduler")
    return scheduler


class Normalise(nn.Module):
    """Images in [0, 1] to what a backbone's weights were trained on.

    Args:
        backbone: its `pretrained_cfg` has mean and std per channel.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        for name in ("mean", "std"):
            value = torch.tensor(backbone.pretrained_cfg[name]).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).to(self.mean.dtype)  # as the weights, bf16-true among them
