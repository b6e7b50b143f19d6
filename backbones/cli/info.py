"""Show everything that is known about one backbone; an alias will do."""

import argparse

from backbones.registry import backbone_info
from backbones.specs import Result, Weights

from .output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a name from `backbones list`, or an alias")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    info = backbone_info(args.name)
    if args.json:
        print_json(info.as_dict())
        return 0
    print(info.canonical_name + (f": {info.summary}" if info.summary else ""))
    lines = {
        "family": info.family,
        "channels": " ".join(map(str, info.channels)),
        "strides": " ".join(map(str, info.strides)),
        "parameters": "" if info.params is None else f"{info.params} M",
        "GMACs": "" if info.gmacs is None else f"{info.gmacs} at 224 x 224",
        "aliases": ", ".join(info.aliases),
        "built with": ", ".join(f"{option}={value!r}" for option, value in info.defaults.items()),
        "options": ", ".join(info.options),
        "layer decay": "" if info.layer_decay == 1 else f"{info.layer_decay} to fine-tune published weights",
        "entry": info.entry,
        "plugin": f"{info.plugin} ({info.distribution} {info.version})",
        "requires": ", ".join(info.requires),
        "licence": info.license,
        "paper": info.paper,
    }
    for label, text in lines.items():
        if text:
            print(f"  {label:<11} {text}")
    if info.weights:
        print("  weights     for pretrained=; True takes the first")
        print_table(_WEIGHTS, [_weights_row(row) for row in info.weights], indent=" " * 14)
    if info.results:
        print("  published   of whole models, in per cent")
        print_table(_RESULTS, [_results_row(row) for row in info.results], indent=" " * 14)
    return 0


_WEIGHTS = ("tag", "input", "classes", "metrics", "licence", "built with", "source", "recipe")


def _weights_row(row: Weights) -> tuple[str, ...]:
    metrics = ", ".join(f"{name} {value}" for name, value in row.metrics.items())
    options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
    classes = "" if row.classes is None else str(row.classes)
    size = "x".join(map(str, row.input_size))
    return row.tag, size, classes, metrics, row.license, options, row.source, row.recipe


_METRICS = {"box_ap": "box AP", "mask_ap": "mask AP", "miou": "mIoU", "miou_ms": "mIoU, scales"}
_RESULTS = ("method", "dataset", *_METRICS.values(), "schedule", "size", "pretrained on", "params (M)", "source")


def _results_row(row: Result) -> tuple[object, ...]:
    metrics = (row.metrics.get(name, "") for name in _METRICS)
    params = "" if row.params is None else row.params
    source = row.source if row.checked else f"{row.source} (not checked)"
    return row.method, row.dataset, *metrics, row.schedule, row.size, row.pretrain, params, source
