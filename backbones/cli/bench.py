"""Measure backbones: parameters, GMACs, latency, throughput, peak memory; side by side with timm if asked."""

import argparse
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backbones.errors import InputError
from backbones.registry import backbone_info, build_backbone

from .output import print_hint, print_json, print_table

if TYPE_CHECKING:
    from torch import nn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name from `backbones list`")
    parser.add_argument("--size", type=int, nargs="+", default=[512], metavar="PX", help="side, or height and width")
    parser.add_argument("--batch", type=int, default=1, help="images per batch")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward")
    parser.add_argument("--vs", choices=["timm"], help="measure the same model of timm too, in turn with ours")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long to time each name, warm-up aside")
    parser.add_argument("--json", action="store_true", help="print JSON")


@dataclass(frozen=True)
class Case:
    """One model under one load; plain data, so that a fresh process can build it for the memory figure."""

    #: Where to build it if it shall only be counted.
    counted_on: ClassVar[str] = "meta"

    library: str
    name: str
    options: dict[str, Any]
    size: tuple[int, int]
    batch: int
    train: bool
    dtype: str
    device: str
    compile: bool

    def build(self, device: str | None = None) -> "tuple[nn.Module, Any]":
        """The model and what it is called with, on a device, by default its own."""
        import torch

        device = device or self.device
        if self.library == "timm":
            import timm

            model = timm.create_model(self.name, **self.options)
        else:
            model = build_backbone(self.name, **self.options)
        model = model.to(device).train(self.train)
        dtype = getattr(torch, self.dtype)
        if not self.train:
            model.to(dtype)
        images = torch.randn(self.batch, 3, *self.size, device=device, dtype=torch.float32 if self.train else dtype)
        return model, images

    def strides(self, model: "nn.Module") -> list[int]:
        """Strides of the maps that the model, or the backbone in it, returns."""
        return model.feature_info.reduction()


@dataclass(frozen=True)
class Result:
    """What was measured of one model; `ratio` is timm's latency over ours."""

    name: str
    library: str
    size: str
    maps: str
    params_m: float
    gmacs: float
    latency_ms: float
    images_s: float
    peak_mb: float
    ratio: float | None = None


def run(args: argparse.Namespace) -> int:
    import torch

    if len(args.size) > 2 or min(args.size) < 1 or args.batch < 1:
        raise InputError("--size takes one or two positive numbers of pixels, and --batch a positive number of images")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    load = Case("", "", {}, (args.size[0], args.size[-1]), args.batch, args.train, args.dtype, device, args.compile)
    pairs = [_cases(name, load, args.vs) for name in args.names]  # names are checked before anything is timed
    rows: list[Result] = []
    for cases in pairs:
        measured = measure(cases, args.seconds)
        if len(measured) == 2:
            measured[0] = replace(measured[0], ratio=round(measured[1].latency_ms / measured[0].latency_ms, 2))
        rows += measured
        if not args.json:
            print_hint(f"measured {measured[0].name}")
    ratios = [row.ratio for row in rows if row.ratio]
    geomean = round(math.exp(statistics.fmean(map(math.log, ratios))), 2) if ratios else None
    if args.json:
        print_json({"machine": machine(load), "results": [asdict(row) for row in rows], "geomean_ratio": geomean})
        return 0
    print(machine(load))
    header = (
        "name",
        "library",
        "size",
        "map strides",
        "params M",
        "GMACs",
        "latency ms",
        "images/s",
        "peak MB",
        "timm/ours",
    )
    print_table(header, [["" if v is None else v for v in asdict(row).values()] for row in rows])
    if ratios:
        print(f"timm's latency over ours: geomean {geomean}, worst {min(ratios)} of {len(ratios)}")
    return 0


def _cases(name: str, load: Case, versus: str | None) -> list[Case]:
    """Ours and, if asked for, timm's, returning maps of the same strides."""
    info = backbone_info(name)
    ours = replace(load, library="ours", name=info.canonical_name)
    if versus is None:
        return [ours]
    import timm

    known = next((n for n in (info.name, *info.aliases) if timm.is_model(n)), None)
    if known is None:
        raise InputError(f"timm has no {info.name!r} to compare with (tried {', '.join((info.name, *info.aliases))})")
    options, size = _timm_options(known, load.size)
    load = replace(load, size=size)
    levels = timm.create_model(known, **options).feature_info.reduction(None)
    last = {stride: i for i, stride in enumerate(levels)}  # timm lists every block of a plain ViT
    shared = [stride for stride in info.strides if stride in last]
    if not shared:
        raise InputError(f"timm's {known} yields maps of strides {sorted(last)}, and {info.name} of {info.strides}")
    options["out_indices"] = _timm_indices(known, options, shared)
    ours = replace(load, library="ours", name=info.canonical_name)
    ours = replace(ours, options={"out_indices": tuple(info.strides.index(stride) for stride in shared)})
    return [ours, replace(load, library="timm", name=known, options=options)]


