"""A plugin, of an entry point named `pvt`, that would pass for the first-party one."""

from backbones import hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    return []
