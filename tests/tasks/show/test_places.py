"""Where values are from is known, whatever a model does to them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_backbone
from backbones_tasks.show.attention_weights import watch
from backbones_tasks.show.grid import Grid, as_map, grid_of
from backbones_tasks.show.places import Places, told


def places_after(function, *sides):
    images = torch.randn(1, 3, *sides)
    with Places(images) as places:
        result = function(images)
    return places.of(result), places


def test_a_cell_is_in_the_middle_of_its_patch_and_one_beyond_the_image_where_it_begins():
    where, _ = places_after(lambda x: F.conv2d(F.pad(x, (0, 3, 0, 0)), torch.ones(5, 3, 4, 4), stride=4), 8, 9)
    assert where.shape == (1, 5, 2, 3)
    assert where[0, 0, :, 0].tolist() == [2 + 2j, 6 + 2j]
    assert where[0, 4, 0].tolist() == [2 + 2j, 2 + 6j, 2 + 8.5j]  # of the last patch, one column is image


def test_3x3_convolutions_leave_cells_where_they_are():
    convolutions = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))
    images = torch.randn(1, 3, 5, 7)
    with Places(images) as places, torch.no_grad():
        result = convolutions(images)
    assert torch.equal(places.of(result), places.of(images))


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)[0, :, 0], [0.5 + 0.5j, 0.5 + 1.5j, 1.5 + 0.5j, 1.5 + 1.5j]),
        (lambda x: x.roll((1, 1), (2, 3)).flatten(2)[0, 1], [1.5 + 1.5j, 1.5 + 0.5j, 0.5 + 1.5j, 0.5 + 0.5j]),
        (lambda x: torch.einsum("bchw,dc->bdwh", x, torch.ones(2, 3))[0, 0, 1], [0.5 + 1.5j, 1.5 + 1.5j]),
        (lambda x: F.unfold(x, 2)[0, :4, 0], [0.5 + 0.5j, 0.5 + 1.5j, 1.5 + 0.5j, 1.5 + 1.5j]),
        (lambda x: (x * x.mean((2, 3), keepdim=True).sigmoid()).flatten(2)[0, 0, :2], [0.5 + 0.5j, 0.5 + 1.5j]),
        (lambda x: F.interpolate(x, scale_factor=2, mode="nearest")[0, 0, 0], [0.5 + 0.5j] * 2 + [0.5 + 1.5j] * 2),
        (lambda x: F.conv_transpose2d(x, torch.ones(3, 1, 2, 2), stride=2)[0, 0, 1, 1:3], [0.75 + 0.75j, 0.75 + 1.25j]),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten()[:1], [1 + 1j]),
    ],
)
def test_places_follow_values(move, expected):
    where, _ = places_after(move, 2, 2)
    assert where.tolist() == expected


def test_class_tokens_are_nowhere_and_padding_is_outside():
    def tokens(x):
        cells = F.pad(x.flatten(2).transpose(1, 2), (0, 0, 0, 1))
        return torch.cat((torch.zeros(1, 1, 3), cells), dim=1)

    where, _ = places_after(tokens, 2, 2)
    assert where.shape == (1, 6, 3)
    assert where[0, 0].isnan().all()
    assert where[0, 5].isinf().all()
    assert where[0, 1:5].isfinite().all()
    grid, cells = grid_of(where[0, :, 0], (2, 2))
    assert (grid.height, grid.width) == (2, 2)
    assert cells.tolist() == [-1, 0, 1, 2, 3, -1]


def test_what_mixes_all_cells_does_not_hide_where_a_residual_is():
    mixer = torch.randn(4, 4)
    for both in (lambda x, y: x + y, lambda x, y: y + x):
        where, _ = places_after(lambda x, both=both: both(x.flatten(2), x.flatten(2) @ mixer), 2, 2)
        assert where[0, 0].tolist() == [0.5 + 0.5j, 0.5 + 1.5j, 1.5 + 0.5j, 1.5 + 1.5j]


def test_an_operator_that_is_not_known_loses_places_and_is_named():
    where, places = places_after(lambda x: x.cumsum(2) + 1, 4, 4)
    assert where is None
    assert told(places.lost) == "cumsum in the model"


def test_writing_into_a_part_of_a_tensor_makes_it_unknown():
    def shift(x):
        x = x + 0
        x[:, :, :, 1:] = x[:, :, :, :-1].clone()
        return x

    where, places = places_after(shift, 4, 4)
    assert where is None
    assert "copy_" in told(places.lost)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens", "windows"])
def test_maps_are_found_in_any_layout(layout):
    arrange = {
        "NCHW": lambda x: x,
        "NHWC": lambda x: x.permute(0, 2, 3, 1),
        "tokens": lambda x: torch.cat((torch.ones(1, 2, 3), x.flatten(2).transpose(1, 2)), 1),
        "windows": lambda x: x.unflatten(3, (2, 3)).unflatten(2, (2, 2)).permute(2, 4, 3, 5, 1, 0).flatten(2, 3),
    }[layout]
    images = torch.randn(1, 3, 16, 24)
    with Places(images) as places:
        coarse = F.avg_pool2d(images, 4)
        values = arrange(coarse)
    grid, found = as_map(values, places.of(values), (16, 24))
    assert grid == Grid(4, 6, (4, 4))
    assert torch.equal(found, coarse[0])


FAMILIES = [
    ("vit_tiny_patch16", {"depth": 2}),
    ("swin_tiny", {"out_indices": (0,)}),
    ("pvt_v2_b0", {"out_indices": (0, 1)}),
    ("twins_svt_small", {"out_indices": (0,)}),
    ("maxvit_rmlp_pico_rw", {"out_indices": (0,)}),
    ("coatnet_nano_rw", {"out_indices": (2,), "depths": (1, 1, 1, 1)}),
    ("mobilevit_xxs", {"out_indices": (1,)}),
    ("mobilevitv2_050", {"out_indices": (1,)}),
    ("efficientformer_l1", {}),
    ("edgevit_xxs", {"out_indices": (0, 1)}),
]


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_values_change_most_in_the_cell_in_which_the_image_changes(name, options, randomise):
    """Of sides that neither windows nor patches divide: a key that is told in the wrong place is found out."""
    model = randomise(build_backbone(name, **options)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, 120, 152, generator=generator)

    def values(images):
        def keep(index, seen):
            by_key = seen.weights.log().mT if seen.values is None else seen.values  # (groups, heads, keys, ...)
            return seen.layer, by_key.transpose(1, 2).flatten(2)

        return watch(model, images, keep)

    before = values(images)
    for y, x in ((20, 50), (84, 12), (60, 110)):  # PVTv2 and Twins leave out what is left over of whole keys
        changed = images.clone()
        changed[..., y - 4 : y + 4, x - 4 : x + 4] += 5
        for (layer, old), (_, new) in zip(before, values(changed), strict=True):
            difference = (new - old).norm(dim=2)  # (groups, keys)
            difference[layer.asked.of < 0] = 0
            cell = layer.asked.of.flatten()[difference.flatten().argmax()]
            row, column = layer.asked.grid.middles(cell).tolist()
            # MobileViT convolves ten times before it attends, and what is drawn at random there is not symmetric.
            reach = (2.5 if name.startswith("mobilevit") else 1.5) * max(layer.asked.grid.stride)
            assert abs(row - y) <= reach, (layer.name, row, column)
            assert abs(column - x) <= reach, (layer.name, row, column)
