"""Several tasks on one backbone: what each has for itself, under one training, one checkpoint and one prediction."""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from backbones.errors import InputError

from ..data.reading import Reading, in_channels, to_unit
from ..models.multitask import MultiTaskModel, check_options, share_backbone
from .callbacks import find_unused
from .classification import ClassificationTask
from .detection import DetectionTask
from .multitask_data import HEADS, MultiTaskData, read_heads
from .recipes import Recipe
from .task import Task

Batch = Mapping[str, Any]


class MultiTask(Task):
    """Several heads on one backbone and all that their training needs, each by the task that it would be alone.

    Called in eval mode, with a list of images (C, H, W) in [0, 1] or a batch of them, it returns what each head says
    by its name, in one pass of the backbone; see `heads.MultiTaskModel`.

    Args:
        backbone: a name, or a dict of `build_backbone` options that includes "name"; it has the maps that heads take
        heads: by name, a dict of "task" ("detection", "segmentation" or "classification"), the options of that task's
            model as `backbones fit TASK --help` lists them, and, if need be, "weight", the factor to its loss (1), and
            "out_indices", the maps of the backbone that it takes
        image_size: longer side in pixels that images are brought to when they are measured and predicted on, so that
            one pass serves all heads; by default what detectors bring them to, or their own size where there are none
        facts: what the data of each head decide, such as its classes
        **options: those of `Task`
    """

    name = "multitask"
    data_class = MultiTaskData
    linked = ("num_classes", "class_names", "facts")
    metric = "mean_score"
    scores = ("mean_score",)
    epochs = 6
    predicts = (
        "Label images by all heads of a model, in one pass of its backbone; writes a folder OUT/HEAD with the pictures "
        "that the head's task writes, and OUT/results.json with what it lists, by head."
    )

    def __init__(
        self,
        backbone: str | dict[str, Any] = "pvt_v2_b0",
        heads: dict[str, dict[str, Any]] = HEADS,
        image_size: int | None = None,
        facts: dict[str, dict[str, Any]] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        read = read_heads(heads)
        facts = facts or {}
        readings = [Reading(**(facts.get(name, {}).get("reading") or {})) for name in read]
        if any(reading != readings[0] for reading in readings):
            raise InputError(
                "the heads read images differently, and one pass has one way: give all their data the same range, "
                "bands, nodata, mean and std"
            )
        self.reading = readings[0]
        self.hparams["reading"] = self.reading.plain()
        backbone = in_channels(backbone, self.reading)
        shared, maps = share_backbone(
            backbone,
            {
                name: head.out_indices or (lambda strides, head=head: head.task.map_indices(head.options, strides))
                for name, head in read.items()
            },
        )
        self.parts = nn.ModuleDict(
            {
                name: head.task(backbone=maps[name], layer_decay=1.0, **head.options, **facts.get(name, {}))
                for name, head in read.items()
            }
        )
        self.model = MultiTaskModel(shared, {name: part.model for name, part in self.parts.items()}, image_size)
        for name, part in self.parts.items():
            part.within = (self, name)
            part.__dict__["model"] = part._modules.pop("model")  # a mere reference: moved and saved once
        self.weights = {name: head.weight for name, head in read.items()}
        self.scores = (self.metric, *(f"{name}/{part.metric}" for name, part in self.parts.items()))
        recipes: list[Recipe] = [part.recipe for part in self.parts.values()]
        self.recipe = min(recipes, key=lambda recipe: recipe.lr)  # that of the head that has to go slowest
        self.remember(backbone, image_size=image_size, facts=facts)
        self._remember_heads(heads)

    def _remember_heads(self, heads: Mapping[str, Mapping[str, Any]]) -> None:
        """With the options that their tasks have decided on, defaults included."""
        read = read_heads(heads)
        resolved = {
            name: {**heads[name], **{option: self.parts[name].hparams[option] for option in head.options}}
            for name, head in read.items()
        }
        self.save_hyperparameters({"heads": resolved}, logger=False)

    @classmethod
    def check_options(cls, options: Any) -> None:
        super().check_options(options)
        alone = {"teacher": None, "distill": None}  # which all heads have in common
        for name, head in read_heads(options.heads).items():
            defaults = {
                n: p.default for n, p in inspect.signature(head.task).parameters.items() if n in head.task.alone
            }
            try:
                head.task.check_options(
                    jsonargparse.Namespace({**vars(options), **alone, **defaults, **vars(head.parsed.model)})
                )
            except InputError as error:
                raise InputError(f"the head {name!r}: {error}") from error
            check_options(name, head.options.get("detector_options") or {})

    @classmethod
    def check_arguments(cls, arguments: Sequence[str]) -> None:
        for argument in arguments:
            section, _, rest = argument.partition(".heads.")
            if section in ("--model", "--data") and "." in rest.partition("=")[0]:
                name = rest.partition(".")[0]
                raise InputError(
                    f"{argument}: on the command line a head is given whole, {section}.heads.{name} '{{...}}', and "
                    "replaces that of the config"
                )

    @classmethod
    def link(cls, parser: Any) -> None:
        parser.link_arguments("model.heads", "data.tasks")

    def describe(self) -> str:
        return ", ".join(f"{name}: {part.describe()}" for name, part in self.parts.items())

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Names by label, by head."""
        return {name: part.class_names for name, part in self.parts.items()}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for name, part in self.parts.items():
            part.trainer = self.trainer
            part.folder = None if self.folder is None else self.folder / name
            part.setup(stage)
        self._remember_heads(self.hparams["heads"])
        if stage == "fit" and self.data.order != "mixed":  # a step is one head's
            find_unused(self.trainer)

    def forward(self, images: Sequence[Tensor] | Tensor) -> dict[str, Any]:
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = {name: self.parts[name].training_step(part, batch_idx) for name, part in batch.items()}
        loss = self.taught(sum(self.weights[name] * loss for name, loss in losses.items()), 1)
        self.log_loss("train_loss", loss, 1)
        return loss

    def start(self, split: str) -> None:
        for part in self.parts.values():
            part.start(split)

    def evaluate(self, batch: Batch, split: str) -> None:
        for name, part in batch.items():
            self.parts[name].evaluate(part, split)

    def finish(self, split: str) -> dict[str, Any]:
        found = {name: part.finish(split) for name, part in self.parts.items()}
        metrics = [float(scores[self.parts[name].metric]) for name, scores in found.items()]
        named = {f"{name}/{score}": value for name, scores in found.items() for score, value in scores.items()}
        return {self.metric: torch.tensor(metrics).nanmean(), **named}

    def save_results(self, folder: Path, split: str) -> None:
        for name, part in self.parts.items():
            part.save_results(folder / name, split)

    def pictured(self, count: int) -> dict[str, Any]:
        return {name: part.pictured(count) for name, part in self.parts.items()}

    def save_picture(self, file: Path, samples: Mapping[str, Any]) -> None:
        pictures = []
        for name, part in self.parts.items():
            content = BytesIO()
            part.save_picture(content, samples[name])
            pictures.append(Image.open(content).convert("RGB"))
        page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
        top = 0
        for name, picture in zip(self.parts, pictures, strict=True):
            page.paste(picture, ((page.width - picture.width) // 2, top))
            ImageDraw.Draw(page).text((12, top + 6), name, "black", ImageFont.load_default(size=20))
            top += picture.height
        page.save(file, format="PNG")

    @classmethod
    def add_predict_options(cls, parser: argparse.ArgumentParser) -> None:
        DetectionTask.add_predict_options(parser.add_argument_group("heads of detection"))
        ClassificationTask.add_predict_options(parser.add_argument_group("heads of classification"))

    def predict_image(
        self, image: np.ndarray, options: argparse.Namespace
    ) -> tuple[dict[str, Image.Image], dict[str, Any] | None]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        outputs = self([to_unit(pixels.to(self.device))])
        pictures, results = {}, {}
        for name, part in self.parts.items():
            drawn, listed = part.results(image, outputs[name][0], options)
            pictures |= {f"{name}/{folder}": picture for folder, picture in drawn.items()}
            if listed is not None:
                results[name] = listed
        return pictures, results or None

    def check_prediction(self, options: argparse.Namespace) -> None:
        for part in self.parts.values():
            part.check_prediction(options)

    def listed(self, result: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
        return {name: self.parts[name].listed(own, options) for name, own in result.items()}

    def save_predictions(self, folder: Path, results: Mapping[str, Any], options: argparse.Namespace) -> list[Path]:
        written = []
        for name, part in self.parts.items():
            own = {image: result[name] for image, result in results.items() if name in result}
            written += part.save_predictions(folder / name, own, options)
        return written
