"""The hooks of a plugin. Its top module also states `BACKBONES_API = 1` and imports no torch."""

from collections.abc import Iterable

import pluggy

from .specs import BackboneSpec

hookspec = pluggy.HookspecMarker("backbones")
hookimpl = pluggy.HookimplMarker("backbones")


@hookspec
def register_backbones() -> Iterable[BackboneSpec]:  # type: ignore[empty-body]
    """Return a spec for every backbone of the plugin; called once, when backbones are first asked for."""


@hookspec
def catalogue() -> Iterable[str]:  # type: ignore[empty-body]
    """Return the bare names that `find_backbone` knows, for `backbones list "NAMESPACE/*"`."""


@hookspec
def find_backbone(name: str, qualified: bool) -> BackboneSpec | None:
    """Return a spec for a bare name that no plugin lists, or None; for catalogues too large to list.

    `qualified` tells whether the user wrote the plugin's namespace before it; leave it out if that is no matter. Where
    it is true, raise `UnknownBackbone` to say why there is no such backbone.
    """
