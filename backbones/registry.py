"""Which backbones there are, and how one is built; plugins are read once, when first asked for."""

import difflib
import importlib
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .building import build, check_entry
from .discovery import LOCAL, Plugin, describe, normalized, read_plugins
from .errors import AmbiguousBackbone, InputError, PluginError, UnknownBackbone
from .specs import BackboneInfo, BackboneSpec

if TYPE_CHECKING:
    from .backbone import Backbone

_lock = threading.RLock()
_read: list[Plugin] | None = None
_reading = False
_local = Plugin(namespace=LOCAL, module="__main__")


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """What became of one plugin.

    Args:
        namespace: name of its entry point; the first half of its backbones' canonical ids.
        distribution, version: what was installed; empty for `register`ed specs.
        module: what the entry point names.
        status: `ok`; `blocked` by the environment; `incompatible`, see `BACKBONES_API`; `broken`, see `error`.
        backbones: how many it lists or has in its catalogue.
        error, traceback: what went wrong; empty if nothing did.
        note: what is worth knowing and no error, such as why it is blocked.
        seconds: how long it took to read.
    """

    namespace: str
    distribution: str
    version: str
    module: str
    status: str
    backbones: int
    error: str
    traceback: str
    note: str = ""
    seconds: float = 0.0


# --- questions ----------------------------------------------------------------------------------------------


