"""A plugin that does not say which API it is made for."""

from backbones import hookimpl


@hookimpl
def register_backbones():
    return []
