"""List the plugins that are installed, and what is wrong with those that do not work."""

import argparse
from dataclasses import asdict

from backbones.registry import plugins

from .output import print_hint, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--errors", action="store_true", help="with the traceback of each plugin that does not work")
    parser.add_argument("--json", action="store_true", help="print JSON, tracebacks included")


def run(args: argparse.Namespace) -> int:
    found = plugins()
    if args.json:
        print_json([asdict(plugin) for plugin in found])
        return 0
    header = ("plugin", "distribution", "version", "backbones", "status")
    print_table(header, [(p.namespace, p.distribution, p.version, p.backbones, p.status) for p in found])
    faulty = [p for p in found if p.error]
    for plugin in faulty:
        print(f"\n{plugin.namespace} ({plugin.distribution} {plugin.version}) is {plugin.status}:")
        print(plugin.traceback.rstrip() if args.errors else plugin.error)
    if faulty and not args.errors:
        print_hint("\nrun `backbones plugins --errors` for the tracebacks")
    return 0
