"""`backbones fit | validate | test TASK`: Lightning's command line, run folders, resuming."""

import argparse
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from backbones.errors import BackboneError, InputError

from ..files import whole
from ..options import explain
from ..ranges import check_ranges
from ..training.callbacks import (
    AtomicCheckpointIO,
    AveragedWeights,
    EpochLog,
    PredictionPicture,
    Progress,
    SyncedNorms,
    Unfreezing,
    checkpoints,
)
from ..training.finite import FiniteLoss
from ..training.resuming import check_same
from ..training.runs import Lock
from ..training.sharding import FullySharded
from ..training.task import Task
from ..training.trial import try_single_image
from .trust import config_arguments

SHORTHANDS = {"--backbone": "--model.backbone", "--data": "--data.root"}
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
BUILT = ("backbone", "decoder", "detector", "heads")  # beside their options, what says what a model is
SECTIONS = "[--model.OPTION VALUE] [--data.OPTION VALUE] [--trainer.OPTION VALUE] [-c CONFIG]"


class Parser(LightningArgumentParser):
    """Lightning's parser, whose help begins with what users set first: the options that are not Lightning's."""

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        try:
            return super().instantiate_classes(cfg, **options)
        except BackboneError:
            raise
        except FAILURES as error:
            notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
            built = {n: v for n, v in cfg.model.as_dict().items() if v and (n in BUILT or n.endswith("_options"))}
            options = ", ".join(f"model.{name}={value!r}" for name, value in built.items())
            raise InputError(
                f"nothing can be built of {options} and these data: {type(error).__name__}: {error}{notes}"
            ) from error

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        lightning = super().format_help(formatter)
        command, _, task = self.prog.removeprefix("backbones ").partition(" ")
        first = _own_parser(command, task).format_help().rstrip()
        return f"{first}\n\n{lightning.partition(SECTIONS)[2].strip()}\n"


