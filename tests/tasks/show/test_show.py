"""`backbones show`: what the pictures tell is true, and each is drawn."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from backbones import Backbone, backbone_info, build_backbone, wrap
from backbones.cli import main
from backbones.errors import InputError
from backbones.layers import attend
from backbones_tasks.show import build_parser
from backbones_tasks.show.attention_weights import attention_layers, attention_weights, by_offset, roll_out, unmasked
from backbones_tasks.show.panels import ChannelColours, tile
from backbones_tasks.show.photo import Photo, read_photo
from backbones_tasks.show.positions import position_tables, relative_biases, similarities
from backbones_tasks.show.receptive_field import radius, receptive_fields
from backbones_tasks.show.shift import change, shifted_maps
from backbones_tasks.show.subject import Subject, build_subjects


@pytest.fixture
def photo(tmp_path):
    """Smooth enough to be recognised, wide, and with nothing that repeats."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (12, 18, 3), dtype=np.uint8)).resize((240, 160), Image.BICUBIC)
    path = tmp_path / "photo.png"
    pixels.save(path)
    return path


def subject_of(model, name="model"):
    return Subject(name, model.eval().requires_grad_(False), "random weights")


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


def test_images_are_normalised_as_the_weights_were_trained():
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


# --- attention ----------------------------------------------------------------------------------------------


def explicit_weights(model, images):
    """Softmax of queries and keys as each qkv layer of a plain ViT returns them."""
    found = []

    def see(module, inputs, output):
        q, k, _ = (x.unflatten(-1, (3, -1)).transpose(1, 2) for x in output.chunk(3, dim=-1))
        found.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))

    handles = [m.register_forward_hook(see) for name, m in model.named_modules() if name.endswith("qkv")]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("foreign", [False, True])
def test_fused_attention_weights_are_those_of_an_explicit_softmax(foreign, randomise):
    if foreign:
        inner = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=3)
        assert inner.blocks[0].attn.fused_attn
        model = wrap(_Patches(inner), [192], [16])
    else:
        model = build_backbone("vit_tiny_patch16", depth=3, pyramid="plain")
    randomise(model).requires_grad_(False)
    images = torch.randn(1, 3, 64, 96)
    kept = attention_weights(model, images, lambda index, weights: weights)
    expected = explicit_weights(model, images)
    assert len(kept) == len(expected) == 3
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours.shape == (1, 3, 25, 25)
        assert ours.std() > 1e-3
        torch.testing.assert_close(ours, theirs)
    layer = attention_layers(model, images)[1]
    assert layer.name.endswith("blocks.1.attn")
    assert layer.is_global
    assert (layer.grids[0].height, layer.grids[0].width, layer.grids[0].stride, layer.grids[0].prefix) == (4, 6, 16, 1)
    assert layer.grids[0].token(x=95, y=17) == 1 + 6 + 5


class _Patches(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        height, width = (side // 16 for side in images.shape[-2:])
        return [self.model.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (height, width))]


def test_nn_multihead_attention_is_seen_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, images):
            tokens = F.avg_pool2d(images, 8).repeat(1, 4, 1, 1)[:, :8]
            return [self.layer(tokens.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, tokens.shape[2:])]

    model = wrap(Encoder(), [8], [8]).eval().requires_grad_(False)
    (weights,) = attention_weights(model, torch.randn(1, 3, 32, 64), lambda index, weights: weights)
    assert weights.shape == (1, 2, 32, 32)
    assert torch.backends.mha.get_fastpath_enabled()  # as it was


def test_roll_out_rows_sum_to_one_and_follow_the_attention():
    layers = [torch.rand(5, 5).softmax(-1) for _ in range(4)]
    torch.testing.assert_close(roll_out(layers).sum(1), torch.ones(5))
    ahead = torch.eye(3).roll(1, dims=1)  # token i attends to i + 1 alone
    assert roll_out([ahead, ahead]).tolist() == [[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.5, 0.25, 0.25]]
    first, second = ahead, torch.eye(3)[[0, 0, 0]]  # the order of the layers matters
    assert roll_out([first, second])[2].tolist() == [0.5, 0.25, 0.25]
    assert roll_out([second, first])[2].tolist() != [0.5, 0.25, 0.25]


