"""`backbones fit | validate | test segmentation`: Lightning's command line, run folders, resuming."""

import argparse
import difflib
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger

from backbones.errors import InputError
from backbones.registry import backbone_info

from .callbacks import AtomicCheckpointIO, EpochLog, PredictionPicture, Progress, checkpoints, quiet, read_metrics
from .data import SegmentationData
from .runs import is_run, new_run, newest_run, read_checkpoint
from .segmenter import find_architecture
from .task import SegmentationTask

TASK = "segmentation"
# Parts of the model that the data decide, and the seed.
LINKED = ("num_classes", "class_names", "ignore_index", "seed")
SHORTHANDS = {"--backbone": "--model.backbone", "--data": "--data.root"}
EPILOG = (
    "shorthands: --backbone NAME (or '{name: NAME, option: value}') is --model.backbone, --data DIR is --data.root. "
    "--out DIR is the run folder, by default the next of runs/segmentation-001, -002, ... "
    "--ckpt_path last (or best, or a file) goes on with a run: the newest, or the one in --out."
)


def run_training(command: str, argv: Sequence[str]) -> int:
    """Run fit, validate or test; returns the exit code.

    Raises:
        InputError: a key, a backbone, a folder or data that cannot be used; all but faulty data are refused before
            anything is read or built
    """
    quiet()
    own, rest = _own_options(argv)
    return _fit(own, rest) if command == "fit" else _evaluate(command, own, rest)


def _fit(own: argparse.Namespace, argv: list[str]) -> int:
    run, checkpoint = _find_run(own)
    if run is not None and (run / "config.yaml").is_file() and not own.has_config:
        argv = ["--config", str(run / "config.yaml"), *argv]
    cli = CommandLine("fit", argv, lambda: run or new_run(TASK, own.out))
    run, trainer = cli.run_folder, cli.trainer
    if trainer.is_global_zero:
        write_config(cli, run / "config.yaml")
        print(f"{cli.describe()}\nrun folder: {run}", flush=True)
        if own.ckpt_path is not None:
            print(
                "starting anew: this run has no checkpoint yet" if checkpoint is None else f"going on from {checkpoint}"
            )
    trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero and not trainer.fast_dev_run:
        report(run, cli.datamodule)
    return 0


def _evaluate(command: str, own: argparse.Namespace, argv: list[str]) -> int:
    if own.ckpt_path is None:
        raise InputError(f"backbones {command} needs --ckpt_path: best, last, or a checkpoint file")
    checkpoint = Path(own.ckpt_path)
    if own.ckpt_path in ("best", "last"):
        checkpoint = (Path(own.out) if own.out else newest_run(TASK)) / "checkpoints" / f"{own.ckpt_path}.ckpt"
    # the checkpoint says what the model is; the config of its run, where there is one, what the data were
    trained = read_checkpoint(checkpoint)["hyper_parameters"]
    model = {name: value for name, value in trained.items() if name not in LINKED}
    config = checkpoint.parent.parent / "config.yaml"
    before = ["--config", str(config)] if config.is_file() and not own.has_config else []
    cli = CommandLine(command, [*before, "--model", json.dumps(model), *argv])
    if cli.datamodule.class_names != trained["class_names"]:
        raise InputError(
            f"{checkpoint} was trained on the classes {', '.join(trained['class_names'])}, but the data have "
            f"{', '.join(cli.datamodule.class_names)}"
        )
    measure = cli.trainer.validate if command == "validate" else cli.trainer.test
    measure(cli.model, cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False)
    if cli.trainer.is_global_zero:
        values = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
        width = max(map(len, values))
        print(checkpoint, *(f"  {name:{width}}  {value:.4f}" for name, value in values.items()), sep="\n")
    return 0


