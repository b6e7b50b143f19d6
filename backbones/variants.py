"""Siblings of a model, built without memory for the sake of their names and shapes."""

import copy
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["siblings"]


def siblings(model: "Backbone", *changes: dict[str, Any]) -> Iterator["Backbone"]:
    """The same backbone with options changed, on the meta device; those that cannot be built so are left out.

    Args:
        model: from `build_backbone`; there is none of another.
        *changes: options of one sibling each.
    """
    spec = getattr(model, "spec", None)
    if spec is None or model.unsaved_options:
        return
    module, _, attribute = spec.entry.partition(":")
    make = attrgetter(attribute)(import_module(module))
    for change in changes:
        # Whatever a constructor raises: what is asked is which names there would be, and then there are none.
        with suppress(Exception), torch.device("meta"):
            yield make(**{**copy.deepcopy(dict(spec.defaults)), **model.build_options, **change})
