"""A plugin whose hook raises after its first spec."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    yield BackboneSpec(name="half_listed", family="Half", entry="a:b", channels=(8,), strides=(4,))
    raise RuntimeError("this hook raises")