def _own_parser(command: str = "", task: str = "") -> argparse.ArgumentParser:
    """The options of `backbones fit` and its kin that are not Lightning's; with a command, as its help shows them."""
    parser = argparse.ArgumentParser(
        prog=f"backbones {command} {task}",
        usage=f"%(prog)s [--data DIR] [--backbone NAME] [--out DIR] [--ckpt_path last]\n{' ' * 8}{SECTIONS}",
        description=DESCRIPTIONS.get(command, "").format(task),
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to set first").add_argument
    if command:
        add(
            "--data", metavar="DIR", help="folder of your images and labels, --data.root in full; else shapes are drawn"
        )
        add("--backbone", metavar="NAME", help="or '{name: NAME, option: value}', --model.backbone in full")
    add("--out", metavar="DIR", help="the run folder; a new run takes the next of runs/TASK-001, -002, ...")
    going_on = "goes on with a run: the newest, or the one in --out" if command == "fit" else "what to measure"
    add("--ckpt_path", metavar="last|best|FILE", help=going_on)
    trusted = "let the config.yaml of a run folder name classes, which run code: for folders of your own"
    add("--trust", action="store_true", help=trusted)
    if command in ("", "fit"):
        does = "print the learning rate and weight decay of every parameter instead of training"
        add("--print_groups", action="store_true", help=does)
    return parser


DESCRIPTIONS = {
    "fit": "Train a {} model. Options of the model come first, then the data's, and last the trainer's, Lightning's.",
    "validate": "Measure a {} checkpoint on the validation images.",
    "test": "Measure a {} checkpoint on the test images.",
}


def as_trained(
    task: type[Task], checkpoint: Path, trained: Mapping[str, Any], with_config: bool = True, trust: bool = False
) -> list[str]:
    """Arguments for a checkpoint's model, which it tells by itself, and for its data, if its run's config is there.

    Args:
        task: class of the task
        checkpoint: of a run
        trained: its hyperparameters
        with_config: whether to read the config
        trust: whether it may name code
    """
    model = {name: value for name, value in trained.items() if name not in (*task.linked, "seed")}
    before = config_arguments(checkpoint.parent.parent / "config.yaml", task, trust) if with_config else []
    return [*before, "--model", json.dumps(model), *read_as_trained(task, trained)]


def read_as_trained(task: type[Task], trained: Mapping[str, Any]) -> list[str]:
    """Arguments by which images are read as they were in training, with the mean and std that were computed then."""
    known = inspect.signature(task.data_class).parameters
    reading = {name: value for name, value in (trained.get("reading") or {}).items() if name in known}
    return [f"--data.{name}={json.dumps(value)}" for name, value in reading.items() if value is not None]


class CommandLine(LightningCLI):
    """Lightning's command line for a task; it refuses what is wrong before it builds anything.

    Args:
        command: fit, validate or test
        task: class of the task
        argv: what follows the task's name
        claim_run: gives the run folder, once the arguments are known to be right, for a number of machines; no run
            folder if None
        trained: content of the checkpoint that the weights will be read from, if there is one
        source: that checkpoint
    """

    def __init__(
        self,
        command: str,
        task: type[Task],
        argv: list[str],
        claim_run: Callable[[int], Path] | None = None,
        trained: Mapping[str, Any] | None = None,
        source: Path | None = None,
    ):
        self.task = task
        self.claim_run = claim_run
        self.trained, self.source = trained, source
        self.run_folder: Path | None = None
        self.lock: Lock | None = None
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__init__(
            task,
            task.data_class,
            parser_class=Parser,
            args=argv,
            run=False,
            seed_everything_default=0,
            save_config_callback=None,  # see write_config
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": f"backbones {command} {task.name}",
                "usage": f"%(prog)s {SECTIONS}",
                "description": None,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={
                "max_epochs": task.epochs,
                "precision": "bf16-mixed" if bf16 else "32-true",
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # our samplers know the ranks, and carry the epoch
                "enable_model_summary": False,
            },
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """With the model and the data; see below."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As Lightning does, but for the order, which is that of `--help`."""
        parser.add_lightning_class_args(self.task, "model")
        parser.add_lightning_class_args(self.task.data_class, "data")
        super().add_default_arguments_to_parser(parser)  # the seed
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        defaults = {f"trainer.{name}": value for name, value in self.trainer_defaults.items() if name != "callbacks"}
        parser.set_defaults(defaults)

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
            raise InputError(" ".join(explain(str(error), parser).split())) from error
        check_ranges(self.task.name, "", {"seed_everything": self.config.seed_everything})

    def before_instantiate_classes(self) -> None:
        for section in ("model", "data", "trainer"):
            check_ranges(self.task.name, section, self.config[section].as_dict())
        trainer = self.config.trainer
        if trainer.max_epochs == -1 and trainer.max_steps == -1 and self.claim_run:
            raise InputError("trainer.max_epochs=-1 has no end, which the schedule needs: set max_epochs or max_steps")
        if not self.claim_run:  # the teacher need not be there any more
            self.config.model.teacher = self.config.model.distill = None
        self.task.check_options(self.config.model)
        if self.claim_run and trainer.max_epochs > 0 and trainer.max_steps == -1:
            self.task.check_schedule(self.config.model, trainer.max_epochs)

    def instantiate_classes(self) -> None:
        """With a checkpoint, the weights that it began with are not read, and need not be there any more."""
        told = self.config
        backbone = told.model.backbone
        asked = isinstance(backbone, Mapping) and any(map(backbone.get, ("pretrained", "weights")))
        if self.trained is not None and asked:
            self.config = told.clone()
            options = self.trained["hyper_parameters"]
            own = {"pretrained": False, "weights": None, "pretrained_cfg": options["backbone"]["pretrained_cfg"]}
            self.config.model.backbone = {**options["backbone"], **backbone, **own}
            for name in ("layer_decay", "backbone_lr"):
                if told.model[name] is None:
                    self.config.model[name] = options[name]
        super().instantiate_classes()
        self.config = told

    def instantiate_trainer(self, **options: Any) -> Trainer:
        if self.trained is not None and self.source is not None:
            check_same(self.model, self.trained, self.source)
        if self.claim_run:
            if self.config.trainer.sync_batchnorm and self.config.trainer.accelerator == "cpu":
                raise InputError("trainer.sync_batchnorm works on GPUs alone")
            self.datamodule.setup("fit")  # faulty data are found now, and leave no run folder behind
            try_single_image(self.model, self.datamodule)
            self.run_folder = self.claim_run(self.config.trainer.num_nodes)
            self.lock = Lock(self.run_folder)
        run = self.run_folder
        callbacks = [] if self.config.trainer.enable_progress_bar is False else [Progress()]
        if run is None:
            options["logger"] = False
        elif not self.config.trainer.fast_dev_run:
            self.model.folder = run
            callbacks += [FiniteLoss(), EpochLog(run), PredictionPicture(run), *checkpoints(run, self.task.metric)]
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
        try:
            return super().instantiate_trainer(plugins=plugins, **options)
        except (MisconfigurationException, ImportError, *FAILURES) as error:
            if self.lock is not None:
                self.lock.release(undo=True)
            usual = self.parser.get_defaults().trainer.as_dict()
            given = {name: value for name, value in self.config.trainer.as_dict().items() if value != usual[name]}
            shown = ", ".join(f"trainer.{name}={value!r}" for name, value in given.items())
            raise InputError(f"{shown or 'trainer'}: {' '.join(str(error).split())}") from error

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


def own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take out the options of `backbones fit` that are not Lightning's, and write shorthands in full."""
    own, rest = _own_parser().parse_known_args(list(argv))
    rest = [re.sub(r"^(--backbone|--data)(?==|$)", lambda match: SHORTHANDS[match[1]], argument) for argument in rest]
    own.has_config = any(re.match(r"(-c|--config)(=|$)", argument) for argument in rest)
    return own, rest
