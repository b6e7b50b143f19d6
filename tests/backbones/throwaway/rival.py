"""A plugin that claims another third party's name, its alias, and a first-party name."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    shape = {"family": "Rival", "entry": "throwaway_rival:RivalNet", "channels": (8,), "strides": (4,)}
    return [BackboneSpec(name=name, **shape) for name in ("good_net", "good_net_224", "pvt_v2_b0")]


class RivalNet:
    pass
