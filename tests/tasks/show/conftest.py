"""What tests of pictures share: a photograph, and pictures of it."""

from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from backbones_tasks.show import KINDS, build_parser
from backbones_tasks.show.subject import Subject, build_subjects


@pytest.fixture
def photo(tmp_path):
    """Smooth enough to be recognised, wide, and with nothing that repeats."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (12, 18, 3), dtype=np.uint8)).resize((240, 160), Image.BICUBIC)
    path = tmp_path / "photo.png"
    pixels.save(path)
    return path


@pytest.fixture(scope="session")
def subject_of():
    def build(model, name="model"):
        return Subject(name, model.eval().requires_grad_(False), "random weights")

    return build


@pytest.fixture
def draw(photo):
    """The picture that `backbones show` saves, of backbones by name or of one that is given."""

    def picture(line, subject=None):
        words = [str(photo) if word == "PHOTO" else word for word in line.split()]
        args = build_parser(words[0]).parse_args(words)
        kind = import_module(f"backbones_tasks.show.{KINDS[words[0]][0]}")
        return kind.draw([subject] if subject else build_subjects(args), kind.photos(args), args)

    return picture
