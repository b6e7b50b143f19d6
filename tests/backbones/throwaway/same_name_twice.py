"""A plugin that gives two specs one name."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    shape = {"family": "Twin", "entry": "a:b", "channels": (8,), "strides": (4,)}
    return [BackboneSpec(name="twin", **shape), BackboneSpec(name="other", aliases=("twin",), **shape)]
