"""Knowledge distillation: a frozen teacher, and how far a student's logits or maps are from the teacher's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.errors import InputError

from ..data.reading import Reading
from ..models.base import HoldsBackbone
from .teachers import Teacher, TeacherLike, find_teacher

Signal = Literal["soft", "hard", "maps"]
_IMITATION = "imitation."  # before the names of what is in a student beside its model


@dataclass(frozen=True)
class Lesson:
    """What a student is taught: by whom, what of it, with which factor to the loss, at which temperature."""

    teacher: TeacherLike
    signal: Signal | None
    weight: float
    temperature: float


class Imitation(nn.Module):
    """1 x 1 convolutions from a student's maps to its teacher's, and how far these are apart, from 0 to 2.

    The distance is 1 - r, by Pearson's correlation of each channel over a batch, which no scale of the maps changes:
    PKD (https://arxiv.org/abs/2207.02039). It is measured in training mode whenever the student's backbone runs,
    on the images that it is given.

    Args:
        teacher: of maps, with `feature_info`
        backbone: the student's
        mean, std: by which the student's images are normalised

    Raises:
        InputError: there is no stride that both have
    """

    def __init__(self, teacher: Teacher, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.teacher = teacher
        own, theirs = backbone.feature_info, teacher.model.feature_info
        places = {stride: i for i, stride in enumerate(theirs.reduction())}
        #: of the student's maps and of the teacher's, those of one stride each
        self.pairs = [(i, places[stride]) for i, stride in enumerate(own.reduction()) if stride in places]
        if not self.pairs:
            raise InputError(
                f"model.teacher: its maps have the strides {theirs.reduction()}, the student's {own.reduction()}"
            )
        widths = [(own.channels()[i], theirs.channels()[k]) for i, k in self.pairs]
        self.projections = nn.ModuleList(nn.Conv2d(width, theirs, 1) for width, theirs in widths)
        config = teacher.model.pretrained_cfg
        values = zip(mean, std, config["mean"], config["std"], strict=True)
        steps = torch.tensor([(s / their_s, (m - their_m) / their_s) for m, s, their_m, their_s in values])
        self.register_buffer("scale", steps[:, 0].view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", steps[:, 1].view(1, -1, 1, 1), persistent=False)
        self.measured: list[Tensor] = []
        backbone.register_forward_hook(self._measure)

    def _measure(self, backbone: nn.Module, arguments: tuple[Tensor], maps: Sequence[Tensor]) -> None:
        if self.training:
            self.measured.append(self(arguments[0], maps))

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """The mean distance over the maps of images as the student's backbone is given them."""
        theirs = self.teacher(images * self.scale + self.shift)
        pairs = zip(self.projections, self.pairs, strict=True)
        return torch.stack([distance(project(maps[i]), theirs[k]) for project, (i, k) in pairs]).mean()

    def take(self) -> Tensor:
        """The mean over what has been measured since the last call."""
        measured, self.measured = self.measured, []
        return torch.stack(measured).mean()


class Taught(HoldsBackbone):
    """A student's model and what it imitates with: all that the optimizer is to train."""

    def __init__(self, model: HoldsBackbone, imitation: Imitation):
        super().__init__()
        self.model, self.imitation = model, imitation
        self.backbone_path = f"model.{model.backbone_path}"


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - r, where r is the correlation of two maps (B, C, h, w), channel by channel, in the mean over channels."""
    student, teacher = (_standardised(maps.float()) for maps in (student, teacher))
    return (student - teacher).square().mean() / 2


def _standardised(maps: Tensor) -> Tensor:
    variance, mean = torch.var_mean(maps, (0, 2, 3), keepdim=True, unbiased=False)
    return (maps - mean) * (variance + 1e-6).rsqrt()


def logit_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, hard: bool = False) -> Tensor:
    """How far logits (B, classes, ...) are from the teacher's, (B, ...).

    Soft: the divergence of Kullback and Leibler at a temperature, times its square (https://arxiv.org/abs/1503.02531).
    Hard: cross-entropy to the class that the teacher says (https://arxiv.org/abs/2012.12877).
    """
    student, teacher = student.float(), teacher.float()
    if hard:
        return F.cross_entropy(student, teacher.argmax(1), reduction="none")
    logs = [(logits / temperature).log_softmax(1) for logits in (student, teacher)]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(1) * temperature**2


class Student(LightningModule):
    """What a task is that may have a teacher."""

    #: What it can be taught by.
    signals: ClassVar[tuple[Signal, ...]] = ("maps",)

    name: ClassVar[str]
    model: HoldsBackbone
    reading: Reading

    def __init__(self) -> None:
        super().__init__()
        self.lesson: Lesson | None = None
        #: Of logits, if it has one.
        self.teacher: Teacher | None = None
        self.imitation: Imitation | None = None

    def meet_teacher(self) -> None:
        """Build the teacher, once the model is there; nothing else is drawn differently for it.

        Raises:
            InputError: there is no such teacher, or it has nothing to say to this student
        """
        if self.lesson is None:
            return
        source = find_teacher(self.lesson.teacher)
        has_logits = "soft" in self.signals and source.task in (None, self.name)
        logits = "maps" not in self.signals or (has_logits and source.task is not None)
        signal = self.lesson.signal or ("soft" if logits else "maps")
        if signal not in self.signals:
            raise InputError(f"model.distill={signal}: {self.name} can be taught by {' or '.join(self.signals)}")
        with torch.random.fork_rng(devices=[]):
            if signal == "maps":
                backbone = self.model.inner_backbone
                teacher = Teacher(source.maps(self, backbone.feature_info.reduction()))
                self.imitation = Imitation(teacher, backbone, *self._statistics())
            elif has_logits:
                self.teacher = Teacher(source.logits(self))
            else:
                instead = "; its maps may teach: model.distill=maps" if "maps" in self.signals else ""
                raise InputError(
                    f"model.teacher={self.lesson.teacher!r} is of {source.task}, and has no logits of {self.name}"
                    f"{instead}"
                )

    def named_teacher(self, options: Mapping[str, Any]) -> nn.Module:
        """From images in [0, 1] to logits, by published weights."""
        raise InputError(
            f"model.teacher: a backbone by itself knows no classes of {self.name}: give a checkpoint of a run, or let "
            "its maps teach, by model.distill=maps"
        )

    def taught(
        self,
        loss: Tensor,
        count: int,
        logits: Tensor | None = None,
        images: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """A loss, and what the teacher adds to it.

        Args:
            loss: of a batch
            count: how many images that has
            logits: (B, classes, ...) of what the teacher's are for
            images: in [0, 1]
            counted: which positions (B, ...) of the logits count; all unless given
        """
        if self.imitation is not None:
            apart = self.imitation.take()
        elif self.teacher is not None:
            hard = self.lesson.signal == "hard"
            apart = logit_loss(logits, self.teacher(images), self.lesson.temperature, hard)
            apart = apart.mean() if counted is None else (apart * counted).sum() / counted.sum().clamp(min=1)
        else:
            return loss
        self.log_loss("loss_distill", apart.detach(), count)
        return loss + self.lesson.weight * apart

    def own_state(self) -> dict[str, Tensor]:
        """Its state dict, less what imitates."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(_IMITATION)}

    def _statistics(self) -> tuple[Any, Any]:
        """Mean and std by which its backbone's images are normalised."""
        transform: Any = getattr(self.model, "transform", None)
        if transform is not None:  # a detector, or several heads with one pass
            return transform.image_mean, transform.image_std
        config = self.model.inner_backbone.pretrained_cfg
        return config["mean"], config["std"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What imitates is kept apart from the student, which is whole without it."""
        if self.imitation is not None:
            state = checkpoint["state_dict"]
            checkpoint["imitation"] = {name: state.pop(name) for name in list(state) if name.startswith(_IMITATION)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before, now = "imitation" in checkpoint, self.imitation is not None
        if before != now and self.trainer.state.fn == TrainerFn.FITTING:
            raise InputError(
                f"the checkpoint was trained with{'' if before else 'out'} a teacher of maps: give model.teacher and "
                "model.distill as they were"
            )
        if now:
            checkpoint["state_dict"].update(checkpoint["imitation"])
