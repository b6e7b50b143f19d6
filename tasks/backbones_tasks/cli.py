"""The commands `backbones fit | validate | test | predict TASK`; each takes the rest of the command line."""

import difflib
from collections.abc import Sequence

from backbones.errors import InputError, MissingDependency

TASKS = {
    "segmentation": "backbones_tasks.segmentation:SegmentationTask",
    "classification": "backbones_tasks.classification:ClassificationTask",
    "detection": "backbones_tasks.detection:DetectionTask",
    "multitask": "backbones_tasks.multitask:MultiTask",
}


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


def _run(command: str, argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: backbones {command} TASK ...\n\nTASK: {', '.join(TASKS)}  (backbones {command} TASK --help)")
        return 0 if argv else 2
    if argv[0] not in TASKS:
        close = difflib.get_close_matches(argv[0], TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(TASKS)}"
        raise InputError(f"backbones {command}: unknown task {argv[0]!r}; {hint}")
    try:
        import jsonargparse  # noqa: F401
        import matplotlib  # noqa: F401
        import pytorch_lightning  # noqa: F401
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"backbones {command} needs {error.name}; run `pip install 'dense-backbones[train]'`"
        ) from error
    if command == "predict":
        from .prediction import predict as run

        return run(argv)
    from .training import run_training

    return run_training(command, argv[0], argv[1:])
