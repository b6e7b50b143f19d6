"""A plugin that forgets the mark on its hook, which does no harm."""

from backbones import BackboneSpec

BACKBONES_API = 1


def register_backbones():
    return [
        BackboneSpec(name="unmarked_net", family="net", entry="throwaway_unmarked:net", channels=(8,), strides=(4,))
    ]


def net():
    raise NotImplementedError
