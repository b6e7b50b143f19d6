"""List the plugins that are installed, and what is wrong with those that do not work."""

import argparse
from dataclasses import asdict

from backbones.registry import plugins

from .output import print_hint, print_json, print_table

#: Seconds from which on the time that reading a plugin took is told without being asked for.
SLOW = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="only those of this plugin or distribution")
    parser.add_argument("--errors", action="store_true", help="with the traceback of each plugin that does not work")
    parser.add_argument("--timing", action="store_true", help="with the seconds that reading each one took")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON, tracebacks included")
    how.add_argument(
        "--markdown",
        action="store_true",
        help="print a page with families, variants, licences and what the conformance kit says, which is run: minutes",
    )


def run(args: argparse.Namespace) -> int:
    found = plugins(args.name)
    if args.json:
        print_json([asdict(plugin) for plugin in found])
        return 0
    if args.markdown:
        from .directory import print_page  # the kit, and torch

        return print_page(found)
    header = ("plugin", "distribution", "version", "backbones", "status", *(("seconds",) if args.timing else ()))
    rows = [(p.namespace, p.distribution, p.version, p.backbones, p.status, f"{p.seconds:.3f}") for p in found]
    print_table(header, [row[: len(header)] for row in rows])
    faulty = [p for p in found if p.error]
    for plugin in faulty:
        print(f"\n{plugin.namespace} ({plugin.distribution} {plugin.version}) is {plugin.status}:")
        print(plugin.traceback.rstrip() if args.errors else plugin.error)
    for plugin in found:
        slow = f"reading it took {plugin.seconds:.1f} s" if plugin.seconds > SLOW else ""
        if told := "; ".join(filter(None, (plugin.note, slow))):
            print(f"\n{plugin.namespace} ({plugin.distribution} {plugin.version}): {told}")
    if faulty and not args.errors:
        print_hint("\nrun `backbones plugins --errors` for the tracebacks")
    return 0
