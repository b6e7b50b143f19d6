"""Find and load the installed plugins; whatever goes wrong in one is kept with it and harms no other."""

import inspect
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .errors import IncompatiblePlugin, PluginError, UnknownBackbone
from .guard import guarded
from .specs import BackboneInfo, BackboneSpec, is_name

GROUP = "backbones"
APIS = (1,)  # values of BACKBONES_API that this version understands
FIRST_PARTY = "dense-backbones"
HOOKS = ("register_backbones", "catalogue", "find_backbone")
LOCAL = "local"  # namespace of what is registered by hand

# A plugin that calls sys.exit() must not end the program either.
Failure = (Exception, SystemExit)

# A name that no catalogue has: who finds it answers anything.
_NOBODYS = "no_backbone_has_this_name_0"


@dataclass(kw_only=True, eq=False)
class Plugin:
    """A plugin as installed, and what came of loading it."""

    namespace: str
    distribution: str = ""
    version: str = ""
    module: str = ""
    status: str = "ok"
    errors: list[BaseException] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is worth knowing and no error
    seconds: float = 0.0  # that reading it took
    specs: dict[str, BackboneSpec] = field(default_factory=dict)
    names: dict[str, BackboneSpec] = field(default_factory=dict)  # aliases included
    hooks: Any = None  # pluggy's callers, once loaded

    def __str__(self) -> str:
        return f"plugin {self.namespace!r} ({self.distribution} {self.version})".replace(" ( )", "")

    @cached_property
    def first_party(self) -> bool:
        return normalized(self.distribution) == FIRST_PARTY

    def canonical(self, spec: BackboneSpec) -> str:
        return f"{self.namespace}/{spec.name}"

    def info(self, spec: BackboneSpec) -> BackboneInfo:
        return BackboneInfo(
            **{f.name: getattr(spec, f.name) for f in fields(BackboneSpec)},
            canonical_name=self.canonical(spec),
            plugin=self.namespace,
            distribution=self.distribution,
            version=self.version,
        )

    def add(self, spec: BackboneSpec) -> None:
        self.specs[spec.name] = spec
        self.names |= {alias: spec.under(alias) for alias in spec.aliases} | {spec.name: spec}

    def find(self, name: str, qualified: bool) -> BackboneSpec | None:
        """What the plugin's `find_backbone` returns for a name that it need not list."""
        if self.hooks is None or (not qualified and self.finds_anything):
            return None
        try:
            answers = self.hooks.find_backbone(name=name, qualified=qualified)
            for spec in answers:
                self.require_spec(spec, "find_backbone")
        except UnknownBackbone:  # it is this plugin's to know, and it says why it does not
            raise
        except Failure as error:
            self.fail(error)
            return None
        return answers[0] if answers else None

    @cached_property
    def finds_anything(self) -> bool:
        """Whether `find_backbone` answers names that are nobody's; its answers count under its own namespace alone."""
        if self.first_party or self.hooks is None:
            return False
        with suppress(Exception):
            if self.hooks.find_backbone(name=_NOBODYS, qualified=False):
                self.notes.append(
                    f"its find_backbone answers any name, so that it is asked for {self.namespace}/NAME alone; return "
                    "None for what is not in the catalogue"
                )
                return True
        return False

    def catalogue(self) -> list[str]:
        """Bare names that the plugin finds when asked, beside those that it lists."""
        if self.hooks is None:
            return []
        try:
            return [name for names in self.hooks.catalogue() for name in names]
        except Failure as error:
            self.fail(error)
            return []

    def require_spec(self, spec: object, source: str) -> None:
        if not isinstance(spec, BackboneSpec):
            raise PluginError(f"{self}: {source} gave {spec!r}; give a BackboneSpec")

    def fail(self, error: BaseException) -> None:
        """Keep what went wrong; with BACKBONES_STRICT=1, raise it."""
        self.status = "incompatible" if isinstance(error, IncompatiblePlugin) else "broken"
        self.errors.append(error)
        if os.environ.get("BACKBONES_STRICT", "0") in ("", "0"):
            return
        if isinstance(error, PluginError):
            raise error
        raise PluginError(f"{self} failed: {describe(error)}") from error


def read_plugins() -> list[Plugin]:
    """Every installed plugin, first-party first, then by namespace."""
    plugins: list[Plugin] = []
    for entry_point, distribution, version in _entry_points():
        plugin = Plugin(
            namespace=entry_point.name, distribution=distribution, version=version, module=entry_point.value
        )
        reason = _blocked(plugin)
        if reason:
            plugin.status = "blocked"
            plugin.notes.append(f"not loaded: {reason}")
        else:
            _read(plugin, entry_point, plugins)
        plugins.append(plugin)
    return plugins


