"""List the backbones that are installed, with the channels and strides of their maps."""

import argparse

from backbones.registry import backbone_info, list_backbones, plugins

from .output import print_hint, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or a shell pattern such as 'pvt*'")
    parser.add_argument("--plugin", help="only those of this plugin or distribution")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    literal = not set("*?[") & set(args.pattern)
    names = list_backbones(f"*{args.pattern}*" if literal else args.pattern, plugin=args.plugin)
    if not names and literal and not args.plugin:
        names = [backbone_info(args.pattern).canonical_name]  # an alias, or UnknownBackbone with the nearest names
    infos = {name: backbone_info(name) for name in names}
    if args.json:
        print_json([{"name": name} | info.as_dict() for name, info in infos.items()])
    elif infos:
        header = ("name", "family", "params (M)", "channels", "strides", "weights", "plugin")
        print_table(header, [_row(name, info) for name, info in infos.items()])
    failed = [p for p in plugins() if p.status not in ("ok", "blocked")]
    if failed:
        owners = ", ".join(f"{p.namespace} ({p.distribution}) is {p.status}" for p in failed)
        print_hint(f"{owners}; run `backbones plugins --errors`")
    if not infos:
        print_hint(f"no backbone matches {args.pattern!r}; `backbones list` shows all")
    return 0 if infos else 1


def _row(name, info):
    tags = [row.tag for row in info.weights]
    return (
        name,
        info.family,
        "" if info.params is None else info.params,
        " ".join(map(str, info.channels)),
        " ".join(map(str, info.strides)),
        f"{tags[0]} +{len(tags) - 1}" if len(tags) > 1 else "".join(tags),
        info.plugin,
    )
