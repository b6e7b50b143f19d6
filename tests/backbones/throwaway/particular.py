"""A plugin whose backbones are found by their full names alone, and which says what is wrong with others."""

from backbones import BackboneSpec, UnknownBackbone, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    return []


@hookimpl
def find_backbone(name, qualified):
    if not qualified:
        return None
    if name != "owner/net":
        raise UnknownBackbone(f"the owner has no {name}")
    return BackboneSpec(name=name, family="Particular", entry="json:loads", channels=(8,), strides=(4,))
