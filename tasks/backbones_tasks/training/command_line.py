"""`backbones fit | validate | test TASK`: Lightning's command line, run folders, resuming."""

import argparse
import difflib
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger

from backbones.errors import InputError

from ..data.folders import IMAGE_FOLDERS
from ..files import is_checkpoint, whole
from .callbacks import (
    AtomicCheckpointIO,
    AveragedWeights,
    EpochLog,
    PredictionPicture,
    Progress,
    SyncedNorms,
    Unfreezing,
    checkpoints,
    quiet,
    read_metrics,
)
from .runs import is_run, new_run, newest_run, read_checkpoint, told_once
from .sharding import FullySharded
from .task import Task, find_task

SHORTHANDS = {"--backbone": "--model.backbone", "--data": "--data.root"}
EPILOG = (
    "shorthands: --backbone NAME (or '{name: NAME, option: value}') is --model.backbone, --data DIR is --data.root. "
    "--out DIR is the run folder, by default the next of runs/TASK-001, -002, ... "
    "--ckpt_path last (or best, or a file) goes on with a run: the newest, or the one in --out. "
    "--print_groups prints the learning rate and weight decay of every parameter instead of training."
)


def run_training(command: str, name: str, argv: Sequence[str]) -> int:
    """Run fit, validate or test for a task; returns the exit code.

    Raises:
        InputError: a key, a backbone, a folder or data that cannot be used; all but faulty data are refused before
            anything is read or built
    """
    quiet()
    own, rest = own_options(argv)
    task = find_task(name)
    with told_once():
        return _fit(task, own, rest) if command == "fit" else _evaluate(command, task, own, rest)


def _fit(task: type[Task], own: argparse.Namespace, argv: list[str]) -> int:
    run, checkpoint = _find_run(task.name, own)
    if run is not None and (run / "config.yaml").is_file() and not own.has_config:
        argv = ["--config", str(run / "config.yaml"), *argv]
    if own.print_groups:
        print_groups(CommandLine("fit", task, argv).model)
        return 0
    trained = None if checkpoint is None else read_checkpoint(checkpoint, task.name)["hyper_parameters"]
    cli = CommandLine("fit", task, argv, lambda nodes: run or new_run(task.name, own.out, nodes), trained)
    run, trainer = cli.run_folder, cli.trainer
    if trainer.is_global_zero:
        write_config(cli, run / "config.yaml")
        print(f"{cli.describe()}\nrun folder: {run}", flush=True)
        if own.ckpt_path is not None:
            print(
                "starting anew: this run has no checkpoint yet" if checkpoint is None else f"going on from {checkpoint}"
            )
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except Exception:
        _end_others(trainer)
        raise
    if trainer.is_global_zero and not trainer.fast_dev_run:
        report(run, cli.model, cli.datamodule)
    return 0


