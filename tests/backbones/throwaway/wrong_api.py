"""A plugin from the future."""

from backbones import hookimpl

BACKBONES_API = 99


@hookimpl
def register_backbones():
    return []