def _read(plugin: Plugin, entry_point: EntryPoint, others: list[Plugin]) -> None:
    """Load a plugin and take its specs; what goes wrong is kept with it."""
    began = time.perf_counter()
    changed: list[str] = []
    try:
        _check_namespace(plugin, others)
        with guarded() as changed:
            _load(plugin, entry_point)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin's own may be of any kind
        plugin.fail(error)
    plugin.seconds = time.perf_counter() - began
    if changed:
        plugin.notes.append(f"importing it changed {' and '.join(changed)} for the whole program; that was put back")


def _entry_points() -> list[tuple[EntryPoint, str, str]]:
    """One entry point per plugin, however often its metadata is on the path, with its distribution and version."""
    unique = {}
    for entry_point in entry_points(group=GROUP):
        distribution, version = owner(entry_point)
        key = (normalized(distribution) != FIRST_PARTY, entry_point.name, normalized(distribution), entry_point.value)
        unique[key] = (entry_point, distribution, version)
    return [unique[key] for key in sorted(unique)]


def _blocked(plugin: Plugin) -> str:
    """Why the environment keeps a plugin from being loaded; empty if it does not."""
    allowed = os.environ.get("BACKBONES_LOAD_PLUGINS")
    blocked = _split(os.environ.get("BACKBONES_BLOCK_PLUGINS", ""))
    distribution = normalized(plugin.distribution)
    if blocked & {distribution, normalized(plugin.namespace)}:
        return "BACKBONES_BLOCK_PLUGINS names it"
    if allowed is None or plugin.first_party or distribution in _split(allowed):
        return ""
    return f"BACKBONES_LOAD_PLUGINS does not name {plugin.distribution}"


def _check_namespace(plugin: Plugin, others: list[Plugin]) -> None:
    if not is_name(plugin.namespace) or plugin.namespace == LOCAL:
        raise PluginError(f"{plugin}: this namespace cannot be used; rename its entry point")
    for other in others:
        if other.namespace == plugin.namespace and other.status != "blocked":
            raise PluginError(f"{plugin}: {other} has this namespace already; uninstall one, or rename its entry point")


def _load(plugin: Plugin, entry_point: EntryPoint) -> None:
    module = entry_point.load()
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):  # a namespace package
        raise PluginError(
            f"{plugin}: {', '.join(module.__path__)} was imported instead of the module {plugin.module!r} that is "
            "installed, because Python looks there first; start it from another folder, or rename that one"
        )
    api = getattr(module, "BACKBONES_API", None)
    if api is None:
        raise IncompatiblePlugin(f"{plugin} states no API version; write `BACKBONES_API = 1` in {plugin.module}")
    if api not in APIS:
        raise IncompatiblePlugin(
            f"{plugin} is made for plugin API {api!r}, and this version of dense-backbones has {APIS[-1]}; "
            f"run `pip install --upgrade dense-backbones {plugin.distribution}`"
        )
    # A manager of its own for each plugin: an unknown hook or an exception concerns nobody else.
    manager = _Manager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module, name=plugin.namespace)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{plugin}: {error}; the hooks are {', '.join(HOOKS)}") from error
    answers = manager.hook.register_backbones()
    if not answers:
        raise PluginError(
            f"{plugin}: {plugin.module} has no hook register_backbones that returns specs; "
            "define register_backbones(), and mark it with @backbones.hookimpl so that a misspelt name is reported"
        )
    plugin.hooks = manager.hook
    specs = iter(answers[0])
    while True:
        try:
            spec = next(specs)
        except StopIteration:
            return
        except Failure as error:  # of a generator; what it has given is right all the same
            plugin.fail(error)
            return
        try:
            plugin.require_spec(spec, "register_backbones")
            taken = plugin.names.keys() & {spec.name, *spec.aliases}
            if taken:
                raise PluginError(f"{plugin}: two of its specs have the name {min(taken)!r}; rename one")
        except PluginError as error:
            plugin.fail(error)
        else:
            plugin.add(spec)


def owner(entry_point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution; `unknown` where an interrupted uninstall has left half of it."""
    return _name_and_version(entry_point.dist)


@lru_cache
def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    """Kept, because one distribution has many plugins, and `.metadata` is parsed anew whenever it is asked for."""
    try:
        metadata = distribution.metadata
        return metadata["Name"] or "unknown", metadata["Version"] or "unknown"
    except Exception:  # what is raised for missing metadata differs between versions of Python
        return "unknown", "unknown"


class _Manager(pluggy.PluginManager):
    """Takes a function that has a hook's name for that hook, marked or not."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        marked = super().parse_hookimpl_opts(plugin, name)
        is_hook = name in HOOKS and inspect.isfunction(getattr(plugin, name))
        return {} if marked is None and is_hook else marked


def normalized(name: str) -> str:
    """A distribution's name as packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _split(names: str) -> set[str]:
    return {normalized(name) for name in re.split(r"[,;\s]+", names) if name}
