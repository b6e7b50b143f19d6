"""efficientformer, as a plugin."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """None yet."""
    return []
