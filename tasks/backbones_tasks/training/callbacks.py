"""What a run leaves behind: checkpoints, metrics, pictures, and lines on the screen."""

import csv
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar, WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from pytorch_lightning.strategies import DDPStrategy
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from ..files import WriteError, is_sharded, read_checkpoint, save, whole
from ..pictures.curves import save_curves
from .sharding import FullySharded

PICTURED = 6  # validation images in predictions.png


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, whenever the process is killed, and that cannot run code.

    Lightning's own writes to the system's temporary folder first, and moving from there to another disk is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        if path.parent.parent.is_dir():  # else the run folder was deleted, and half of it would not be a run
            path.parent.mkdir(exist_ok=True)
        with whole(path) as unfinished:
            save(checkpoint, unfinished)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> dict:
        if is_sharded(Path(path)):
            return read_checkpoint(Path(path))
        return super().load_checkpoint(path, map_location, weights_only=True)


class SyncedNorms(TorchSyncBatchNorm):
    """Batch norms over all processes, by timm, because PyTorch drops the activations that are in norms of timm's."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model  # by itself, a process sees its own batches alone


class BestCheckpoint(ModelCheckpoint):
    """The best by a metric; what could not be measured is never the best."""

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        if current is None or not bool(torch.isfinite(current)):
            return False
        return super().check_monitor_top_k(trainer, current)


def checkpoints(run: Path, metric: str) -> list[ModelCheckpoint]:
    """Keep the best by a metric and the last; the last is written second, and so knows of the best."""
    common = {"dirpath": run / "checkpoints", "save_on_train_epoch_end": True, "enable_version_counter": False}
    return [
        BestCheckpoint(filename="best", monitor=metric, mode="max", **common),
        ModelCheckpoint(filename="last", **common),
    ]


class EpochLog(Callback):
    """One row per epoch in `metrics.csv`, `curves.png` after it, and one line on the screen.

    A resumed run keeps the rows of earlier epochs.
    """

    def __init__(self, run: Path):
        self.file = run / "metrics.csv"
        self.curves = run / "curves.png"

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            **{name: values.get(name, "") for name in ("train_loss", "val_loss", *pl_module.scores)},
            **values,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_mb": round(peak_memory_mb()),
        }
        rows = [old for old in read_metrics(self.file) if int(old["epoch"]) < trainer.current_epoch]
        _write_csv(self.file, [*rows, row])
        with whole(self.curves) as unfinished:
            save_curves(unfinished, self.file, pl_module.scores)
        end = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        epoch = f"epoch {trainer.current_epoch + 1:>3}{end}"
        labels = {"loss": "train_loss", "val loss": "val_loss"} | {s.replace("_", " "): s for s in pl_module.scores}
        scores = "".join(f"  {label} {row[name]:.3f}" for label, name in labels.items() if row[name] != "")
        _say(trainer, f"{epoch}{scores}  {row['seconds']:.1f} s")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit | WriteError)
        if stopped and trainer.is_global_zero and self.file.parent.is_dir():
            run = shlex.quote(str(self.file.parent))
            print(f"\nstopped; go on with: backbones fit {pl_module.name} --out {run} --ckpt_path last", flush=True)


class PredictionPicture(Callback):
    """`predictions.png`: validation images beside the truth and the prediction, anew with every better epoch."""

    def __init__(self, run: Path):
        self.file = run / "predictions.png"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        score = trainer.callback_metrics.get(pl_module.metric)
        if not trainer.is_global_zero or score is None or not pl_module.is_best(score):
            return
        with whole(self.file) as unfinished, trainer.precision_plugin.forward_context():
            pl_module.save_picture(unfinished, pl_module.pictured(PICTURED))  # in eval mode, without gradients


class AveragedWeights(WeightAveraging):
    """A moving average of the weights, which is what is validated, pictured and saved.

    Args:
        decay: of the average, reached by and by: (1 + n) / (10 + n) after n steps is what it is at first.
    """

    def __init__(self, decay: float):
        def average(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
            if not averaged.is_floating_point():  # counters of batch norms
                return current
            # in full precision even of bf16-true weights, where a small step would be rounded away
            return averaged.lerp(current.to(averaged.dtype), 1 - min(decay, (1 + int(count)) / (10 + int(count))))

        super().__init__(avg_fn=average)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        _tell_caches(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Later, see below: pictures are of the averaged weights, too."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, FullySharded):
            trainer.strategy.release()
        super().on_validation_epoch_end(trainer, pl_module)
        _tell_caches(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        _tell_caches(pl_module)


class Unfreezing(Callback):
    """The backbone stays as it is for some epochs, and then trains stage by stage, from the deepest to the stem.

    What is frozen is a function of the epoch alone, the same after a resume.

    Args:
        epochs: how many all of its stages and its stem are frozen for.
        every: epochs from one stage to the next; 0 thaws all at once.
    """

    def __init__(self, epochs: int, every: int):
        self.epochs, self.every = epochs, every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        find_unused(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now: the optimizer, and what wraps the model, leave out for good what they find frozen.
        self.backbone = pl_module.model.inner_backbone
        self.always = self.backbone.frozen_stages
        self.parts = [
            [p for part in parts for p in _parameters(part) if p.requires_grad] for parts in self.backbone.freezable()
        ]
        self._freeze(self._frozen_stages(trainer.current_epoch))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen = self._frozen_stages(trainer.current_epoch)
        if frozen == self.backbone.frozen_stages:
            return
        self._freeze(frozen)
        if trainer.is_global_zero:
            stages = f"from stage {frozen + 1} of {len(self.parts) - 1} on" if frozen >= 0 else "as a whole"
            _say(trainer, f"the backbone trains {stages}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._freeze(self.always)

    def _frozen_stages(self, epoch: int) -> int:
        """As `Backbone` counts them: -1 for none, 0 for the stem, n for the first n stages, too."""
        count: int = len(self.parts)
        thawed = count
        if epoch < self.epochs:
            thawed = 0
        elif self.every:
            thawed = 1 + (epoch - self.epochs) // self.every
        always: int = self.always
        return max(always, count - 1 - thawed)

    def _freeze(self, frozen_stages: int) -> None:
        """Freeze so many stages, and thaw the others; the norms of what is frozen keep their statistics."""
        self.backbone.frozen_stages = frozen_stages
        for i, parameters in enumerate(self.parts):
            for parameter in parameters:
                parameter.requires_grad_(i > frozen_stages)
        self.backbone.train(self.backbone.training)


def find_unused(trainer: Trainer) -> None:
    """Before the model is wrapped: steps leave parameters out, so DDP is to look for those that have no gradient."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # what its constructor was given


