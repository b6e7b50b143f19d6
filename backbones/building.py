"""From a spec to a model: requirements, entry, options, and whether the result is what the spec says."""

import copy
import difflib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, isclass, signature
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .discovery import Failure, Plugin, describe
from .errors import InputError, MissingDependency, PluginError
from .locks import importing
from .plain import json_values
from .specs import BackboneSpec

if TYPE_CHECKING:
    from .backbone import Backbone

# Options that change neither the channels nor the strides of a map, so that what the spec says must hold.
_COMMON = {
    "checkpointing",
    "drop_path_rate",
    "frozen_stages",
    "in_chans",
    "norm_eval",
    "out_indices",
    "out_norm",
}


def build(plugin: Plugin, spec: BackboneSpec, options: Mapping[str, Any]) -> "Backbone":
    """The model of a spec; errors are those of `build_backbone`."""
    _require_dependencies(plugin, spec)
    options = dict(options)
    pretrained = options.pop("pretrained", False)
    told = options.pop("pretrained_cfg", None) or {}
    if not isinstance(told, Mapping):
        raise InputError(f"pretrained_cfg={told!r}: give a dict of what the model's is to say, such as mean and std")
    recorded = json_values(options)  # before a constructor has used up an iterator
    with importing:
        make = _import_entry(plugin, spec)
        model = _construct(plugin, spec, make, options)
    _check_model(plugin, spec, model, options)
    model.spec = plugin.info(spec)
    model.canonical_name = model.spec.canonical_name
    kept = options.keys() - model.weight_options
    model.build_options = {name: value for name, value in recorded.items() if name in kept}
    model.unsaved_options = sorted(kept - recorded.keys())
    model.pretrained_cfg["architecture"] = spec.name
    if pretrained is not False and pretrained is not None:
        from .weights import load_pretrained

        load_pretrained(model, spec, pretrained)
    for key, value in told.items():
        if key not in ("architecture", "num_classes"):  # these say what has just been built
            model.pretrained_cfg[key] = tuple(value) if isinstance(value, list) else value
    return model


def check_entry(spec: BackboneSpec) -> None:
    """Raise PluginError if an entry leads nowhere, as far as its source tells without being imported."""
    module, _, attribute = spec.entry.partition(":")
    found = _find_module(module)
    if found is None:
        raise PluginError(f"entry {spec.entry!r} of backbone {spec.name!r}: there is no module {module!r}")
    try:
        source = found.loader.get_source(module)  # type: ignore[union-attr]
    except Exception:  # an extension module, for one, has no source to look at
        return
    name = attribute.partition(".")[0]
    if not re.search(rf"\b{name}\b|\bimport \*|\bdef __getattr__\b", source or name):
        raise PluginError(f"entry {spec.entry!r} of backbone {spec.name!r}: module {module!r} has no {name!r}")


def _find_module(module: str) -> ModuleSpec | None:
    """What `importlib.util.find_spec` finds, without importing the parents, which may import torch."""
    spec: ModuleSpec | None = None
    name = ""
    for part in module.split("."):
        if spec is not None and spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}".lstrip(".")
        if name in sys.modules:
            spec = sys.modules[name].__spec__
        elif spec is None:
            spec = importlib.util.find_spec(name)
        else:
            spec = PathFinder.find_spec(name, spec.submodule_search_locations)
        if spec is None:
            return None
    return spec


def _require_dependencies(plugin: Plugin, spec: BackboneSpec) -> None:
    missing = [requirement for requirement in spec.requires if not _is_installed(requirement)]
    if missing:
        raise MissingDependency(
            f"backbone {plugin.canonical(spec)!r} of {plugin} needs {', '.join(missing)}; "
            f"run `pip install {shlex.join(missing)}`"
        )


def _is_installed(requirement: str) -> bool:
    from packaging.requirements import Requirement  # few specs have any

    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return True
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _import_entry(plugin: Plugin, spec: BackboneSpec) -> Callable[..., Any]:
    module, _, attribute = spec.entry.partition(":")
    owner = f"entry {spec.entry!r} of backbone {plugin.canonical(spec)!r}, {plugin}"
    remedy = f"run `pip install --upgrade {plugin.distribution}`" if plugin.distribution else "correct the spec"
    try:
        make = attrgetter(attribute)(importlib.import_module(module))
    except Failure as error:
        raise PluginError(f"{owner}, cannot be imported: {describe(error)}; {remedy}") from error
    if not callable(make):
        raise PluginError(f"{owner}, is no class or function: {make!r}; {remedy}")
    return make


def _construct(plugin: Plugin, spec: BackboneSpec, make: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        # Copied, because a constructor may change the lists and dicts that it is given.
        return make(**(copy.deepcopy(dict(spec.defaults)) | options))
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument(?:\(s\):)? \[?'(\w+)'", str(error))
        if isinstance(error, TypeError) and unknown and unknown[1] in options:
            raise InputError(_no_such_option(plugin.canonical(spec), unknown[1], make)) from error
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"while building backbone {plugin.canonical(spec)!r} of {plugin}, {spec.entry}")
        raise


def _no_such_option(canonical_name: str, option: str, make: Callable[..., Any]) -> str:
    valid = _options(make)
    near = difflib.get_close_matches(option, valid, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(valid))}"
    return f"backbone {canonical_name!r} has no option {option!r}; {remedy}"


def _options(make: Callable[..., Any]) -> set[str]:
    """Keyword arguments of a function, or of a class and the bases it hands the rest of its keywords to."""
    callables = [vars(c)["__init__"] for c in make.__mro__ if "__init__" in vars(c)] if isclass(make) else [make]
    names = {"pretrained", "pretrained_cfg"}
    for each in callables:
        parameters = signature(each).parameters.values()
        names |= {p.name for p in parameters if p.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def _check_model(plugin: Plugin, spec: BackboneSpec, model: object, options: Mapping[str, Any]) -> None:
    from .backbone import Backbone

    owner = f"backbone {plugin.canonical(spec)!r} of {plugin}"
    if not isinstance(model, Backbone):
        raise PluginError(
            f"{owner}: {spec.entry} returned a {type(model).__name__}; "
            "subclass backbones.Backbone, or put the module through backbones.wrap"
        )
    if not options.keys() <= _COMMON:
        return
    levels = list(zip(spec.channels, spec.strides, strict=True))
    declared = [levels[i] for i in model.out_indices if i < len(levels)]
    built = list(zip(model.out_channels, model.strides, strict=True))
    if declared != built:
        raise PluginError(
            f"{owner}: its spec declares (channels, stride) {declared} for out_indices={model.out_indices}, "
            f"and the model has {built}; make them agree"
        )
