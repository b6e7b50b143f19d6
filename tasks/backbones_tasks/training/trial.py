"""What only a first step would tell: whether a batch of one image can train the model at all."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningDataModule

from backbones.errors import InputError

from .task import Task

_COMPLAINT = "more than 1 value per channel"  # PyTorch's, of batch norm


def try_single_image(task: Task, data: LightningDataModule) -> None:
    """Where batches have one image, train a copy on one, on the CPU.

    Raises:
        InputError: a batch norm has a single value per channel to normalise, as where maps are pooled to a pixel
    """
    loader: Any = data.train_dataloader()
    loaders: Mapping[str | None, Any] = getattr(loader, "loaders", None) or {None: loader}
    for head, part in loaders.items():
        keys = next(iter(part.batch_sampler), [])
        if len(keys) != 1:
            continue
        batch = part.collate_fn([part.dataset[keys[0]]])
        trial = copy.deepcopy(task).train()
        trial.log = lambda *_, **__: None  # there is no trainer
        try:
            with torch.random.fork_rng(devices=[]):
                trial.training_step(batch if head is None else {head: batch}, 0)
        except ValueError as error:
            if _COMPLAINT not in str(error):
                raise
            where = "data" if head is None else f"data.heads.{head}"
            few = (
                f"the training split has {len(part.dataset)} image" if part.batch_size != 1 else f"{where}.batch_size=1"
            )
            raise InputError(
                f"{few}: {task.describe()} has batch norms that see one value per channel of a single image; train on "
                f"2 images or more at once ({where}.batch_size), on larger ones, or take a decoder without batch norm"
            ) from error