def _timm_options(name: str, size: tuple[int, int]) -> tuple[dict[str, Any], tuple[int, int]]:
    """Options under which timm's model takes images of `size`; where there are none, a size that it takes."""
    import timm
    import torch

    native = timm.get_pretrained_cfg(name).input_size[1:]
    for options, side in (({}, size), ({"img_size": size}, size), ({}, native)):
        try:
            with torch.device("meta"), torch.no_grad():
                timm.create_model(name, features_only=True, **options).eval()(torch.empty(1, 3, *side))
        except Exception:  # whatever a model raises for a size it was not built for
            continue
        return {"features_only": True, **options}, side
    raise InputError(f"timm's {name} yields maps neither at {size[0]} x {size[1]} nor at its own {native}")


def _timm_indices(name: str, options: dict[str, Any], strides: list[int]) -> tuple[int, ...]:
    """Indices, among all that timm's model has, of the last map of each stride."""
    import timm

    info = timm.create_model(name, **options).feature_info.info
    return tuple(max(i for i, level in enumerate(info) if level["reduction"] == stride) for stride in strides)


def measure(cases: list[Case], seconds: float) -> list[Result]:
    """Times the cases in turn, so that whatever else the machine does falls on all of them alike."""
    steps, models = [], []
    for case in cases:
        model, images = case.build()
        models.append(model)
        steps.append(_step(case, model, images))
    for step in steps:
        step()
        step()
    times: list[list[float]] = [[] for _ in cases]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return [
        Result(
            name=case.name,
            library=case.library,
            size="x".join(map(str, case.size)),
            maps=" ".join(map(str, case.strides(model))),
            params_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
            gmacs=round(_gmacs(case), 2),
            latency_ms=round(1e3 * statistics.median(taken), 1),
            images_s=round(case.batch / statistics.median(taken), 2),
            peak_mb=round(_peak_memory(case), 1),
        )
        for case, model, taken in zip(cases, models, times, strict=True)
    ]


def _step(case: Case, model: "nn.Module", images: Any) -> Callable[[], None]:
    import torch

    call = torch.compile(model) if case.compile else model
    kind = torch.device(case.device).type
    mixed = case.train and case.dtype != "float32"

    def step() -> None:
        if case.train:
            with torch.autocast(kind, getattr(torch, case.dtype), enabled=mixed):
                loss = sum(m.float().mean() for m in call(images))
            loss.backward()
            model.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode():
                call(images)
        if kind == "cuda":
            torch.cuda.synchronize()

    return step


def _gmacs(case: Case) -> float:
    """Multiply-adds of convolutions and matrix products in the forward pass of one image, attention included."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    single = replace(case, batch=1, dtype="float32", train=False)
    model, images = single.build(case.counted_on)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops() / 2e9


def _peak_memory(case: Case) -> float:
    """Most memory, in MB, that a step takes beyond what the process held before the model was built."""
    import torch

    if torch.device(case.device).type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model, images = case.build()
        step = _step(case, model, images)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    import multiprocessing

    # A process of its own: what other models have allocated and given back would hide the peak.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_resident, (case,))


def _peak_resident(case: Case) -> float:
    import torch

    # What is imported and started along the way is no model's.
    case.build(case.counted_on)
    torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(30, 30))(torch.randn(1, 8, 32, 32)).sum().backward()
    before = _max_resident(reset=True)
    step = _step(case, *case.build())
    _max_resident(reset=True)  # what only building it takes, such as a checkpoint to be read, is not the step's
    step()
    step()
    return _max_resident() - before


def _max_resident(reset: bool = False) -> float:
    """Most memory, in MB, that this process has held, since it was last reset where the system can."""
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what is free already should not serve the model unseen
            Path("/proc/self/clear_refs").write_text("5")
        # Linux: unlike getrusage's figure, this one is not inherited from the parent process.
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, AttributeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine(load: Case) -> str:
    import torch

    if torch.device(load.device).type == "cuda":
        where = torch.cuda.get_device_name(load.device)
    else:
        threads = torch.get_num_threads()
        where = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' if threads > 1 else ''}"
    what = "forward and backward" if load.train else "forward"
    how = f"{load.dtype}, batch {load.batch}, {load.size[0]} x {load.size[1]}{', compiled' if load.compile else ''}"
    return f"{where}, torch {torch.__version__}: {what}, {how}"
