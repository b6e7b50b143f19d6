"""Run the conformance kit: everything that a backbone promises, checked on this machine."""

import argparse
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from backbones.errors import InputError

from .output import print_hint, print_json, print_table

if TYPE_CHECKING:
    from backbones.testing import CheckResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="backbones to check")
    parser.add_argument("--plugin", metavar="DIST", help="check all of a distribution or plugin")
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes: compile, two processes")
    parser.add_argument(
        "--expect", action="append", default=[], metavar="CHECK=REASON", help="a check that may fail, and why; repeat"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if bool(args.names) == bool(args.plugin):
        raise InputError("name the backbones to check, or a distribution with --plugin")
    expected = dict(_expectation(text) for text in args.expect)
    from backbones.registry import backbone_info
    from backbones.testing import check_backbone, check_plugin

    def report(result: "CheckResult") -> None:
        if not args.json:
            print_hint(f"{result.backbone} {result.check}: {result.outcome} ({result.seconds:.1f} s)")

    if args.plugin:
        results = check_plugin(args.plugin, slow=not args.quick, report=report, expected_failures=expected)
    else:
        names = [backbone_info(name).canonical_name for name in args.names]  # names are checked before anything is run
        results = [r for name in names for r in check_backbone(name, expected, slow=not args.quick, report=report)]
    failed = [result for result in results if result.outcome == "failed"]
    if args.json:
        print_json([asdict(result) for result in results])
        return 1 if failed else 0
    if len({result.backbone for result in results}) == 1:
        print_table(("check", results[0].backbone), [(result.check, result.outcome) for result in results])
    else:
        unmet = [result for result in results if result.outcome in ("failed", "expected")]
        print_table(("backbone", "check", "outcome"), [(r.backbone, r.check, r.outcome) for r in unmet])
    for result in results:
        if result.message and result.outcome != "passed":
            print(f"{result.backbone} {result.check} {result.outcome}: {result.message}")
    counts = Counter(result.outcome for result in results)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{len(results)} checks in {sum(r.seconds for r in results):.0f} s: {told}")
    return 1 if failed else 0


def _expectation(text: str) -> tuple[str, str]:
    check, _, reason = text.partition("=")
    if not reason:
        raise InputError(f"--expect {text}: write CHECK=REASON, such as --expect 'export=a loop over the images'")
    return check, reason
