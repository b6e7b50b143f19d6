"""Entry points of the commands on tasks; each takes the rest of the command line and imports its file when it runs."""

from collections.abc import Sequence

from backbones.errors import InputError
from backbones.memory import keep_memory

from ..options import TASKS, TRAINING, nearest, require


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
    from .share import command

    return command(argv)


def export(argv: Sequence[str]) -> int:
    """Write a model as a file for onnxruntime or torch.export."""
    from .export import command

    return command(argv)


def _run(command: str, argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: backbones {command} TASK ...\n\nTASK: {', '.join(TASKS)}  (backbones {command} TASK --help)")
        return 0 if argv else 2
    if argv[0] not in TASKS:
        raise InputError(f"backbones {command}: unknown task {argv[0]!r}; {nearest(argv[0], TASKS)}")
    require(f"backbones {command}", "train", *TRAINING)
    keep_memory()
    if command == "predict":
        from .predict import predict as run

        return run(argv)
    if command == "compare":
        from .compare import run_comparison

        return run_comparison(argv[0], argv[1:])
    if command == "fit":
        from .fit import run_fit

        return run_fit(argv[0], argv[1:])
    from .evaluate import run_evaluation

    return run_evaluation(command, argv[0], argv[1:])
