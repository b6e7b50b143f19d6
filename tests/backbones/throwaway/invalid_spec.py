"""A plugin whose spec has a stride too few."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    return [BackboneSpec(name="short", family="Short", entry="a:b", channels=(8, 16), strides=(4,))]
