"""The numbers behind pictures: right by their definitions, and those that the picture shows."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.collections import PathCollection
from matplotlib.patches import Circle
from torch import nn

from backbones import build_backbone, wrap
from backbones.cli import main
from backbones_tasks.show.features import module_map
from backbones_tasks.show.grid import Grid
from backbones_tasks.show.photo import Photo, read_photo
from backbones_tasks.show.receptive_field import radius, receptive_fields
from backbones_tasks.show.shift import change, shifted_maps


class _Maps(nn.Module):
    """Two levels, at strides 4 and 8."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))
        self.second = nn.Conv2d(4, 6, 2, 2)

    def forward(self, images):
        fine = self.first(images)
        return [fine, self.second(fine)]


@pytest.fixture
def two_levels(subject_of, randomise):
    return subject_of(randomise(wrap(_Maps(), [4, 6], [4, 8])))


# --- by their definitions -----------------------------------------------------------------------------------


def test_receptive_radius_is_that_of_the_gradient_pixel_by_pixel(two_levels):
    """Against the whole Jacobian, and distances and shares by hand."""
    images = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    fields = receptive_fields(two_levels.model, [images], [0, 1], torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for level, (field, stride) in enumerate(zip(fields, (4, 8), strict=True)):
        row, column = 24 // stride // 2, 32 // stride // 2

        def cell(x, level=level, row=row, column=column):
            return two_levels.model(x)[level][0, :, row, column]

        direction = torch.randn((4, 6)[level], generator=generator)
        jacobian = torch.autograd.functional.jacobian(cell, images)[:, 0]  # (C, 3, H, W)
        expected = torch.einsum("c,cihw->ihw", direction, jacobian).square().sum(0).sqrt()
        torch.testing.assert_close(field, expected)
        middle = (row + 0.5) * stride, (column + 0.5) * stride
        places = [(y, x) for y in range(24) for x in range(32)]
        pixels = sorted((math.dist((y + 0.5, x + 0.5), middle), float(expected[y, x])) for y, x in places)
        total = sum(gradient for _, gradient in pixels)
        for share in (0.5, 0.9):
            held = np.cumsum([gradient for _, gradient in pixels])
            first = int(np.argmax(held >= share * total * (1 - 1e-6)))
            assert radius(field, stride, share) == pytest.approx(pixels[first][0])
            assert 0 < pixels[first][0] < 24


@pytest.mark.parametrize(("shift", "stride", "level"), [(4, 4, 0), (2, 4, 0), (3, 8, 1), (8, 8, 1)])
def test_shift_error_is_that_of_a_rolled_image(shift, stride, level, two_levels):
    """Away from the borders, a window that moves and an image that is rolled under it are one."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    maps = shifted_maps(two_levels, Photo(pixels), (64, 64), [0, shift])
    found = change(maps[0][level], maps[shift][level], shift / stride)

    rolled = np.roll(pixels, -shift, axis=1)
    before, after = (two_levels.maps(Photo(np.ascontiguousarray(p[:, :64])))[level].double() for p in (pixels, rolled))
    cells = 64 // stride
    margin = math.ceil(cells / 4)
    share = shift / stride
    differences, similarities, sizes, expected = [], [], [], {}
    for y in range(margin, cells - margin):
        for x in range(margin, cells - margin):
            right = before[:, y, x + math.ceil(share)] if share % 1 else before[:, y, x + int(share)]
            expected[y, x] = (1 - share % 1) * before[:, y, x + int(share)] + share % 1 * right
    mean = sum(expected.values()) / len(expected)
    for (y, x), values in expected.items():
        differences.append(float((after[:, y, x] - values).square().sum()))
        sizes.append(float((values - mean).square().sum()))
        similarities.append(float(F.cosine_similarity(after[:, y, x] - mean, values - mean, dim=0)))
    assert found.relative == pytest.approx(math.sqrt(sum(differences) / sum(sizes)), rel=1e-4, abs=1e-5)
    assert found.cosine == pytest.approx(np.mean(similarities), rel=1e-4)
    if shift % stride:
        assert found.relative > 0.1


@pytest.mark.parametrize(
    ("name", "options", "module", "side", "channels", "shape"),
    [
        ("vit_tiny_patch16", {"depth": 2}, "blocks.1", 16, 192, (1, 25, 192)),
        ("swin_tiny", {"out_indices": (0,)}, "stages.0.blocks.1", 4, 96, (1, 16, 24, 96)),
        ("mobilevit_xxs", {"out_indices": (1,)}, "stages.1.1.transformer.0", 8, 64, (4, 24, 64)),
        ("pvt_v2_b0", {"out_indices": (0,)}, "stages.0", 4, 32, (1, 32, 16, 24)),
    ],
)
def test_any_module_is_shown_as_a_map(name, options, module, side, channels, shape, photo, subject_of):
    subject = subject_of(build_backbone(name, **options), name)
    shown = read_photo(photo, (64, 96))
    held = []
    handle = subject.model.get_submodule(module).register_forward_hook(lambda *seen: held.append(seen[2]))
    grid, found, returned = module_map(subject, shown, module)
    handle.remove()
    assert grid == Grid(64 // side, 96 // side, (side, side))
    assert found.shape == (channels, 64 // side, 96 // side)
    assert tuple(returned) == shape
    values = held[0]
    expected = {
        "vit_tiny_patch16": lambda x: x[0, 1:].T.unflatten(1, (4, 6)),
        "swin_tiny": lambda x: x[0].permute(2, 0, 1),
        "mobilevit_xxs": lambda x: x.view(2, 2, 4, 6, 64).permute(4, 2, 0, 3, 1).flatten(3, 4).flatten(1, 2),
        "pvt_v2_b0": lambda x: x[0],
    }[name](values)
    assert torch.equal(found, expected)


# --- in the file and in the picture -------------------------------------------------------------------------


def texts(figure):
    return "\n".join(axis.get_title() for axis in figure.findobj(match=lambda x: hasattr(x, "get_title")))


def test_attention_shows_the_numbers_of_the_file(draw):
    picture = draw("attention vit_tiny_patch16 PHOTO --size 64 --option depth=2 --query 100 50 --json x.json")
    (numbers,) = picture.numbers
    shown = texts(picture.figure)
    axes = picture.figure.axes
    for axis, panel in zip(axes[1:], numbers["panels"], strict=False):
        assert axis.get_title() == "{title}\n{least:.3g} to {peak:.3g} x uniform".format(**panel)
        np.testing.assert_allclose(axis.images[-1].get_array(), panel["weights"])
        assert max(map(max, panel["weights"])) * 25 == pytest.approx(panel["peak"])
    assert "roll-out of all 2 layers" in shown
    dots = [dot for c in axes[len(numbers["panels"]) + 1].findobj(PathCollection) for dot in c.get_offsets().tolist()]
    assert dots == [[i, far] for i, layer in enumerate(numbers["layers"]) for far in layer["distance"]]
    assert len(dots) == 2 * 3


def test_receptive_field_shows_the_numbers_of_the_file(draw, two_levels):
    picture = draw("receptive-field model --size 64 --samples 2", two_levels)
    circles = [c.get_radius() for axis in picture.figure.axes for c in axis.findobj(Circle)]
    levels = picture.numbers[0]["levels"]
    assert [level["stride"] for level in levels] == [4, 8]
    assert circles == [r for level in levels for r in level["radius"].values()]
    for level in levels:
        assert f"50% in {level['radius']['0.5']:.0f} px, 90% in {level['radius']['0.9']:.0f} px" in texts(
            picture.figure
        )


def test_shift_shows_the_numbers_of_the_file(draw, two_levels):
    picture = draw("shift model PHOTO --size 64 --level 0", two_levels)
    _, relative, cosine, by_level, *_ = picture.figure.subfigs[0].axes
    fine, coarse = picture.numbers[0]["levels"]
    assert (fine["stride"], coarse["stride"]) == (4, 8)
    assert relative.lines[0].get_xydata().tolist() == [[c["shift"], c["relative"]] for c in fine["changes"]]
    assert cosine.lines[0].get_ydata().tolist() == [c["cosine"] for c in fine["changes"]]
    assert [c["shift"] for c in fine["changes"]] == [0, 1, 2, 3, 4]
    assert [c["shift"] for c in coarse["changes"]] == [0, 4, 8]
    half = [next(c for c in level["changes"] if c["shift"] * 2 == level["stride"]) for level in (fine, coarse)]
    assert by_level.lines[0].get_ydata().tolist() == [c["relative"] for c in half]


def test_pyramid_shows_the_numbers_of_the_file(draw, two_levels, photo):
    picture = draw("pyramid model PHOTO --size 64 96", two_levels)
    maps = two_levels.maps(read_photo(photo, (64, 96)))
    for level, found in zip(picture.numbers[0]["levels"], maps, strict=True):
        assert (level["channels"], level["height"], level["width"]) == tuple(found.shape)
        assert level["rms"] == pytest.approx(math.sqrt(np.mean(np.square(found.numpy()))), rel=1e-5)
        title = "stride {stride}: {height} x {width}, rms {rms:.3g}\n{channels} channels ({share_shown:.0%} shown)"
        assert title.format(**level) in texts(picture.figure)


def test_features_show_the_numbers_of_the_file(draw, two_levels, photo):
    picture = draw("features model PHOTO --size 64 96 --module module.first.0 --channels 2 0", two_levels)
    (numbers,) = picture.numbers
    assert (numbers["module"], numbers["shape"], numbers["stride"]) == ("module.first.0", [1, 4, 16, 24], [4, 4])
    for axis, channel in zip(picture.figure.axes[1:], numbers["shown"], strict=True):
        assert axis.get_title() == "{channel}: {low:.3g} to {high:.3g}".format(**channel)
        cells = np.asarray(axis.images[0].get_array())
        assert axis.images[0].get_clim() == (channel["low"], channel["high"])
        assert channel["mean"] == pytest.approx(cells.mean(), rel=1e-5, abs=1e-6)
        assert (channel["low"], channel["high"]) == pytest.approx(np.quantile(cells, (0.01, 0.99)), rel=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "swin_tiny"])
def test_positions_are_those_of_the_file(name, draw):
    (numbers,) = draw(f"positions {name} --option out_indices=[0]").numbers
    if name == "swin_tiny":
        heads = numbers["bias_by_offset"]["stages.0.blocks.1.attn"]
        assert np.shape(heads) == (3, 13, 13)
    else:
        assert np.shape(numbers["cosine_similarity"]) == (196, 196)
        np.testing.assert_allclose(np.diag(numbers["cosine_similarity"]), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        "pyramid mobilevit_xxs PHOTO --size 64 --overlay --grid",
        "features mobilevit_xxs PHOTO --size 64 --overlay 0.3 --grid --module stages.0",
        "attention mobilevit_xxs PHOTO --size 64 --head 0",
        "receptive-field mobilevit_xxs PHOTO --size 64 --samples 1 --level 0 --overlay --grid",
        "positions vit_tiny_patch16 --option depth=1",
        "shift mobilevit_xxs PHOTO --size 64 --level 0",
    ],
)
def test_every_kind_writes_its_numbers(line, photo, tmp_path, capsys):
    words = [str(photo) if word == "PHOTO" else word for word in line.split()]
    out, file = tmp_path / "picture.png", tmp_path / "numbers.json"
    assert main(["show", *words, "--out", str(out), "--json", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out), str(file)]
    numbers = json.loads(file.read_text())
    assert numbers["kind"] == words[0]
    assert numbers["images"] == ([str(photo)] if str(photo) in words else [])
    (backbone,) = numbers["backbones"]
    assert (backbone["name"], backbone["weights"]) == (words[1], "random weights (seed 0)")
    assert len(backbone) > 2


def test_a_folder_is_never_replaced_by_numbers(photo, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    line = ["pyramid", "mobilevit_xxs", str(photo), "--size", "64", "--out", str(tmp_path / "x.png")]
    assert main(["show", *line, "--json", str(tmp_path / "mine")]) == 2
    assert "that is a folder" in capsys.readouterr().err
    assert (tmp_path / "mine" / "precious").exists()


def test_overlays_let_the_photograph_through(draw):
    figure = draw("pyramid mobilevit_xxs PHOTO --size 64 --overlay 0.25").figure
    for axis in figure.axes[1:]:
        under, over = axis.images
        assert under.get_array().shape[:2] == (64, 96)
        assert over.get_alpha() == 0.25
    assert all(len(axis.images) == 1 for axis in draw("pyramid mobilevit_xxs PHOTO --size 64").figure.axes)


@pytest.mark.parametrize("alpha", ["2", "-0.1", "PHOTO"])
def test_alpha_is_from_0_to_1(alpha, photo, capsys):
    with pytest.raises(SystemExit):
        main(["show", "pyramid", "mobilevit_xxs", "--overlay", str(photo) if alpha == "PHOTO" else alpha])
    assert "is no number from 0 to 1" in capsys.readouterr().err
