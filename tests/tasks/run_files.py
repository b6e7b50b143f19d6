"""What a run leaves behind, for tests that compare runs."""

from pathlib import Path

import torch

from backbones_tasks.files import read_checkpoint
from backbones_tasks.training.callbacks import read_metrics


def rows(run):
    """metrics.csv without what no two runs share: times and memory."""
    table = read_metrics(Path(run) / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for row in table]


def weights(run, which="last"):
    return read_checkpoint(Path(run) / "checkpoints" / f"{which}.ckpt")["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