@pytest.mark.parametrize("size", [(224, 224), (224, 280), (200, 330)])
def test_reduced_attention_has_a_grid_for_queries_and_one_for_keys(size):
    model = build_backbone("pvt_v2_b0").eval().requires_grad_(False)
    first, *_, last = attention_layers(model, torch.randn(1, 3, *size))
    queries, keys = first.grids
    assert (queries.stride, keys.stride) == (4, 32)
    assert (queries.height, queries.width) == tuple(-(-side // 4) for side in size)
    assert keys.height * keys.width == first.keys
    assert last.is_global
    assert not first.is_global


def test_windows_are_told_from_the_whole_image():
    model = build_backbone("swin_tiny", out_indices=(0,)).eval().requires_grad_(False)
    images = torch.randn(1, 3, 112, 112)
    layers = attention_layers(model, images)
    assert [(layer.groups, layer.window, layer.grids) for layer in layers] == [(16, 7, None)] * 2
    plain, shifted = attention_weights(model, images, lambda index, weights: weights)
    assert plain.shape == shifted.shape == (16, 3, 49, 49)
    assert len(unmasked(plain)) == 16
    assert len(unmasked(shifted)) == 9  # the last row and the last column of windows hold cells from both ends


def test_channels_that_attend_are_taken_for_no_grid():
    class ChannelAttention(nn.Module):
        def forward(self, images):
            q = F.avg_pool2d(images, 8).repeat(1, 11, 1, 1)
            return [attend(q.flatten(2), q.flatten(2), q.flatten(2), 1).unflatten(2, q.shape[2:])]

    model = wrap(ChannelAttention(), [33], [8]).eval()
    (layer,) = attention_layers(model, torch.randn(1, 3, 64, 64))
    assert (layer.queries, layer.keys, layer.grids, layer.window) == (33, 33, None, None)


def test_mean_weight_by_offset():
    weights = torch.zeros(2, 1, 9, 9)
    for query in range(9):
        at_the_right = query % 3 == 2
        weights[:, 0, query, query if at_the_right else query + 1] = 1.0  # the right neighbour, if there is one
    table = by_offset(weights)
    assert table.shape == (1, 5, 5)
    assert table[0, 2, 3] == 1.0
    assert table[0, 2, 2] == pytest.approx(1 / 3)
    assert table.sum() == pytest.approx(4 / 3)


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


def test_a_cnn_of_stride_4_moves_with_shifts_by_4_and_a_vit_does_not(photo, randomise):
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1))
    cnn = subject_of(randomise(wrap(_Maps(convolutions), [8], [4])))
    vit = subject_of(randomise(build_backbone("vit_tiny_patch16", depth=2, patch_size=4, pyramid="plain")))
    shown = read_photo(photo, (64,))
    relative = {}
    for name, subject in (("cnn", cnn), ("vit", vit)):
        maps = shifted_maps(subject, shown, 0, (64, 64), [0, 2, 4])
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
        (["attention", "convnext_tiny", "PHOTO"], "has no attention between cells; ViT, .* receptive-field"),
        (["attention", "mobilevit_xxs", "PHOTO"], "no cells of a grid over the image"),
        (["attention", "swin_tiny", "PHOTO", "--query", "5", "5"], "attends within windows"),
        (["attention", "vit_tiny_patch16", "PHOTO", "--query", "500", "5"], "outside the image"),
        (["attention", "vit_tiny_patch16", "PHOTO", "--head", "3"], "has heads 0 to 2"),
        (["attention", "vit_tiny_patch16", "PHOTO", "--block", "12"], "12 attention layers, 0 to 11"),
        (["positions", "convnext_tiny"], "no table of positions"),
        (["features", "pvt_v2_b0", "PHOTO", "--level", "4"], r"has the levels 0 \(stride 4\)"),
        (["features", "pvt_v2_b0", "PHOTO", "--channels", "64"], "channels 0 to 63"),
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
