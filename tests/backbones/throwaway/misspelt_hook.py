"""A plugin with a misspelt hook beside the right one."""

from backbones import hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    return []


@hookimpl
def find_backbones(name):
    return None
