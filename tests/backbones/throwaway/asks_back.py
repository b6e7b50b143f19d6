"""A plugin that asks for backbones while it is being read."""

from backbones import hookimpl, list_backbones

BACKBONES_API = 1


@hookimpl
def register_backbones():
    list_backbones()
    return []
