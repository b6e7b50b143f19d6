"""A plugin whose `catalogue` raises; what it lists must keep working."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    return [BackboneSpec(name="shelved_net", family="Listed", entry="json:loads", channels=(8,), strides=(4,))]


@hookimpl
def catalogue():
    raise RuntimeError("no catalogue today")
