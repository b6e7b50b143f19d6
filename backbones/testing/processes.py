"""Training on several processes."""

import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from ..backbone import Backbone
from .common import Build, Skipped, fail, random_images, require

#: What a process of two does: not by `multiprocessing`, which would run the program that checks once more.
_TRAIN = "import sys; from backbones.testing.processes import train_on_one_of_two; train_on_one_of_two(*sys.argv[1:])"


def check_two_processes(build: Build) -> None:
    """Under DistributedDataParallel, two processes agree on every gradient."""
    model = build()
    local = sorted({type(m).__name__ for m in model.modules() if type(m).__module__ == "__main__"})
    if local:
        raise Skipped(f"another process cannot import {', '.join(local)} of the program that runs; put it in a module")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model").write_bytes(pickle.dumps(model))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", _TRAIN, folder]
        processes = [
            subprocess.Popen(
                [*command, rank], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in "01"
        ]
        told = [process.communicate() for process in processes]
    for process, (_, error) in zip(processes, told, strict=True):
        if process.returncode:
            fail(
                f"a process of two ends with {process.returncode}: {error.strip().splitlines()[-1] if error else ''}",
                "use every parameter in every forward, and put classes where another process can import them",
            )
    sums = [float(out.splitlines()[-1]) for out, _ in told]
    require(
        math.isclose(*sums, rel_tol=1e-6) and sums[0] > 0,
        f"the sums of all gradients are {sums[0]} and {sums[1]}",
        "use every parameter in every forward",
    )


def train_on_one_of_two(folder: str, rank: str) -> None:
    """A step of training as one process of two; prints the sum of all gradients."""
    model: Backbone = pickle.loads(Path(folder, "model").read_bytes())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=int(rank), world_size=2
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(int(rank))
    torch.stack([m.square().mean() for m in parallel(random_images(model, 64, 64))]).sum().backward()
    print(sum(p.grad.double().abs().sum().item() for p in model.parameters() if p.grad is not None))
    torch.distributed.destroy_process_group()
