"""Measure backbones: parameters, GMACs, latency, throughput, peak memory; side by side with timm if asked.

All columns of a name are timed in turn, in one run, each round in another order: whatever else the machine does falls
on all of them alike. A table cell is the median and, in brackets, the least.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from backbones.cli.output import print_hint, print_json, print_table
from backbones.errors import InputError
from backbones.memory import keep_memory

from .cases import RUNTIMES, Case, columns
from .timing import Result, machine, measure

__all__ = ["Case", "Result", "add_arguments", "machine", "measure", "run"]

_VERSUS = ("timm", "compile", *RUNTIMES)
# What a column of ours is held against; where nothing is said, the best of all that timm has.
_AGAINST = {"plain": ("timm",), "plain channels-last": ("timm", "timm channels-last")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name from `backbones list`")
    parser.add_argument("--size", type=int, nargs="+", default=[512], metavar="PX", help="side, or height and width")
    parser.add_argument("--batch", type=int, help="images per batch; 1, and on fake-cuda 8")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward")
    parser.add_argument(
        "--vs",
        nargs="+",
        default=[],
        choices=_VERSUS,
        help="more columns: timm's model, as built and channels-last; all of them compiled for this one size; timm's "
        "model in onnxruntime or OpenVINO, with as many threads",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=["float32", "bfloat16", "float16"],
        help='each has columns of its own; for_inference casts weights, as does timm\'s "cast"; all others run under '
        "autocast",
    )
    parser.add_argument(
        "--device",
        help="cuda where there is one, else cpu; fake-cuda, which needs no GPU, runs every model on tensors without "
        "data and tells whether it would run on one, without waiting for it, and how much it asks of it",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each column, warm-up aside")
    parser.add_argument("--rounds", type=int, help="at most so many, and at least 3")
    parser.add_argument("--no-memory", action="store_true", help="no peak memory, which takes processes of its own")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    if len(args.size) > 2 or min(args.size) < 1 or (args.batch or 1) < 1:
        raise InputError("--size takes one or two positive numbers of pixels, and --batch a positive number of images")
    if args.device == "fake-cuda":
        from . import fake

        return fake.run(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type != "cpu" and set(args.vs) & set(RUNTIMES):
        raise InputError(f"--vs {' '.join(RUNTIMES)} run on a CPU: add --device cpu, or leave them out")
    keep_memory()
    load = Case(
        name="",
        size=(args.size[0], args.size[-1]),
        batch=args.batch or 1,
        train=args.train,
        device=device,
    )
    every = [columns(name, load, args.vs, args.dtype) for name in args.names]  # all are checked before any is timed
    results: list[list[Result]] = []
    for cases in every:
        results.append(measure(cases, args.seconds * len(cases), args.rounds, not args.no_memory))
        print_hint(_summary(results[-1]))
    names = [row[-1].name for row in results]
    rates = [ratios(row) for row in results]
    failed = int(any(result.error and result.library == "ours" for row in results for result in row))
    where = machine(replace(load, dtype=" and ".join(args.dtype)))
    if args.json:
        rows = [asdict(result) for row in results for result in row]
        by_name = dict(zip(names, rates, strict=True))
        print_json({"machine": where, "results": rows, "ratios": by_name, "geomeans": geomeans(rates)})
        return failed
    print(f"{where}\n")
    _print_models(results)
    for dtype in args.dtype:
        print(f"\n{dtype}, median (least) ms")
        _print_latencies([[result for result in row if result.dtype == dtype] for row in results])
    if any(rates):
        print("\nhow many times as quick")
        _print_ratios(names, rates)
    for name, row in zip(names, results, strict=True):
        if set(args.vs) & {"timm", *RUNTIMES} and not any(result.library == "timm" for result in row):
            print_hint(f"{name}: timm has no such model")
        for result in row:
            if result.error:
                print_hint(f"{name}, {result.column} {result.dtype}: {result.error}")
    return failed


def ratios(row: Iterable[Result]) -> dict[str, float]:
    """What one name's columns of ours are to timm's, as built or at its best, and lower precision to float32."""
    latency = {(r.column, r.dtype): r.latency_ms for r in row if r.latency_ms}
    rates = {}
    for (column, dtype), ours in latency.items():
        if column.startswith("timm"):
            continue
        against = _AGAINST.get(column)
        theirs = [ms for (c, d), ms in latency.items() if d == dtype and c.startswith("timm") and c in (against or [c])]
        if theirs:
            rates[f"{column} {dtype} / {'best of timm' if against != ('timm',) else 'timm'}"] = min(theirs) / ours
        if dtype != "float32" and (column, "float32") in latency:
            rates[f"{column} {dtype} / float32"] = latency[column, "float32"] / ours
    return {name: round(rate, 3) for name, rate in rates.items()}


def geomeans(rates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The geometric mean of each ratio over all names that have it."""
    names = dict.fromkeys(name for row in rates for name in row)
    values = {name: [row[name] for row in rates if name in row] for name in names}
    return {name: round(math.exp(statistics.fmean(map(math.log, some))), 3) for name, some in values.items()}


def _summary(row: Sequence[Result]) -> str:
    """What was measured of one name, in a line that stays if the next one ends the run."""
    times = (f"{result.column} {result.dtype} {result.latency_ms or 'failed'}" for result in row)
    return f"measured {row[-1].name}, ms: {', '.join(times)}"


def _print_models(results: Sequence[Sequence[Result]]) -> None:
    """What does not depend on the column, and peak memory, which does."""
    memory = list(dict.fromkeys((r.column, r.dtype) for row in results for r in row if r.peak_mb is not None))
    several = len({dtype for _, dtype in memory}) > 1
    header = ["name", "library", "size", "map strides", "params M", "GMACs"]
    header += [f"MB {column}" + f" {dtype}" * several for column, dtype in memory]
    table = []
    for row in results:
        for library in dict.fromkeys(r.library for r in row):
            measured = [r for r in row if r.library == library and r.latency_ms]
            if not measured:
                continue
            peaks = {(r.column, r.dtype): r.peak_mb for r in measured}
            first = measured[0]
            facts = [first.name, library, first.size, first.maps, first.params_m, first.gmacs]
            table.append([*facts, *(_cell(peaks.get(key)) for key in memory)])
    print_table(header, table)


def _print_latencies(results: Sequence[Sequence[Result]]) -> None:
    names = list(dict.fromkeys(result.column for row in results for result in row))
    table = []
    for row in results:
        cells = {r.column: f"{r.latency_ms} ({r.least_ms})" if r.latency_ms else "failed" for r in row}
        table.append([row[-1].name, *(cells.get(name, "") for name in names)])
    print_table(["name", *names], table)


def _print_ratios(names: Sequence[str], rates: Sequence[dict[str, float]]) -> None:
    header = list(dict.fromkeys(name for row in rates for name in row))
    rows = [("geomean", geomeans(rates))] if len(names) > 1 else []
    table = [[name, *(_cell(row.get(key)) for key in header)] for name, row in [*zip(names, rates, strict=True), *rows]]
    print_table(["name", *header], table)


def _cell(value: object) -> object:
    return "" if value is None else value
