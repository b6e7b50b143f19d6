"""`backbones show`: what the pictures tell is true, and each is drawn."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from backbones import Backbone, backbone_info, build_backbone, wrap
from backbones.cli import main
from backbones.errors import InputError
from backbones_tasks.show import build_parser
from backbones_tasks.show.panels import ChannelColours, tile
from backbones_tasks.show.photo import Photo, read_photo
from backbones_tasks.show.positions import position_tables, relative_biases, similarities
from backbones_tasks.show.receptive_field import radius, receptive_fields
from backbones_tasks.show.shift import change, shifted_maps
from backbones_tasks.show.subject import build_subjects

# --- images -------------------------------------------------------------------------------------------------


def test_photos_are_turned_upright_and_points_of_the_file_are_found(tmp_path):
    pixels = np.zeros((30, 60, 3), dtype=np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: the left becomes the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    whole = read_photo(tmp_path / "turned.png", (60,))
    assert whole.size == (120, 60)
    assert whole.pixels[:30].mean() > 250
    assert whole.pixels[50:].mean() < 5
    cut = read_photo(tmp_path / "turned.png", (60, 60))
    assert cut.size == (60, 60)
    assert whole.place(10, 20) == (20, 40)
    assert cut.place(10, 20) == (20, 10)
    with pytest.raises(InputError, match="y from 15 to 45 of the file"):
        cut.place(10, 10)


def test_images_are_normalised_as_the_weights_were_trained(subject_of):
    model = wrap(nn.Conv2d(3, 3, 1), [3], [1])
    model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    white = Photo(np.full((4, 5, 3), 255, dtype=np.uint8))
    assert subject_of(model).images(white)[0, :, 0, 0].tolist() == [2.0, 1.0, 0.5]


def test_colours_are_the_principal_components():
    ramp = torch.linspace(0, 1, 12).view(1, 3, 4)
    colours = ChannelColours(torch.cat((5 * ramp, 10 * ramp, -ramp)))
    assert colours.share == pytest.approx(1)
    red = colours(torch.cat((5 * ramp, 10 * ramp, -ramp)))[..., 0].flatten()
    assert (np.diff(red[1:-1]) > 0).all()  # the largest weight, the second channel's, is positive


def test_tiles_have_gaps():
    tiled = tile([np.full((2, 3), i) for i in range(4)], columns=2)
    assert tiled.shape == (5, 7)
    assert tiled[0].tolist()[:3] + tiled[4].tolist()[4:] == [0, 0, 0, 3, 3, 3]
    assert np.isnan(tiled[2]).all()


# --- receptive field ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_receptive_field_of_3x3_convolutions_is_the_theoretical_one(depth):
    convolutions = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)))
    model = wrap(_Maps(convolutions), [3], [1], size_divisor=1).eval()
    (field,) = receptive_fields(model, [torch.randn(1, 3, 17, 21)], [0], torch.Generator().manual_seed(0))
    expected = torch.zeros(17, 21, dtype=torch.bool)
    expected[8 - depth : 9 + depth, 10 - depth : 11 + depth] = True
    assert torch.equal(field > 0, expected)


def test_radius_holds_the_share_of_the_gradient():
    field = torch.zeros(41, 41)
    field[20, 20], field[20, 25], field[9, 20] = 6.0, 3.0, 1.0
    assert radius(field, 1, 0.5) == 0
    assert radius(field, 1, 0.9) == 5
    assert radius(field, 1, 0.95) == 11


def test_receptive_field_is_seen_through_a_layer_norm():
    class Normed(Backbone):
        def __init__(self, **options):
            super().__init__(channels=(8,), strides=(4,), out_norm=True, **options)
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.stages = nn.ModuleList([nn.Identity()])

    model = Normed().eval()
    (field,) = receptive_fields(model, [torch.randn(1, 3, 16, 16)], [0], torch.Generator().manual_seed(0))
    inside = field[8:12, 8:12]
    assert inside.min() > 1e-3
    assert int((field > 0).sum()) == 16


class _Maps(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return [self.module(images)]


# --- positions ----------------------------------------------------------------------------------------------


def test_a_position_is_like_itself_and_only_random_to_others():
    ((name, table),) = position_tables(build_backbone("vit_tiny_patch16"))
    assert name == "pos_embed"
    values = similarities(table)
    torch.testing.assert_close(values.diagonal(), torch.ones(197))
    assert values.fill_diagonal_(0).abs().max() < 0.6


def test_relative_biases_are_those_that_attention_adds():
    model = build_backbone("swin_tiny", out_indices=(0,))
    biases = relative_biases(model)
    assert list(biases) == ["stages.0.blocks.0.attn", "stages.0.blocks.1.attn"]
    table = biases["stages.0.blocks.0.attn"]
    assert table.shape == (3, 13, 13)
    added = model.stages[0].blocks[0].attn.bias(7, 7)[0]
    query, key = 2 * 7 + 5, 4 * 7 + 1  # two rows down, four columns to the left
    assert torch.equal(table[:, 6 - 2, 6 + 4], added[:, query, key])


# --- shift --------------------------------------------------------------------------------------------------


def test_a_cnn_of_stride_4_moves_with_shifts_by_4_and_a_vit_does_not(photo, randomise, subject_of):
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1))
    cnn = subject_of(randomise(wrap(_Maps(convolutions), [8], [4])))
    vit = subject_of(randomise(build_backbone("vit_tiny_patch16", depth=2, patch_size=4, pyramid="plain")))
    shown = read_photo(photo, (64,))
    relative = {}
    for name, subject in (("cnn", cnn), ("vit", vit)):
        maps = {shift: found[0] for shift, found in shifted_maps(subject, shown, (64, 64), [0, 2, 4]).items()}
        found = {shift: change(maps[0], maps[shift], shift / 4) for shift in maps}
        assert found[0].relative == 0
        assert found[0].cosine == pytest.approx(1)
        relative[name] = {shift: each.relative for shift, each in found.items()}
    assert relative["cnn"][4] < 1e-5 < 0.01 < relative["cnn"][2]
    assert relative["vit"][4] > 0.1


def test_change_of_a_ramp_is_none_at_any_shift():
    ramp = torch.arange(16.0).expand(1, 16, 16)
    for cells in (0.0, 0.25, 1.0):
        assert change(ramp, ramp + cells, cells).relative < 1e-6
        assert change(ramp, ramp + cells + 1, cells).relative > 0.1


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["pyramid", "convnext_tiny", "PHOTO", "--backbone", "vit_tiny_patch16", "--size", "64"],
        ["features", "pvt_v2_b0", "PHOTO", "--size", "64", "--level", "1", "--channels", "3", "0"],
        ["attention", "vit_tiny_patch16", "PHOTO", "--size", "64", "--query", "100", "50", "--head", "1"],
        ["attention", "pvt_v2_b0", "PHOTO", "--size", "64", "--block", "0"],
        ["attention", "swin_tiny", "PHOTO", "--size", "64", "--option", "out_indices=[0]"],
        ["attention", "mobilevit_xxs", "PHOTO", "--size", "64", "--overlay", "--grid"],
        ["receptive-field", "pvt_v2_b0", "--size", "64", "--samples", "1", "--level", "1"],
        ["receptive-field", "pvt_v2_b0", "PHOTO", "PHOTO", "--size", "64", "--samples", "2"],
        ["positions", "vit_tiny_patch16", "PHOTO"],
        ["positions", "efficientformer_l1"],
        ["shift", "pvt_v2_b0", "PHOTO", "--backbone", "vit_tiny_patch16", "--size", "128", "--level", "1"],
    ],
    ids=" ".join,
)
def test_pictures_are_drawn(arguments, photo, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert main(["show", *(str(photo) if a == "PHOTO" else a for a in arguments), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(2**24)) > 50


def test_commands_of_the_readme_are_understood():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    commands = re.findall(r"^backbones show (.*)$", readme, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        kind, *rest = command.split()
        args = build_parser(kind).parse_args([kind, *rest])
        assert all(backbone_info(name) for name in (args.name, *getattr(args, "backbone", [])))


def test_the_picture_is_named_after_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "positions", "vit/vit_tiny_patch16"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["vit-vit_tiny_patch16-positions.png"]


def test_titles_tell_whether_weights_are_random(photo, tmp_path):
    torch.save(build_backbone("pvt_v2_b0").state_dict(), tmp_path / "mine.pth")
    for given, told in (([], "random weights (seed 3)"), (["--pretrained", tmp_path / "mine.pth"], "weights mine.pth")):
        arguments = ["pyramid", "pvt_v2_b0", photo, "--seed", "3", *given]
        (subject,) = build_subjects(build_parser("pyramid").parse_args([str(a) for a in arguments]))
        assert subject.title == f"pvt_v2_b0, {told}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["attention", "convnext_tiny", "PHOTO"], "has no attention that can be seen.* receptive-field"),
        (["attention", "mobilevitv2_050", "PHOTO", "--query", "9", "9"], "no cell of the image; leave it out"),
        (["attention", "vit_tiny_patch16", "PHOTO", "--query", "500", "5"], "outside the image"),
        (["attention", "vit_tiny_patch16", "PHOTO", "--head", "3"], "has heads 0 to 2"),
        (["attention", "vit_tiny_patch16", "PHOTO", "--block", "12"], "12 attention layers, 0 to 11"),
        (["positions", "convnext_tiny"], "no table of positions"),
        (["features", "pvt_v2_b0", "PHOTO", "--level", "4"], r"has the levels 0 \(stride 4\)"),
        (["features", "pvt_v2_b0", "PHOTO", "--channels", "64"], "channels 0 to 63"),
        (["features", "swin_tiny", "PHOTO", "--module", "stages.0.block.1"], "did you mean stages.0.blocks.1"),
        (["features", "pvt_v2_b0", "PHOTO", "--module", "zzz"], "no module of this name; it has stem, stages"),
        (["features", "pvt_v2_b0", "PHOTO", "--module", "out_norms"], "does not run it"),
        (["receptive-field", "pvt_v2_b0", "--overlay"], "nothing to draw over"),
        (["pyramid", "pvt_v2_b0", "PHOTO", "--json", "nowhere/x.json"], "--json=nowhere/x.json: there is no folder"),
        (["shift", "pvt_v2_b0", "PHOTO", "--size", "40"], "too small for shifts at stride 16; --size 96"),
        (["pyramid", "pvt_v2_b0", "nowhere.png"], "cannot be read as an image"),
        (["pyramid", "pvt_v2_b0", "PHOTO", "--option", "in_chans=4"], "leave out in_chans=4"),
        (["pyramid", "pvt_v2_b0", "PHOTO", "--option", "depth"], "write KEY=VALUE"),
        (["pyramid", "pvt_v2_b0", "PHOTO", "--pretrained", "a", "b"], "2 weights for 1 backbones"),
        (["pyramid", "pvt_v2_b0", "PHOTO", "--size", "0"], "positive numbers of pixels"),
        (["pyramid", "pvt_v2_b0", "PHOTO", "--out", "nowhere/x.png"], "there is no folder"),
        (["receptive-field", "pvt_v2_b0", "PHOTO", "PHOTO", "--samples", "1"], "one for each image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_shown_is_said(arguments, told, photo, capsys):
    size = [] if arguments[0] == "positions" or "--size" in arguments else ["--size", "64"]
    assert main(["show", *(str(photo) if a == "PHOTO" else a for a in arguments), *size]) == 2
    assert re.search(told, capsys.readouterr().err)
