"""A plugin whose `find_backbone` raises; what it lists must keep working."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    return [BackboneSpec(name="listed_net", family="Listed", entry="json:loads", channels=(8,), strides=(4,))]


@hookimpl
def find_backbone(name):
    raise RuntimeError("this catalogue is closed")
