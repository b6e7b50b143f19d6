"""Training on several processes."""

import math
import pickle
import tempfile
from typing import Any

import torch
from torch import nn

from .common import Build, require


def check_two_processes(build: Build) -> None:
    """Under DistributedDataParallel, two processes agree on every gradient."""
    model = build()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/rendezvous", pickle.dumps(model), queue)
        processes = torch.multiprocessing.spawn(_train_on_one_of_two, arguments, nprocs=2, join=False)
        while not processes.join():
            pass
        sums = [queue.get(), queue.get()]
    require(
        math.isclose(*sums, rel_tol=1e-6) and sums[0] > 0,
        f"the sums of all gradients are {sums[0]} and {sums[1]}",
        "use every parameter in every forward",
    )


def _train_on_one_of_two(rank: int, address: str, pickled: bytes, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(pickle.loads(pickled))
    torch.manual_seed(rank)
    sum(m.square().mean() for m in model(torch.randn(2, model.module.in_chans, 64, 64))).backward()
    queue.put(sum(p.grad.double().abs().sum().item() for p in model.parameters() if p.grad is not None))
    torch.distributed.destroy_process_group()