def _evaluate(command: str, task: type[Task], own: argparse.Namespace, argv: list[str]) -> int:
    if own.ckpt_path is None:
        raise InputError(f"backbones {command} needs --ckpt_path: best, last, or a checkpoint file")
    checkpoint = Path(own.ckpt_path)
    if own.ckpt_path in ("best", "last"):
        checkpoint = (Path(own.out) if own.out else newest_run(task.name)) / "checkpoints" / f"{own.ckpt_path}.ckpt"
    trained = read_checkpoint(checkpoint, task.name)["hyper_parameters"]
    argv = [*as_trained(task, checkpoint, trained, not own.has_config), *argv]
    cli = CommandLine(command, task, argv, trained=trained)
    if cli.datamodule.class_names != trained["class_names"]:
        raise InputError(
            f"{checkpoint} was trained on the classes {', '.join(trained['class_names'])}, but the data have "
            f"{', '.join(cli.datamodule.class_names)}"
        )
    if is_run(checkpoint.parent.parent):
        cli.model.folder = checkpoint.parent.parent
    measure = cli.trainer.validate if command == "validate" else cli.trainer.test
    measure(cli.model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    if cli.trainer.is_global_zero:
        values = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
        width = max(map(len, values))
        print(checkpoint, *(f"  {name:{width}}  {value:.4f}" for name, value in values.items()), sep="\n")
    return 0


def as_trained(task: type[Task], checkpoint: Path, trained: Mapping[str, Any], with_config: bool = True) -> list[str]:
    """Arguments for a checkpoint's model, which it tells by itself, and for its data, if its run's config is there.

    Args:
        task: class of the task
        checkpoint: of a run
        trained: its hyperparameters
        with_config: whether to read the config
    """
    model = {name: value for name, value in trained.items() if name not in (*task.linked, "seed")}
    config = checkpoint.parent.parent / "config.yaml"
    before = ["--config", str(config)] if with_config and config.is_file() else []
    return [*before, "--model", json.dumps(model)]


class CommandLine(LightningCLI):
    """Lightning's command line for a task; it refuses what is wrong before it builds anything.

    Args:
        command: fit, validate or test
        task: class of the task
        argv: what follows the task's name
        claim_run: gives the run folder, once the arguments are known to be right, for a number of machines; no run
            folder if None
        trained: hyperparameters of the checkpoint that the weights will be read from, if there is one
    """

    def __init__(
        self,
        command: str,
        task: type[Task],
        argv: list[str],
        claim_run: Callable[[int], Path] | None = None,
        trained: Mapping[str, Any] | None = None,
    ):
        self.task = task
        self.claim_run = claim_run
        self.trained = trained
        self.run_folder: Path | None = None
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__init__(
            task,
            task.data_class,
            args=argv,
            run=False,
            seed_everything_default=0,
            save_config_callback=None,  # see write_config
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": f"backbones {command} {task.name}",
                "description": f"{command} a {task.name} model",
                "epilog": EPILOG,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={
                "max_epochs": task.epochs,
                "precision": "bf16-mixed" if bf16 else "32-true",
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # our samplers know the ranks, and carry the epoch
                "enable_model_summary": False,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in self.task.linked:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        self.task.link(parser)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        self.task.check_arguments(args)
        try:
            self.config = parser.parse_args(args)
        except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
            raise InputError(explain(str(error), parser)) from error

    def before_instantiate_classes(self) -> None:
        self.task.check_options(self.config.model)

    def instantiate_classes(self) -> None:
        """With a checkpoint, the weights that it began with are not read, and need not be there any more."""
        told = self.config
        backbone = told.model.backbone
        if self.trained is not None and isinstance(backbone, Mapping) and backbone.get("pretrained"):
            self.config = told.clone()
            own = {"pretrained": False, "pretrained_cfg": self.trained["backbone"]["pretrained_cfg"]}
            self.config.model.backbone = {**backbone, **own}
            if told.model.layer_decay is None:
                self.config.model.layer_decay = self.trained["layer_decay"]
        super().instantiate_classes()
        self.config = told

    def instantiate_trainer(self, **options: Any) -> Trainer:
        if self.claim_run:
            if self.config.trainer.sync_batchnorm and self.config.trainer.accelerator == "cpu":
                raise InputError("trainer.sync_batchnorm works on GPUs alone")
            self.datamodule.setup("fit")  # faulty data are found now, and leave no run folder behind
            self.run_folder = self.claim_run(self.config.trainer.num_nodes)
        run = self.run_folder
        callbacks = [] if self.config.trainer.enable_progress_bar is False else [Progress()]
        if run is None:
            options["logger"] = False
        elif not self.config.trainer.fast_dev_run:
            self.model.folder = run
            callbacks += [EpochLog(run), PredictionPicture(run), *checkpoints(run, self.task.metric)]
            if self.config.trainer.logger is None:
                options["logger"] = TensorBoardLogger(run, name="", version="tensorboard")
            options["default_root_dir"] = str(run)
        if self.claim_run and self.config.model.ema:
            callbacks.append(AveragedWeights(self.config.model.ema))
        if self.claim_run and (self.config.model.freeze_epochs or self.config.model.unfreeze_every):
            callbacks.append(Unfreezing(self.config.model.freeze_epochs, self.config.model.unfreeze_every))
        self.trainer_defaults["callbacks"] = callbacks
        plugins: list[Any] = [AtomicCheckpointIO()]
        if self.config.trainer.sync_batchnorm:
            plugins.append(SyncedNorms())
        if self.config.trainer.strategy == "fsdp":
            if str(self.config.trainer.precision).startswith("16-mixed"):
                raise InputError("trainer.precision=16-mixed cannot be had in shards; use bf16-mixed or 32-true")
            options["strategy"] = FullySharded()
        return super().instantiate_trainer(plugins=plugins, **options)

    def describe(self) -> str:
        """One line on what is trained on what."""
        parameters = sum(p.numel() for p in self.model.model.parameters()) / 1e6
        decay = self.model.hparams["layer_decay"]
        return (
            f"{self.model.describe()}, {parameters:.1f} M parameters{f', layer decay {decay}' if decay != 1 else ''}; "
            f"{self.datamodule.num_classes} classes from {self.datamodule.source}; {self.trainer.accelerator.name()}"
        )


def write_config(cli: CommandLine, file: Path) -> None:
    """Save the resolved configuration; `--config` takes it again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished:
        cli.parser.save(cli.config, unfinished, skip_none=False, overwrite=True)


def print_groups(task: Task) -> None:
    """Print the optimizer's groups: learning rate at its highest, weight decay, parameters and their names."""
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    print(f"{'lr':>9}  {'decay':>5}  {'tensors':>7}  {'parameters':>11}  names")
    rates = [(g["lr"] * g.get("lr_scale", 1.0), g["weight_decay"], g) for g in task.make_optimizer().param_groups]
    for rate, _, group in sorted(rates, key=lambda row: row[:2]):
        numbers = sum(p.numel() for p in group["params"])
        shown = _shortened([names[p] for p in group["params"]])
        print(f"{rate:9.2e}  {group['weight_decay']:5.2f}  {len(group['params']):7}  {numbers:11,}  {shown}")
    frozen = [name for parameter, name in names.items() if not parameter.requires_grad]
    if frozen:
        print(f"{'frozen':>9}  {'':5}  {len(frozen):7}  {'':11}  {_shortened(frozen)}")


def _shortened(names: list[str], most: int = 4) -> str:
    """The numbered modules that parameters belong to, each once: `stages.0.blocks.1` for all that is in it."""
    owners = list(dict.fromkeys(re.sub(r"^(.*\.\d+)\..*|\.(?:weight|bias)$", r"\1", name) for name in names))
    more = f" and {len(owners) - most} more" if len(owners) > most else ""
    return ", ".join(owners[:most]) + more


def report(run: Path, task: Task, data: LightningDataModule) -> None:
    """Say in plain words what came out, where it is, and what to type next."""
    rows = [row for row in read_metrics(run / "metrics.csv") if row[task.metric]]
    if rows:
        best = max(rows, key=lambda row: float(row[task.metric]))
        print(f"\nbest {task.metric} on unseen images: {float(best[task.metric]):.3f} (epoch {int(best['epoch']) + 1})")
    print(f"pictures: {run / 'predictions.png'} (truth and prediction), {run / 'curves.png'}")
    print(f"metrics, config, checkpoints: {run}")
    images = "DIR"
    if data.root:
        images = next((data.root / name for name in IMAGE_FOLDERS if (data.root / name).is_dir()), data.root)
    checkpoint = "best.ckpt" if rows else "last.ckpt"  # nothing was measured if training ended within its first epoch
    command = ["--ckpt", run / "checkpoints" / checkpoint, "--images", images, "--out", run / "labelled"]
    print(f"label your own images: backbones predict {task.name} {shlex.join(map(str, command))}")


def _end_others(trainer: Trainer) -> None:
    """End the processes that this one has started: what they wait for will not come."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        try:
            process.wait(10)  # it may be about to tell what went wrong
        except subprocess.TimeoutExpired:
            process.kill()


def own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take out the options of `backbones fit` that are not Lightning's, and write shorthands in full."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--print_groups", action="store_true")
    own, rest = parser.parse_known_args(list(argv))
    rest = [re.sub(r"^(--backbone|--data)(?==|$)", lambda match: SHORTHANDS[match[1]], argument) for argument in rest]
    own.has_config = any(re.match(r"(-c|--config)(=|$)", argument) for argument in rest)
    return own, rest


def _find_run(task: str, own: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The run folder and the checkpoint to go on with; None for a new one."""
    if own.ckpt_path is None:
        return None, None
    if own.ckpt_path in ("best", "last"):
        run = Path(own.out) if own.out else newest_run(task)
        if not is_run(run):
            raise InputError(f"{run} holds no run to go on with")
        checkpoint = run / "checkpoints" / f"{own.ckpt_path}.ckpt"
        if not is_checkpoint(checkpoint):  # killed within its first epoch
            return run, None
    else:
        checkpoint = Path(own.ckpt_path)
        run = checkpoint.parent.parent
        if not is_run(run) or (own.out is not None and Path(own.out).resolve() != run.resolve()):
            run = None  # a new run that begins with the state of another
    return run, checkpoint


def explain(message: str, parser: LightningArgumentParser) -> str:
    """The parser's message, with the nearest option where one is unknown."""
    unknown = re.search(r"unrecognized arguments: (?:--)?([\w.]+)", message)
    in_group = re.search(r"[Gg]roup '([\w.]+)' does not accept option '([\w.]+)'", message)
    key = re.search(r"(?:[Oo]ption|[Kk]ey) '([\w.]+)' is not (?:accepted|expected)", message)
    if not (unknown or in_group or key):
        return message
    name = f"{in_group[1]}.{in_group[2]}" if in_group else (unknown or key)[1]
    known = {action.dest for action in parser._actions} | {"backbone", "data", "out", "ckpt_path"}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists all options"
    return f"unknown option {name!r}; {hint}"
