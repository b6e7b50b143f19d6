"""A plugin whose hook takes an argument that the hook does not have."""

from backbones import hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones(registry):
    return []
