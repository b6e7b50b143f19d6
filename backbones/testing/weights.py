"""State that is saved, loaded and copied."""

import copy
import io
import pickle
from collections.abc import Callable

import torch

from ..backbone import Backbone
from .common import Build, called_in_eval, disturb, fail, random_images, require, some


def check_state_dict(build: Build) -> None:
    """Saved and loaded into a fresh model, a state gives the same maps."""
    model, other = build(), build()
    disturb(model)
    model.train()
    before = model.state_dict().keys()
    with torch.no_grad():
        model(random_images(model, 64, 64))  # statistics move
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    require(
        state.keys() == before,
        f"the first call changes the keys of the state: {some(state.keys() ^ before)}",
        "build every parameter and buffer in the constructor, and keep none of a call",
    )
    names = {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    try:
        other.load_state_dict(state)
    except RuntimeError as error:
        renamed = sorted(state.keys() - names)
        fail(
            "a fresh model does not take the state that another has saved"
            + (f", whose keys {some(renamed)} are no names of its parameters and buffers" if renamed else "")
            + f": {error}",
            "leave names in state_dict() as they are; names of published checkpoints belong into key_layouts",
        )
    images = random_images(model, 64, 64)
    with torch.no_grad():
        for i, (a, b) in enumerate(zip(model.eval()(images), other.eval()(images), strict=True)):
            require(
                torch.equal(a, b),
                f"a model with the loaded state gives another map {i}",
                "keep all that decides the maps in parameters and persistent buffers",
            )


def check_copies(build: Build) -> None:
    """Deep copies and pickles give the same maps."""
    model, images, maps = called_in_eval(build, 50, 60)
    ways: dict[str, Callable[[Backbone], Backbone]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    }
    for how, make in ways.items():
        try:
            other = make(model)
        except Exception as error:  # of whatever cannot be copied
            fail(
                f"a {how} raises {type(error).__name__}: {error}",
                "keep no lambda, local function, open file, lock or tensor with a history in the model",
            )
        with torch.no_grad():
            disturb(model)
            same = all(torch.equal(a, b) for a, b in zip(maps, other(images), strict=True))
        require(same, f"a {how} gives other maps", "keep nothing in the model that refers to the original")
        model.load_state_dict(other.state_dict())
