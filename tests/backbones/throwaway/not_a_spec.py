"""A plugin that returns names instead of specs."""

from backbones import hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    return ["resnet50"]