def list_backbones(pattern: str = "*", plugin: str | None = None) -> list[str]:
    """Names of the backbones that are installed, in natural order; imports no model.

    Args:
        pattern: shell-style, matched against the bare name and the canonical id. Catalogues too large to list,
            such as `timm/*`, are searched where the pattern has their namespace.
        plugin: only those of this namespace or distribution, its catalogue included; `dense-backbones` has too many.

    Returns:
        Bare names, and canonical ids (`namespace/name`) where the bare name means another backbone or several.

    Raises:
        PluginError: no such plugin is installed.
    """
    plugins = _plugins_of(plugin)
    names = [
        spec.name if _claims(spec.name, listed_only=True) == [(owner, spec)] else owner.canonical(spec)
        for owner in plugins
        for spec in owner.specs.values()
        if fnmatchcase(spec.name, pattern) or fnmatchcase(owner.canonical(spec), pattern)
    ]
    namespace = pattern.partition("/")[0] if "/" in pattern else ""
    for owner in plugins:
        # Our own distribution has many plugins: their catalogues are listed by namespace only.
        asked = fnmatchcase(owner.namespace, namespace)
        if plugin is not None:
            asked = plugin == owner.namespace or not owner.first_party
        if asked:
            found = (f"{owner.namespace}/{name}" for name in owner.catalogue() if name not in owner.specs)
            names += [name for name in found if fnmatchcase(name, pattern)]
    return sorted(names, key=lambda name: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", name)])


def backbone_info(name: str) -> BackboneInfo:
    """Everything that is known about a backbone without importing it, and which plugin provides it.

    Raises:
        UnknownBackbone: nothing has this name; the message has the nearest ones.
        AmbiguousBackbone: several third-party plugins have it.
    """
    plugin, spec = _resolve(name)
    return plugin.info(spec)


def resolve(name: str) -> BackboneSpec:
    """The spec that a name, an alias or a canonical id leads to: for a plugin that offers it under a name of its own.

    Raises:
        UnknownBackbone, AmbiguousBackbone: as `backbone_info`.
    """
    return _resolve(name)[1]


def plugins(plugin: str | None = None) -> list[PluginInfo]:
    """Every installed plugin, first-party first, and what is wrong with those that do not work.

    Args:
        plugin: only those of this namespace or distribution.

    Raises:
        PluginError: no such plugin is installed.
    """
    return [_plugin_info(each) for each in _plugins_of(plugin)]


def build_backbone(name: str, **options: Any) -> "Backbone":
    """Build a backbone by its bare name, an alias or its canonical id.

    Args:
        name: what `list_backbones` returns, or an alias.
        **options: those common to all backbones (`out_indices`, `pretrained`, `in_chans`, ..., see `Backbone`)
            and the architecture's own. `pretrained` is False, True (the first published weights), a tag, a path, or
            torchvision's word for weights, a member of its enum included, for which `weights` is another name;
            `pretrained_cfg`, what the model's is to say, such as {"mean": ..., "std": ...} of the weights at a path.
            None is the default of each option that all backbones have, as in timm.

    Returns:
        The model, in training mode, with its `spec` and its `canonical_name`.

    Raises:
        UnknownBackbone, AmbiguousBackbone: the name does not lead to one backbone.
        MissingDependency: the backbone needs a package that is not installed.
        InputError: the architecture has no such option, or cannot work with its value.
        PluginError: the plugin's entry cannot be imported, or is not what the spec says.
        WeightsError: the weights cannot be had, or do not fit.
        Exception: what the model's own constructor raises, with a note of the plugin it came from.
    """
    plugin, spec = _resolve(name)
    return build(plugin, spec, options, alias=name.rpartition("/")[2])


def refresh() -> None:
    """Forget what was read: the next question sees what was installed, or set in the environment, since."""
    global _read
    importlib.invalidate_caches()
    _read = None


def register(spec: BackboneSpec) -> str:
    """Add a backbone for this session, as `local/NAME`; a spec of the same name is replaced.

    In a notebook, `entry="__main__:MyBackbone"` names a class of the notebook itself.

    Returns:
        The canonical id.
    """
    _local.require_spec(spec, "register")
    _local.names = {name: s for name, s in _local.names.items() if s.name != spec.name}
    _local.add(spec)
    return _local.canonical(spec)


# --- names --------------------------------------------------------------------------------------------------


def _plugins() -> list[Plugin]:
    """The installed plugins, read if they have not been, and what `register` added."""
    global _read, _reading
    with _lock:
        if _read is None:
            if _reading:
                raise PluginError("a plugin asks for backbones while it is being read; do so behind a spec's entry")
            _reading = True
            try:
                _read = read_plugins()
            finally:
                _reading = False
        return [*_read, *([_local] if _local.specs else [])]


def _plugins_of(name: str | None) -> list[Plugin]:
    """Those of a namespace or a distribution; all for None."""
    found = _plugins()
    if name is None:
        return found
    chosen = [p for p in found if name == p.namespace or normalized(name) == normalized(p.distribution)]
    if not chosen:
        known = ", ".join(sorted({p.namespace for p in found}))
        raise PluginError(f"no plugin is called {name!r}; installed: {known}; see `backbones plugins`")
    return chosen


def _claims(name: str, listed_only: bool = False) -> list[tuple[Plugin, BackboneSpec]]:
    """Who has a backbone of this name: listed before found, then first-party first; peers share the claim."""
    namespace, _, bare = name.partition("/") if "/" in name else ("", "", name)
    plugins = [p for p in _plugins() if namespace in ("", p.namespace)]
    lookups: list[Callable[[Plugin], BackboneSpec | None]]
    lookups = [lambda p: p.names.get(bare), lambda p: p.find(bare, qualified=bool(namespace))]
    for lookup in lookups[:1] if listed_only else lookups:
        for first_party in (True, False):
            claims = [(p, spec) for p in plugins if p.first_party is first_party and (spec := lookup(p))]
            if claims:
                return claims
    return []


def _resolve(name: str) -> tuple[Plugin, BackboneSpec]:
    if not isinstance(name, str):
        raise InputError(f"the name of a backbone is a string, not {name!r}; `backbones list` shows them")
    claims = _claims(name)
    if not claims:
        raise _unknown(name)
    if len(claims) > 1:
        choice = " or ".join(f"{p.canonical(spec)!r} (from {p.distribution or 'this session'})" for p, spec in claims)
        raise AmbiguousBackbone(f"several plugins have a backbone {name!r}; use {choice}")
    return claims[0]


def _unknown(name: str) -> UnknownBackbone:
    """The error, with the nearest names and the plugins that failed and might have had it."""
    plugins = _plugins()
    names = {n: spec for p in plugins for n, spec in p.names.items()}
    namespace = name.partition("/")[0] if "/" in name else ""
    known = [*names, *(f"{p.namespace}/{n}" for p in plugins for n in p.names)]
    known += [f"{p.namespace}/{n}" for p in plugins if p.namespace == namespace for n in p.catalogue()]
    near = difflib.get_close_matches(name.lower(), known)
    message = f"there is no backbone {name!r}"
    model, _, tag = name.partition(".")
    claims = _claims(model) if tag else []
    if claims and tag in [row.tag for row in claims[0][1].weights]:  # timm writes both in one name
        message += f"; weights are an option of their own: build_backbone({model!r}, pretrained={tag!r})."
    else:
        message += f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    if namespace and namespace not in [p.namespace for p in plugins]:
        message += f" No plugin has the namespace {namespace!r}."
    failed = [p for p in plugins if p.errors and namespace in ("", p.namespace)]
    if failed:
        # What a loaded plugin's `find_backbone` raised is not seen again by another process: say it here.
        owners = ", ".join(f"{p} is {p.status}" + (f" ({describe(p.errors[-1])})" if p.hooks else "") for p in failed)
        message += f" A plugin that does not work might have it: {owners}; run `backbones plugins --errors`."
    blocked = [p for p in plugins if p.status == "blocked" and namespace in ("", p.namespace)]
    if blocked:
        message += f" Not asked: {', '.join(f'{p} is blocked ({p.notes[0]})' for p in blocked)}."
    return UnknownBackbone(message + " `backbones list` shows every name.")


def _plugin_info(plugin: Plugin) -> PluginInfo:
    count = len({*plugin.specs, *plugin.catalogue()})
    errors = list(plugin.errors)
    for spec in plugin.specs.values() if plugin is not _local else ():
        try:
            check_entry(spec)
        except PluginError as error:
            errors.append(error)
    return PluginInfo(
        namespace=plugin.namespace,
        distribution=plugin.distribution,
        version=plugin.version,
        module=plugin.module,
        status="broken" if errors and plugin.status == "ok" else plugin.status,
        backbones=count,
        error="\n".join(map(describe, errors)),
        traceback="\n".join("".join(traceback.format_exception(error)) for error in errors),
        note="; ".join(plugin.notes),
        seconds=round(plugin.seconds, 3),
    )
