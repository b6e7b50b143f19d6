"""State that is saved, loaded and copied."""

import copy
import io
import pickle

import torch

from .common import Build, disturb, random_images, require


def check_state_dict(build: Build) -> None:
    """Saved and loaded into a fresh model, a state gives the same maps."""
    model = build()
    disturb(model)
    model.train()
    with torch.no_grad():
        model(random_images(model, 64, 64))  # statistics move
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    images = random_images(model, 64, 64)
    with torch.no_grad():
        for a, b in zip(model.eval()(images), other.eval()(images), strict=True):
            require(
                torch.equal(a, b),
                "a model with the loaded state gives other maps",
                "keep all that decides the maps in parameters and persistent buffers",
            )


def check_copies(build: Build) -> None:
    """Deep copies and pickles give the same maps."""
    model = build().eval()
    images = random_images(model, 50, 60)
    with torch.no_grad():
        maps = model(images)
        for how, other in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
            same = all(torch.equal(a, b) for a, b in zip(maps, other(images), strict=True))
            require(same, f"a {how} gives other maps", "keep nothing in the model that refers to the original")
