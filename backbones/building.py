"""From a spec to a model: requirements, entry, options, and whether the result is what the spec says."""

import copy
import difflib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, isclass, signature
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .arguments import without_none
from .discovery import Failure, Plugin, describe
from .errors import InputError, MissingDependency, PluginError
from .locks import importing
from .plain import json_values
from .specs import BackboneSpec, Weights

if TYPE_CHECKING:
    from .backbone import Backbone

# Options that change neither the channels nor the strides of a map, so that what the spec says must hold.
_COMMON = {
    "attn_drop_rate",
    "checkpointing",
    "drop_path_rate",
    "frozen_stages",
    "img_size",
    "in_chans",
    "norm_eval",
    "out_indices",
    "out_norm",
    "pos_drop_rate",
    "proj_drop_rate",
}


def build(plugin: Plugin, spec: BackboneSpec, options: Mapping[str, Any], alias: str = "") -> "Backbone":
    """The model of a spec, asked for under an alias of its weights, perhaps; errors are those of `build_backbone`."""
    _require_dependencies(plugin, spec)
    options = without_none(options)
    told = options.pop("pretrained_cfg", None) or {}
    if not isinstance(told, Mapping):
        raise InputError(f"pretrained_cfg={told!r}: give a dict of what the model's is to say, such as mean and std")
    with importing:
        make = _import_entry(plugin, spec)
        from .weights import describe, find_weights, load_pretrained

        own = "weights" in _options(make)  # an option of the architecture, and not torchvision's word for pretrained
        weights = find_weights(spec, _asked_weights(plugin.canonical(spec), options, own))
        row = weights if weights is not None else next((row for row in spec.weights if alias in row.aliases), None)
        implied = _implied(row, options) if isinstance(row, Weights) else {}
        options = implied | options
        recorded = json_values(options)  # before a constructor has used up an iterator
        model = _construct(plugin, spec, make, options)
    _check_model(plugin, spec, model, options)
    model.spec = plugin.info(spec)
    model.canonical_name = model.spec.canonical_name
    model.weight_options = model.weight_options if own else (*model.weight_options, "weights")
    kept = options.keys() - model.weight_options
    model.build_options = {name: value for name, value in recorded.items() if name in kept}
    model.unsaved_options = sorted(kept - recorded.keys())
    model.implied_options = implied
    model.pretrained_cfg["architecture"] = spec.name
    if weights is None:
        describe(model, spec)
    else:
        load_pretrained(model, spec, weights)
    _tell(model.pretrained_cfg, told)
    return model


def _tell(cfg: dict[str, Any], told: Mapping[str, Any]) -> None:
    """Say in a model's `pretrained_cfg` what the user does; what a saved model's says, and nothing beside it."""
    from .weights import PREPROCESSING

    own = {key: cfg[key] for key in ("architecture", "num_classes")}  # these say what has just been built
    stale: Iterable[str] = PREPROCESSING if "architecture" in told else ()
    if told.keys() & {"crop_mode", "crop_pct", "input_size", "interpolation"}:
        stale = (*stale, "enum")  # torchvision's own preset has these in it
    for key in stale:
        cfg.pop(key, None)
    cfg.update({key: tuple(value) if isinstance(value, list) else value for key, value in told.items()})
    cfg.update(own)


def _asked_weights(name: str, options: dict[str, Any], own: bool) -> Any:
    """What `pretrained` says, or `weights` unless that is the architecture's `own`; taken out of the options."""
    asked = options.pop("pretrained", None)
    weights = None if own else options.pop("weights", None)
    if weights is not None and asked:
        raise InputError(
            f"backbone {name!r}: pretrained={asked!r} and weights={weights!r} both say which weights to load; give one"
        )
    return asked if weights is None else weights


def _implied(row: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is built with for published weights where the user does not say."""
    implied = dict(row.options)
    if options.get("features_only") is False and row.classes is not None:
        implied["num_classes"] = row.classes
    return {name: value for name, value in implied.items() if name not in options}


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
    valid = _options(make) | {"pretrained", "pretrained_cfg", "weights"}
    near = difflib.get_close_matches(option, valid, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(valid))}"
    return f"backbone {canonical_name!r} has no option {option!r}; {remedy}"


def _options(make: Callable[..., Any]) -> set[str]:
    """Keyword arguments of a function, or of a class and the bases it hands the rest of its keywords to."""
    callables = [vars(c)["__init__"] for c in make.__mro__ if "__init__" in vars(c)] if isclass(make) else [make]
    names = set()
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