class CommandLine(LightningCLI):
    """Lightning's command line for segmentation; it refuses what is wrong before it builds anything.

    Args:
        command: fit, validate or test
        argv: what follows the task's name
        claim_run: gives the run folder, once the arguments are known to be right; no run folder if None
    """

    def __init__(self, command: str, argv: list[str], claim_run: Callable[[], Path] | None = None):
        self.claim_run = claim_run
        self.run_folder: Path | None = None
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__init__(
            SegmentationTask,
            SegmentationData,
            args=argv,
            run=False,
            seed_everything_default=0,
            save_config_callback=None,  # see write_config
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": f"backbones {command} {TASK}",
                "description": f"{command} a segmentation model",
                "epilog": EPILOG,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={
                "max_epochs": 6,
                "precision": "bf16-mixed" if bf16 else "32-true",
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # our samplers know the ranks, and carry the epoch
                "enable_model_summary": False,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("num_classes", "class_names", "ignore_index"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        try:
            self.config = parser.parse_args(args)
        except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
            raise InputError(_explain(str(error), parser)) from error

    def before_instantiate_classes(self) -> None:
        backbone = self.config.model.backbone
        name = backbone if isinstance(backbone, str) else backbone.get("name")
        if name is None:
            raise InputError(f'model.backbone: the options {sorted(backbone)} lack "name"')
        backbone_info(name)  # an unknown name is refused here, with the nearest one
        find_architecture(self.config.model.decoder)

    def instantiate_trainer(self, **options: Any) -> Trainer:
        if self.claim_run:
            self.datamodule.setup("fit")  # faulty data are found now, and leave no run folder behind
            self.run_folder = self.claim_run()
        run = self.run_folder
        callbacks = [Progress()]
        if run is None:
            options["logger"] = False
        elif not self.config.trainer.fast_dev_run:
            callbacks += [EpochLog(run), PredictionPicture(run), *checkpoints(run)]
            if self.config.trainer.logger is None:
                options["logger"] = TensorBoardLogger(run, name="", version="tensorboard")
            options["default_root_dir"] = str(run)
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **options)

    def describe(self) -> str:
        """One line on what is trained on what."""
        parameters = sum(p.numel() for p in self.model.segmenter.parameters()) / 1e6
        options = self.model.hparams
        data = self.datamodule.root or "shapes drawn on the fly"
        return (
            f"{options['decoder']} on {options['backbone']['name']}, {parameters:.1f} M parameters; "
            f"{self.datamodule.num_classes} classes from {data}; {self.trainer.accelerator.name()}"
        )


def write_config(cli: CommandLine, file: Path) -> None:
    """Save the resolved configuration; `--config` takes it again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cli.parser.save(cli.config, file, skip_none=False, overwrite=True)


def report(run: Path, data: SegmentationData) -> None:
    """Say in plain words what came out, where it is, and what to type next."""
    rows = [row for row in read_metrics(run / "metrics.csv") if row["mIoU"]]
    if rows:
        best = max(rows, key=lambda row: float(row["mIoU"]))
        print(f"\nbest mIoU on unseen images: {float(best['mIoU']):.3f} (epoch {int(best['epoch']) + 1})")
    print(f"pictures: {run / 'predictions.png'} (image, truth, prediction), {run / 'curves.png'}")
    print(f"metrics, config, checkpoints: {run}")
    images = data.root / "images" if data.root else "DIR"
    command = ["--ckpt", run / "checkpoints" / "best.ckpt", "--images", images, "--out", run / "labelled"]
    print(f"label your own images: backbones predict {TASK} {shlex.join(map(str, command))}")


def _own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take out the options that are ours, and write shorthands in full."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--ckpt_path")
    own, rest = parser.parse_known_args(list(argv))
    rest = [re.sub(r"^(--backbone|--data)(?==|$)", lambda match: SHORTHANDS[match[1]], argument) for argument in rest]
    own.has_config = any(re.match(r"(-c|--config)(=|$)", argument) for argument in rest)
    return own, rest


def _find_run(own: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The run folder and the checkpoint to go on with; None for a new one."""
    if own.ckpt_path is None:
        return None, None
    if own.ckpt_path in ("best", "last"):
        run = Path(own.out) if own.out else newest_run(TASK)
        if not is_run(run):
            raise InputError(f"{run} holds no run to go on with")
        checkpoint = run / "checkpoints" / f"{own.ckpt_path}.ckpt"
        if not checkpoint.is_file():  # killed within its first epoch
            return run, None
    else:
        checkpoint = Path(own.ckpt_path)
        run = checkpoint.parent.parent
        if not is_run(run) or (own.out is not None and Path(own.out).resolve() != run.resolve()):
            run = None  # a new run that begins with the state of another
    read_checkpoint(checkpoint)
    return run, checkpoint


def _explain(message: str, parser: LightningArgumentParser) -> str:
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