def _parameters(part: torch.nn.Module | torch.nn.Parameter) -> list[torch.nn.Parameter]:
    return [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())


def _tell_caches(module: torch.nn.Module) -> None:
    """Lightning swaps weights behind autograd's back, and tables that were computed from them must not stay."""
    torch.autograd.graph.increment_version([*module.parameters(), *module.buffers()])


class Progress(TQDMProgressBar):
    """Lightning's bar where there is a terminal; in a log file, only the line of `EpochLog` per epoch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=int(sys.stderr.isatty()))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _say(trainer: Trainer, line: str) -> None:
    """Print a line without tearing the progress bar."""
    bar = trainer.progress_bar_callback
    if bar is not None and bar.is_enabled:
        bar.print(line)
    else:
        print(line, flush=True)


def quiet() -> None:
    """Silence what Lightning and its libraries say and a user can do nothing about."""
    import logging

    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*`num_workers`.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*GPU available but not used.*",
        ".*The dirpath has changed.*",
        ".*could not find the monitored key.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*eval mode at the start of training.*",
        "Using backward.. with create_graph=True will create a reference cycle",  # zero_grad ends it
        "Grad strides do not match bucket view strides",  # of 1x1 convolutions: either order is the same memory
        "FSDP2-wrapped module .* returned a view tensor",  # nothing writes into maps in place; gradients are tested
    ):
        warnings.filterwarnings("ignore", message)


def read_metrics(file: Path) -> list[dict[str, str]]:
    """Rows of a `metrics.csv`; none if there is no such file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def peak_memory_mb() -> float:
    """The most memory used so far: by tensors on the GPU where there is one, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole(file) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
