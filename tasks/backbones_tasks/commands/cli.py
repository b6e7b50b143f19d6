"""The commands `backbones fit | validate | test | predict TASK`; each takes the rest of the command line."""

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from backbones.errors import InputError, MissingDependency

TASKS = {
    "segmentation": "backbones_tasks.training.segmentation:SegmentationTask",
    "classification": "backbones_tasks.training.classification:ClassificationTask",
    "detection": "backbones_tasks.training.detection:DetectionTask",
    "multitask": "backbones_tasks.training.multitask:MultiTask",
}

#: What training needs beyond the bare install.
TRAINING = ("jsonargparse", "matplotlib", "pytorch_lightning", "torchmetrics")


def fit(argv: Sequence[str]) -> int:
    """Train a model."""
    return _run("fit", argv)


def validate(argv: Sequence[str]) -> int:
    """Measure a checkpoint on the validation images."""
    return _run("validate", argv)


def test(argv: Sequence[str]) -> int:
    """Measure a checkpoint on the test images."""
    return _run("test", argv)


def predict(argv: Sequence[str]) -> int:
    """Label images by a checkpoint."""
    return _run("predict", argv)


def compare(argv: Sequence[str]) -> int:
    """Train one recipe on several backbones, and put what comes out into a table."""
    return _run("compare", argv)


def share(argv: Sequence[str]) -> int:
    """Save a trained model for others."""
    require("backbones share", "train", *TRAINING)
    from ..models.sharing import command

    return command(argv)


def export(argv: Sequence[str]) -> int:
    """Write a model as a file for onnxruntime or torch.export."""
    from .export import command

    return command(argv)


def require(what: str, extra: str, *modules: str) -> None:
    """Raise MissingDependency, with the line that installs the extra, unless all these modules are there."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise MissingDependency(f"{what} needs {module}; run `pip install 'dense-backbones[{extra}]'`") from error


def key_values(given: Sequence[str]) -> dict[str, Any]:
    """What `--option KEY=VALUE ...` says, values as in YAML."""
    import yaml

    options = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--option {each}: write KEY=VALUE, such as pyramid=taps or out_indices=[1,2]")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {each}: {value!r} is no YAML: {error}") from error
    return options


def _run(command: str, argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: backbones {command} TASK ...\n\nTASK: {', '.join(TASKS)}  (backbones {command} TASK --help)")
        return 0 if argv else 2
    if argv[0] not in TASKS:
        close = difflib.get_close_matches(argv[0], TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(TASKS)}"
        raise InputError(f"backbones {command}: unknown task {argv[0]!r}; {hint}")
    require(f"backbones {command}", "train", *TRAINING)
    if command == "predict":
        from .predict import predict as run

        return run(argv)
    if command == "compare":
        from .compare import run_comparison

        return run_comparison(argv[0], argv[1:])
    from ..training.command_line import run_training

    return run_training(command, argv[0], argv[1:])
