"""A plugin with entries to a module that does not exist, to a class that does not, and to one that does."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1


@hookimpl
def register_backbones():
    shape = {"family": "Nowhere", "channels": (8, 16), "strides": (4, 8)}
    return [
        BackboneSpec(name="no_module", entry="throwaway_leads_nowhere.missing:Net", **shape),
        BackboneSpec(name="no_class", entry="throwaway_leads_nowhere_model:MissingNet", **shape),
        BackboneSpec(name="some_class", entry="throwaway_leads_nowhere_model:PresentNet", **shape),
    ]
