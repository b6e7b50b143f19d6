"""`--trainer.strategy fsdp`: parameters, gradients and optimizer states in shards over all processes."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from backbones.errors import InputError

from ..files import save_shards

ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 cannot yet
LEAST = 1_000_000  # parameters of a block that is gathered on its own; smaller ones are with what is around them


class FullySharded(ModelParallelStrategy):
    """PyTorch's `fully_shard` (FSDP2), on GPUs and on CPUs, for models that hold a backbone.

    Lightning's own "fsdp" is the first version, which has no CPUs, clips no gradients by norm, and runs a forward only
    if all processes do. Here, blocks of the backbone are gathered as they are needed in training, and everything is
    gathered once for a validation, where processes may have differently many batches, and one draws pictures alone.

    Checkpoints are folders of shards, and plain checkpoints once they are read: `files.read_checkpoint`.
    """

    _layer_sync: Any = None  # the trainer sets it for --trainer.sync_batchnorm

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        if self.root_device.type == "cpu" and not ON_CPU:
            raise InputError(f"torch {torch.__version__} keeps shards on GPUs alone: update it, or leave out fsdp")
        self.accelerator.setup(trainer)
        self._gathered = False
        fitting = trainer.state.fn == TrainerFn.FITTING  # what is only measured is not worth sharding
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        self.model = self.precision_plugin.convert_module(self.model)
        if fitting:
            mesh = self.device_mesh["data_parallel"]
            tasks = [self.lightning_module]
            for callback in trainer.callbacks:
                if isinstance(callback, WeightAveraging):
                    tasks.append(callback._average_model.module)
            for task in tasks:
                shard(task.model, mesh)
                if task.imitation is not None:
                    fully_shard(task.imitation, mesh=mesh)
        self.model_to_device()
        self.barrier()
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self.gather()
        return super().validation_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        self.release()

    def gather(self) -> None:
        """Have whole weights on every process, until `release`."""
        parts = self._parts()
        if self._gathered or not parts:
            return
        for part in parts:  # the whole model first
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        # they lie where those of the last validation lay, and tables that were computed from these must not stay
        torch.autograd.graph.increment_version(list(self.lightning_module.parameters()))
        self._gathered = True

    def release(self) -> None:
        """Keep shards alone again."""
        if not self._gathered:
            return
        for i, part in enumerate(self._parts()):
            part.reshard()
            part.set_reshard_after_forward(i > 0, recurse=False)  # of the whole model, backward begins at once
        self._gathered = False

    def _parts(self) -> list[FSDPModule]:
        return [part for part in self.lightning_module.modules() if isinstance(part, FSDPModule)]

    # Checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        folder, token = self.broadcast((str(filepath), uuid.uuid4().hex[:8]))
        save_shards(checkpoint, Path(folder), token, self.global_rank, self.barrier)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
        own = self.lightning_module.state_dict()
        for name in ("state_dict", "current_model_state", "imitation"):
            if name in checkpoint:
                checkpoint[name] = {key: _like(own.get(key), value) for key, value in checkpoint[name].items()}
        for optimizer, states in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states["state"] = {
                i: {key: _like(parameters[i], value) for key, value in state.items()}
                for i, state in states["state"].items()
            }
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model that has a backbone, in place: large blocks of it each for themselves, the rest together."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP has no channels-last parameters
    for part in (*_blocks(model.inner_backbone)[0], model):
        fully_shard(part, mesh=mesh)


def _blocks(module: nn.Module, listed: bool = False) -> tuple[list[nn.Module], int]:
    """Blocks with at least `LEAST` parameters beside those of blocks in them, inner ones first; and what is left.

    A block is a module in a list that has modules itself: it is called, while those in it may only be read.
    """
    found, left = [], sum(p.numel() for p in module.parameters(recurse=False))
    lists = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        blocks, rest = _blocks(child, listed=lists)
        found += blocks
        left += rest
    if listed and left >= LEAST and not isinstance(module, nn.ModuleList) and any(module.children()):
        return [*found, module], 0
    return found, left


def _like(own: Any, value: Any) -> Any:
    """A whole tensor as the shard of it that `own` is; everything else as it is."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
