"""Errors that name the object, what is wrong with it and what to do about it."""


class BackboneError(Exception):
    """Base of every error that this library raises on purpose."""


class UnknownBackbone(BackboneError, LookupError):
    """No plugin has a backbone of this name."""


class AmbiguousBackbone(BackboneError, LookupError):
    """Several third-party plugins claim this bare name; the canonical `namespace/name` decides."""


class InvalidSpec(BackboneError, ValueError):
    """A `BackboneSpec` contradicts itself."""


class MissingDependency(BackboneError, ImportError):
    """A backbone needs a package that is not installed."""


class PluginError(BackboneError):
    """A plugin could not be loaded, or broke its side of the contract."""


class IncompatiblePlugin(PluginError):
    """A plugin states no `BACKBONES_API`, or one that this version does not speak."""


class WeightsError(BackboneError):
    """A checkpoint cannot be found, read, or made to fit."""


class InputError(BackboneError, ValueError):
    """An option or an image that no backbone can work with."""
