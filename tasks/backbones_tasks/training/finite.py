"""A loss or weights that are not finite end the run, before anything of them is saved."""

from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from backbones.errors import BackboneError

SHOWN = 8  # files


class NotFinite(BackboneError, ArithmeticError):
    """Training went astray: its loss or its weights are no longer numbers."""


class FiniteLoss(Callback):
    """Stop as soon as the loss of a step is not finite, on all processes, and name the step and the batch's files.

    A step is judged when the next one has begun, so that a GPU is not waited for; the last of an epoch at once, along
    with the weights, which are what is saved then.
    """

    def __init__(self) -> None:
        self.waiting: tuple[int, int, torch.Tensor] | None = None  # epoch, batch, and whether it went astray

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        astray = (~loss.detach().isfinite()).float().reshape(1)
        if _distributed():
            dist.all_reduce(astray, dist.ReduceOp.MAX)
        self._judge(trainer)
        self.waiting = (trainer.current_epoch, batch_idx, astray)
        if trainer.is_last_batch:
            self._judge(trainer)
            if not _all_finite(pl_module):
                raise NotFinite(
                    f"the weights are not finite after epoch {trainer.current_epoch + 1}, step {trainer.global_step}, "
                    f"though its losses were: {_advice(trainer)}"
                )

    def _judge(self, trainer: Trainer) -> None:
        if self.waiting is None:
            return
        (epoch, number, astray), self.waiting = self.waiting, None
        if not astray.item():
            return
        names = _batch_names(trainer.train_dataloader, number)
        if _distributed():
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, names)
            names = [name for share in shares for name in share]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        raise NotFinite(
            f"the loss is not finite in epoch {epoch + 1}, batch {number + 1}, which holds "
            f"{', '.join(names[:SHOWN] + more)}: {_advice(trainer)}"
        )


def _advice(trainer: Trainer) -> str:
    kept = "the checkpoint of the epoch before is kept" if trainer.current_epoch else "nothing was saved"
    return f"{kept}; look at these images and labels, lower --model.lr, or take --trainer.precision 32-true"


def _batch_names(loader: Any, number: int) -> list[str]:
    """What the images of a batch of this epoch are called; samplers deal the same out again."""
    if hasattr(loader, "batch_names"):  # of several heads
        return loader.batch_names(number)
    keys = next(islice(iter(loader.batch_sampler), number, None), [])
    return [loader.dataset.name(key[1] if isinstance(key, tuple) else key) for key in keys]


def _all_finite(module: torch.nn.Module) -> bool:
    states = [state.detach() for state in module.state_dict().values() if state.is_floating_point()]
    states = [state.to_local() if isinstance(state, DTensor) else state for state in states]
    finite = torch.stack([state.isfinite().all() for state in states]).all().float().reshape(1)
    if _distributed():
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite.item())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
