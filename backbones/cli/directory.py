"""The page of installed plugins: what they have, under which licences, and what the conformance kit says of it."""

import math
from collections.abc import Sequence

from backbones import __version__
from backbones.registry import PluginInfo, backbone_info, list_backbones
from backbones.specs import BackboneInfo
from backbones.testing import CheckResult, check_backbone, smallest_of_each_family

from .output import print_hint, print_markdown

HEADER = ("plugin", "package", "families", "backbones", "licence", "weights", "quick kit")
#: Families and licences of one plugin that are all named; of more, the first few are.
NAMED, FEW = 5, 3


def print_page(plugins: Sequence[PluginInfo]) -> int:
    """Checks the plugins' backbones, prints the page, and returns whether something failed, as an exit code."""
    listed = set(list_backbones())
    rows, failed = [], False
    for plugin in plugins:
        infos = {name: backbone_info(name) for name in list_backbones(plugin=plugin.namespace)}
        chosen = smallest_of_each_family(infos.keys() & listed)
        if not chosen:  # a catalogue alone
            chosen = sorted(infos, key=lambda name: infos[name].params or math.inf)[:1]
        results = [result for name in chosen for result in _check(infos[name])]
        failed |= any(result.outcome == "failed" for result in results) or plugin.status not in ("ok", "blocked")
        rows.append((*_row(plugin, list(infos.values())), _verdict(plugin, chosen, results)))
    print(
        f"Checked with dense-backbones {__version__}, by `backbones check NAME --quick` on the smallest backbone of "
        "each family or, where a plugin has a catalogue, on the smallest in it.\n"
    )
    print_markdown(HEADER, rows)
    return int(failed)


def _check(info: BackboneInfo) -> list[CheckResult]:
    print_hint(f"checking {info.canonical_name}")
    return check_backbone(info.canonical_name, slow=False)


def _row(plugin: PluginInfo, infos: Sequence[BackboneInfo]) -> tuple[str, ...]:
    papers: dict[str, str] = {}
    for info in infos:
        papers[info.family] = papers.get(info.family) or info.paper
    families = [f"[{family}]({paper})" if paper else family for family, paper in papers.items()]
    by_size = sorted(infos, key=lambda info: info.params or math.inf)
    ends = dict.fromkeys(f"`{info.name}`" for info in (by_size[:1] + by_size[-1:]))
    weights = [row for info in infos for row in info.weights]
    return (
        f"`{plugin.namespace}`",
        f"{plugin.distribution} {plugin.version}".strip(),
        _some(families),
        f"{len(infos)}, {' to '.join(ends)}" if infos else "",
        _some(sorted({info.license or "not stated" for info in infos})),
        f"{len(weights)}, {_some(sorted({row.license or 'not stated' for row in weights}))}" if weights else "",
    )


def _some(names: Sequence[str]) -> str:
    """All of a few, or how many there are and the first ones."""
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)}: {', '.join(names[:FEW])}, ..."


def _verdict(plugin: PluginInfo, names: Sequence[str], results: Sequence[CheckResult]) -> str:
    if not names:
        return f"{plugin.status}: {plugin.error or plugin.note}".removesuffix(": ")
    failures = {}
    for name in names:
        about = backbone_info(name).canonical_name
        failures[name] = [f"`{r.check}`" for r in results if r.backbone == about and r.outcome == "failed"]
    kept = [f"`{name}`" for name, checks in failures.items() if not checks]
    told = [f"{', '.join(kept)} {'pass' if len(kept) > 1 else 'passes'}"] if kept else []
    told += [f"`{name}` fails {', '.join(checks)}" for name, checks in failures.items() if checks]
    return "; ".join([*told, *([f"{plugin.status}: {plugin.error}"] if plugin.error else [])])
