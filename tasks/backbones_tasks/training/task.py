"""What every task shares: its model, optimizer, schedule, seeds and scores, under pytorch-lightning."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from pytorch_lightning.trainer.states import TrainerFn
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
from ..models.base import HoldsBackbone
from ..ranges import check_ranges
from .distillation import Lesson, Signal, Student, Taught
from .optimizers import check_multipliers, check_optimizer, differentiable_twice, is_second_order, make_optimizer
from .recipes import Recipe
from .schedules import Plateau, make_schedule
from .teachers import TeacherLike, find_teacher


class Task(Student):
    """A model and all that its training needs; one subclass for each of `training.tasks.TASKS`.

    Args:
        optimizer: one of timm's, by name; "lookahead_NAME" looks ahead with any of them
        optimizer_options: its own, such as `betas` or `momentum`, and `lookahead_alpha` and `lookahead_k`
        lr: learning rate of the last layers, after warm-up; 1e-3 unless given, 2e-4 for heads of transformers
        weight_decay: norms, biases and position tables have none; 0.05 unless given, 1e-4 for heads of transformers
        layer_decay: factor to the learning rate per layer towards the input, 1 for none. Unless given: what
            `backbones info NAME` tells, 0.75 for most plain vision transformers, if the backbone starts from published
            weights and `backbone_lr` is 1; else none
        backbone_lr: factor to the learning rate of all that published weights hold; 0.1 to 0.5 suits fine-tuning. 1
            unless given; 0.1 for heads of transformers on published weights without a `layer_decay`
        lr_multipliers: factors to the learning rate of parameters, by a part of their names or a regular expression,
            such as {pos_embed: 0.1, "patch_embed|cls_token": 0.5}; of several that fit, the product
        freeze_epochs: how many epochs the backbone stays as it is, in eval mode and without gradients, while the rest
            trains
        unfreeze_every: after those, its deepest stage trains, and one more every so many epochs, the stem last; 0
            thaws all at once
        schedule: how the learning rate falls, step by step: one of timm's, by name; or "plateau", by the score of each
            validation
        schedule_options: its own, as `timm.scheduler.create_scheduler_v2` has them, such as `decay_rate`, which is the
            exponent of "poly" (0.9 unless given), or `decay_milestones` in epochs; `cycle_limit` cycles, each
            `cycle_mul` times as long as the last, fill the training. "plateau" takes `monitor`, a score or val_loss
        warmup: share of all steps in which the learning rate rises linearly
        warmup_epochs: the same in epochs, in place of `warmup`
        warmup_steps: the same in steps of the optimizer
        warmup_lr: what it rises from; a hundredth of `lr` unless given
        ema: decay of a moving average of the weights, which is then what is measured and saved; 0 is off, 0.999 to
            0.9999 are usual
        teacher: a frozen model to learn from: a checkpoint of a run, or a backbone by name or options, with published
            weights unless told which
        distill: what of it, beside the labels. Of classifiers (by the second head of distilled ones) and segmenters:
            "soft", its logits at a temperature, or "hard", the class that it says. Of all but classifiers: "maps", its
            backbone's, through 1 x 1 convolutions. By default logits, if it has any
        distill_weight: factor to the loss by the teacher, which is added to that by the labels
        distill_temperature: of soft logits
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
    model: HoldsBackbone
    #: Where results go that are more than scores; None for nowhere.
    folder: Path | None = None
    #: What heads are trained with, unless told.
    recipe: Recipe = Recipe()
    #: Whether the optimizer differentiates gradients.
    second_order = False
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
        lr_multipliers: dict[str, float] | None = None,
        freeze_epochs: int = 0,
        unfreeze_every: int = 0,
        schedule: str = "cosine",
        schedule_options: dict[str, Any] | None = None,
        warmup: float = 0.1,
        warmup_epochs: float | None = None,
        warmup_steps: int | None = None,
        warmup_lr: float | None = None,
        ema: float = 0.0,
        teacher: TeacherLike | None = None,
        distill: Signal | None = None,
        distill_weight: float = 1.0,
        distill_temperature: float = 1.0,
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
                "lr_multipliers": lr_multipliers or {},
                "freeze_epochs": freeze_epochs,
                "unfreeze_every": unfreeze_every,
                "schedule": schedule,
                "schedule_options": schedule_options or {},
                "warmup": warmup,
                "warmup_epochs": warmup_epochs,
                "warmup_steps": warmup_steps,
                "warmup_lr": warmup_lr,
                "ema": ema,
                "num_classes": num_classes,
                "class_names": class_names or [f"class {i}" for i in range(num_classes)],
                "reading": self.reading.plain(),
                "seed": seed,
            },
            logger=False,
        )
        if teacher is not None:  # which no checkpoint needs
            self.lesson = Lesson(teacher, distill, distill_weight, distill_temperature)
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
        if options.teacher is not None:
            find_teacher(options.teacher)  # refused here, if there is none
        elif options.distill is not None:
            raise InputError(f"model.distill={options.distill} needs a teacher: give model.teacher")
        check_optimizer(vars(options))
        cls.check_schedule(options, epochs=1000)

    @classmethod
    def check_schedule(cls, options: Any, epochs: int) -> None:
        """Raise InputError for a schedule that cannot be had in so many epochs."""
        told = {**vars(options), "lr": 1.0}
        nothing = SGD([nn.Parameter(torch.ones(1))], lr=1.0)  # drawn by no generator: what is checked changes no model
        make_schedule(told, nothing, steps=100 * epochs, epochs=epochs)

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
        check_multipliers(self.model, self.hparams["lr_multipliers"])
        built = {**inner.implied_options, **{k: v for k, v in built.items() if k not in weights}}
        built["pretrained_cfg"] = json_values(inner.pretrained_cfg)  # images are normalised as those weights want it
        self.save_hyperparameters({"backbone": {**built, "name": inner.canonical_name}, **options}, logger=False)
        self.meet_teacher()

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
        """The optimizer of all that is trained, by the options."""
        return make_optimizer(self.model, self.hparams, self.imitation and Taught(self.model, self.imitation))

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and timm's schedule step by step."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise InputError("the schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        self.trainer.fit_loop.setup_data()  # with --trainer.max_steps, nobody has counted the batches yet
        optimizer = self.make_optimizer()
        epochs = steps / math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        if is_second_order(optimizer):
            if self.trainer.world_size > 1:
                raise InputError(f"model.optimizer={self.hparams['optimizer']!r} cannot be shared by several processes")
            self.second_order, self.training_step = True, differentiable_twice(self.training_step)
        scheduler = make_schedule(self.hparams, optimizer, steps, epochs, self.metric)
        if scheduler is None:  # "none"; schedules scale by layer
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        super().backward(loss, *args, **options, **({"create_graph": True} if self.second_order else {}))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip = self.recipe.clip if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm=gradient_clip_algorithm)

    def on_validation_end(self) -> None:
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            for scheduler in schedulers:
                if isinstance(scheduler, Plateau):
                    scheduler.judge(self.trainer.callback_metrics, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["task"] = self.name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        require_whole(self, checkpoint["state_dict"], "the checkpoint")  # before Lightning changes anything
        if self.hparams["schedule"] != "plateau":
            # a function of the step alone; restoring its state would undo a changed --trainer.max_epochs
            checkpoint["lr_schedulers"] = []
