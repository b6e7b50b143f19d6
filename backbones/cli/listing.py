"""List the backbones that are installed, with the channels and strides of their maps."""

import argparse
from collections.abc import Iterable, Sequence

from backbones.registry import backbone_info, list_backbones, plugins
from backbones.specs import BackboneInfo

from .output import print_hint, print_json, print_markdown, print_table
from .plugins import SLOW

FAMILY_HEADER = ("family", "variants", "params (M)", "GMACs", "strides", "channels", "options", "weights", "licence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or a shell pattern such as 'pvt*'")
    parser.add_argument("--plugin", help="only those of this plugin or distribution")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--markdown", action="store_true", help="print a Markdown table of families and what they can do")


def run(args: argparse.Namespace) -> int:
    literal = not set("*?[") & set(args.pattern)
    names = list_backbones(f"*{args.pattern}*" if literal else args.pattern, plugin=args.plugin)
    if not names and literal and not args.plugin:
        names = [backbone_info(args.pattern).canonical_name]  # an alias, or UnknownBackbone with the nearest names
    infos = {name: backbone_info(name) for name in names}
    if args.json:
        print_json([{"name": name} | info.as_dict() for name, info in infos.items()])
    elif args.markdown:
        print_markdown(FAMILY_HEADER, _family_rows(infos.values()))
    elif infos:
        header = ("name", "family", "params (M)", "channels", "strides", "weights", "plugin")
        print_table(header, [_row(name, info) for name, info in infos.items()])
    slow = [p for p in plugins() if p.seconds > SLOW]
    if slow:
        print_hint(f"slow to read: {', '.join(f'{p.namespace} ({p.distribution}) {p.seconds:.1f} s' for p in slow)}")
    failed = [p for p in plugins() if p.status not in ("ok", "blocked")]
    if failed:
        owners = ", ".join(f"{p.namespace} ({p.distribution}) is {p.status}" for p in failed)
        print_hint(f"{owners}; run `backbones plugins --errors`")
    if not infos:
        print_hint(f"no backbone matches {args.pattern!r}; `backbones list` shows all")
    return 0 if infos else 1


def _row(name: str, info: BackboneInfo) -> tuple[object, ...]:
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


def _family_rows(infos: Iterable[BackboneInfo]) -> list[tuple[object, ...]]:
    """One row per family: from its smallest to its largest variant."""
    families: dict[str, list[BackboneInfo]] = {}
    for info in infos:
        families.setdefault(info.family, []).append(info)
    return [_family_row(family, members) for family, members in families.items()]


def _family_row(family: str, members: Sequence[BackboneInfo]) -> tuple[object, ...]:
    members = sorted(members, key=lambda info: info.params or 0)
    licenses = sorted({row.license for info in members for row in info.weights if row.license})
    published = sum(len(info.weights) for info in members)
    return (
        f"[{family}]({members[0].paper})" if members[0].paper else family,
        " ".join(f"`{info.name}`" for info in members),
        _span([info.params for info in members]),
        _span([info.gmacs for info in members]),
        " ".join(map(str, members[0].strides)),
        _span([" ".join(map(str, info.channels)) for info in members]),
        " ".join(f"`{option}`" for option in dict.fromkeys(option for info in members for option in info.options)),
        f"{published}: {', '.join(licenses)}" if published else "",
        ", ".join(sorted({info.license for info in members if info.license})),
    )


def _span(values: Iterable[object]) -> str:
    """The first and the last that is known."""
    known = [str(value) for value in values if value is not None]
    return " to ".join(dict.fromkeys([known[0], known[-1]])) if known else ""
