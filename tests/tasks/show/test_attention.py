"""Attention weights are those that models use, where they are said to be, and what is told of them is true."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_backbone, wrap
from backbones.errors import InputError
from backbones.layers import attend
from backbones_tasks.show.attention_weights import (
    Attended,
    AttentionLayer,
    Cells,
    attention_layers,
    by_offset,
    distances,
    roll_out,
    watch,
)
from backbones_tasks.show.grid import Grid


def weights_of(model, images):
    return watch(model, images, lambda index, seen: seen.weights)


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
    kept = weights_of(model, images)
    expected = explicit_weights(model, images)
    assert len(kept) == len(expected) == 3
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours.shape == (1, 3, 25, 25)
        assert ours.std() > 1e-3
        torch.testing.assert_close(ours, theirs)
    layer = attention_layers(model, images)[1]
    assert layer.name.endswith("blocks.1.attn")
    assert layer.is_global
    assert layer.prefix == 1
    assert layer.asking.grid == Grid(4, 6, (16, 16))
    assert layer.asking.of[0].tolist() == [-1, *range(24)]
    assert layer.asking.grid.cell(x=95, y=17) == 6 + 5


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
    (weights,) = weights_of(model, torch.randn(1, 3, 32, 64))
    assert weights.shape == (1, 2, 32, 32)
    assert torch.backends.mha.get_fastpath_enabled()  # as it was


# --- weights times values -----------------------------------------------------------------------------------

WITH_PROJECTION = [
    ("vit_tiny_patch16", {"depth": 2}),
    ("swin_tiny", {"out_indices": (0,), "dims": (24,) * 4}),
    ("pvt_v2_b0", {"out_indices": (0,)}),
    ("twins_svt_small", {"out_indices": (0,)}),
    ("maxvit_rmlp_pico_rw", {"out_indices": (0,)}),
    ("coatnet_nano_rw", {"out_indices": (2,)}),
    ("mobilevit_xxs", {"out_indices": (1,)}),
    ("efficientformer_l1", {}),
]


@pytest.mark.parametrize(("name", "options"), WITH_PROJECTION, ids=[name for name, _ in WITH_PROJECTION])
def test_weights_sum_to_one_and_times_values_are_what_the_module_goes_on_with(name, options, randomise):
    model = randomise(build_backbone(name, **options)).requires_grad_(False)
    images = torch.randn(1, 3, 64, 64)
    projected = {}
    for path, module in model.named_modules():
        if path.endswith(("attn.proj", "token_mixer.proj")):
            module.register_forward_pre_hook(lambda _, inputs, path=path: projected.setdefault(path, inputs[0]))
    with torch.no_grad():
        model(images)  # as it runs by itself

    def keep(index, seen):
        torch.testing.assert_close(seen.weights.sum(-1), torch.ones(seen.weights.shape[:-1]))
        return seen.layer.name, (seen.weights @ seen.values).transpose(1, 2).flatten(2).flatten(0, 1)

    found = {name: output for name, output in watch(model, images, keep) if f"{name}.proj" in projected}
    assert found
    for path, output in found.items():
        expected = projected[f"{path}.proj"]
        expected = expected.movedim(1, -1) if expected.shape[-1] != output.shape[-1] else expected
        # Rows of windows may come in another order; each has its like.
        apart = torch.cdist(expected.flatten(0, -2), output, compute_mode="donot_use_mm_for_euclid_dist")
        assert float(apart.amin(1).max()) < 1e-4 * float(output.norm(dim=1).max())


def test_context_scores_of_separable_attention_times_keys_are_the_context(randomise):
    model = randomise(build_backbone("mobilevitv2_050", out_indices=(1,))).requires_grad_(False)
    images = torch.randn(1, 3, 64, 96)
    module = model.stages[1][1].transformer[0].attn
    held = {}
    module.register_forward_hook(lambda _, inputs, output: held.update(x=inputs[0], output=output))
    (first, *_) = watch(model, images, lambda index, seen: (seen.layer, seen.weights))
    layer, weights = first
    assert (layer.groups, layer.heads, layer.queries, layer.keys) == (4, 1, 1, 24)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 1, 1))
    _, key, value = module.qkv_proj(held["x"])[0].split((1, 64, 64))
    expected = torch.empty_like(held["output"][0])
    for group, cells in zip(weights[:, 0, 0], layer.asked.of, strict=True):  # of one place in all 2 x 2 patches each
        context = (key.flatten(1)[:, cells] * group).sum(1)
        gated = value.flatten(1)[:, cells].relu() * context[:, None]
        expected.flatten(1)[:, cells] = module.out_proj(gated[None, :, :, None])[0, :, :, 0]
    torch.testing.assert_close(expected, held["output"][0], atol=1e-5, rtol=1e-4)


# --- who attends to whom ------------------------------------------------------------------------------------


def window(side):
    return lambda at, size: at // side


def shifted(side, shift):
    """Windows of a map that is rolled, in which the two ends of the map are kept apart."""

    def part(at, size):
        rolled = (at - shift) % size
        return rolled // side, at < shift

    return part


def every(count):
    """Windows as a grid of so many rows or columns: cells that are one from each part."""
    return lambda at, size: at % (size // count)


REACH = [
    ("swin_tiny", {"out_indices": (0,), "dims": (24,) * 4}, (112, 168), [window(7), shifted(7, 3)]),
    ("twins_svt_small", {"out_indices": (0,)}, (112, 56), [window(7), None]),
    ("maxvit_rmlp_pico_rw", {"out_indices": (0,)}, (64, 96), [window(8), every(8)] * 2),
    ("mobilevit_xxs", {"out_indices": (1,)}, (64, 96), [lambda at, size: at % 2] * 2),
    ("vit_tiny_patch16", {"depth": 2, "window_size": 3, "global_blocks": (1,)}, (96, 144), [window(3), None]),
]


@pytest.mark.parametrize(("name", "options", "size", "rules"), REACH, ids=[name for name, *_ in REACH])
def test_a_cell_attends_to_those_of_its_window_or_grid_alone(name, options, size, rules):
    """As the papers define windows, shifted windows, grids and patches, cell by cell."""
    model = build_backbone(name, **options).eval().requires_grad_(False)
    seen = watch(model, torch.randn(1, 3, *size), lambda index, seen: seen)
    assert len(seen) == len(rules)
    for each, rule in zip(seen, rules, strict=True):
        grid, keys = each.layer.asking.grid, each.layer.asked.grid
        asked = torch.zeros(grid.height * grid.width, keys.height * keys.width)
        for weights, own, others in zip(each.weights, each.layer.asking.of, each.layer.asked.of, strict=True):
            inside = own >= 0
            asked[own[inside]] += keys.spread(weights.mean(0)[inside], others).flatten(1)
        cells = [divmod(cell, grid.width) for cell in range(grid.height * grid.width)]
        if rule is None:
            expected = (keys.spread(torch.ones(each.layer.keys), each.layer.asked.of[0]) > 0).flatten().expand_as(asked)
        else:
            parts = [(rule(row, grid.height), rule(column, grid.width)) for row, column in cells]
            expected = torch.tensor([[own == other for other in parts] for own in parts])
        assert torch.equal(asked > 1e-30, expected), each.layer
        if each.layer.prefix == 0:
            torch.testing.assert_close(asked.sum(1), torch.ones(len(asked)))


@pytest.mark.parametrize("size", [(224, 224), (224, 280), (200, 330)])
def test_reduced_keys_have_cells_of_their_own_size(size):
    model = build_backbone("pvt_v2_b0").eval().requires_grad_(False)
    first, *_, last = attention_layers(model, torch.randn(1, 3, *size))
    assert (first.asking.grid.stride, first.asked.grid.stride) == ((4, 4), (32, 32))
    assert (first.asking.grid.height, first.asking.grid.width) == tuple(-(-side // 4) for side in size)
    assert sorted(first.asking.of[first.asking.of >= 0].tolist()) == list(range(-(-size[0] // 4) * -(-size[1] // 4)))
    assert last.is_global
    assert not first.is_global


def test_windows_beyond_the_image_hold_no_cell_and_cells_are_in_one_window_each():
    model = build_backbone("maxvit_rmlp_pico_rw", out_indices=(0,)).eval().requires_grad_(False)
    for layer in attention_layers(model, torch.randn(1, 3, 100, 132)):  # 25 x 33 cells in parts of 8
        cells = layer.asking.of.flatten()
        assert sorted(cells[cells >= 0].tolist()) == list(range(25 * 33))


def test_channels_that_attend_are_taken_for_no_cells():
    class ChannelAttention(nn.Module):
        def forward(self, images):
            q = F.avg_pool2d(images, 8).repeat(1, 11, 1, 1)
            return [attend(q.flatten(2), q.flatten(2), q.flatten(2), 1).unflatten(2, q.shape[2:])]

    model = wrap(ChannelAttention(), [33], [8]).eval()
    (layer,) = attention_layers(model, torch.randn(1, 3, 64, 64))
    assert (layer.queries, layer.keys, layer.asking, layer.asked, layer.window) == (33, 33, None, None, None)


# --- what is told of them -----------------------------------------------------------------------------------


def drawn_layer(groups, side, prefix=0):
    """Weights at random, in windows of 3 x 3 or over all, some tokens in no cell."""
    grid = Grid(side, side, (8, 8))
    cells = torch.arange(side * side).view(side, side)
    if groups > 1:
        cells = cells.view(side // 3, 3, side // 3, 3).transpose(1, 2).reshape(groups, 9)
    else:
        cells = F.pad(cells.view(1, -1), (prefix, 0), value=-1)
    of = Cells(grid, cells)
    weights = torch.rand(groups, 2, cells.shape[1], cells.shape[1]).softmax(-1)
    return Attended(AttentionLayer("attn", groups, 2, cells.shape[1], cells.shape[1], of, of), weights, None)


@pytest.mark.parametrize(("groups", "side", "prefix"), [(1, 4, 0), (1, 4, 2), (4, 6, 0)])
def test_attention_distance_is_the_weighted_mean_of_pixels_between_cells(groups, side, prefix):
    seen = drawn_layer(groups, side, prefix)
    for head, found in enumerate(distances(seen)):
        means = []
        for group in range(groups):
            cells = seen.layer.asking.of[group].tolist()
            for query, own in enumerate(cells):
                total = weight = 0.0
                for key, other in enumerate(cells):
                    if own >= 0 and other >= 0:
                        share = float(seen.weights[group, head, query, key])
                        total += share * 8 * math.dist(divmod(own, side), divmod(other, side))
                        weight += share
                if own >= 0:
                    means.append(total / weight)
        assert found == pytest.approx(np.mean(means), rel=1e-5)


def test_distance_of_attention_to_oneself_is_none_and_of_uniform_attention_is_known():
    seen = drawn_layer(1, 2)
    seen.weights[:, 0], seen.weights[:, 1] = torch.eye(4), 0.25
    assert distances(seen) == [0, pytest.approx((8 + 8 + 8 * 2**0.5) / 4)]


def test_mean_weight_by_offset():
    seen = drawn_layer(4, 6)
    seen.weights.zero_()
    for query in range(9):
        at_the_right = query % 3 == 2
        seen.weights[:, 0, query, query if at_the_right else query + 1] = 1.0  # the right neighbour, if there is one
    assert seen.layer.window == (3, 3)
    table = by_offset(seen)
    assert table.shape == (2, 5, 5)
    assert table[0, 2, 3] == 1.0
    assert table[0, 2, 2] == pytest.approx(1 / 3)
    assert table[0].sum() == pytest.approx(4 / 3)


def test_windows_that_a_mask_cuts_do_not_count_by_offset():
    seen = drawn_layer(4, 6)
    seen.weights[1:] = torch.eye(9)
    torch.testing.assert_close(by_offset(seen)[:, 4, 4], seen.weights[0, :, 0, 8])


def test_roll_out_rows_sum_to_one_and_follow_the_attention():
    layers = [torch.rand(5, 5).softmax(-1) for _ in range(4)]
    torch.testing.assert_close(roll_out(layers).sum(1), torch.ones(5))
    ahead = torch.eye(3).roll(1, dims=1)  # token i attends to i + 1 alone
    assert roll_out([ahead, ahead]).tolist() == [[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.5, 0.25, 0.25]]
    first, second = ahead, torch.eye(3)[[0, 0, 0]]  # the order of the layers matters
    assert roll_out([first, second])[2].tolist() == [0.5, 0.25, 0.25]
    assert roll_out([second, first])[2].tolist() != [0.5, 0.25, 0.25]


# --- the picture --------------------------------------------------------------------------------------------


def test_a_query_lights_its_own_window_alone(draw):
    (numbers,) = draw("attention swin_tiny PHOTO --size 112 168 --option out_indices=[0] --query 120 50").numbers
    # The photograph of 240 x 160 is cut to 168 x 112 pixels, which are 42 x 28 cells; the second layer is shifted.
    row, column = int(50 * 0.7 // 4), int(120 * 0.7 // 4)
    assert numbers["query"] == {"row": row, "column": column}
    assert [each["attends"] for each in numbers["layers"]] == ["24 windows of 7 x 7"] * 2
    assert [panel["title"] for panel in numbers["panels"]] == ["head 0", "head 1", "head 2", "mean of the heads"]
    for panel in numbers["panels"]:
        weights = np.array(panel["weights"])
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        rows, columns = np.nonzero(weights)
        top, left = (row - 3) // 7 * 7 + 3, (column - 3) // 7 * 7 + 3
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (top, top + 6, left, left + 6)
        assert panel["peak"] == pytest.approx(weights.max() * 49)


class _Attending(nn.Module):
    """Attention among cells of 8 x 8 pixels, as `mix` of queries (B, N, C) has it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 3, 8, 8)

    def forward(self, images):
        cells = self.embed(images)
        return [self.mix(cells.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(cells.shape)]


class _Gated(_Attending):
    """No softmax."""

    def mix(self, q):
        return (q @ q.mT).sigmoid() @ q


class _Sorted(_Attending):
    """The values come in an order that cannot be followed."""

    def mix(self, q):
        return (q @ q.mT).softmax(-1) @ q.sort(1)[0]


class _Backwards(_Attending):
    """Values stand before weights, as in LeViT."""

    def mix(self, q):
        return (q.mT @ (q @ (2 * q).mT).softmax(-1).mT).mT


def test_weights_are_seen_behind_values_too():
    model = wrap(_Backwards(), [3], [8]).eval().requires_grad_(False)
    images = torch.randn(1, 3, 32, 48)
    (seen,) = watch(model, images, lambda index, seen: seen)
    cells = model.module.embed(images).flatten(2)[0].T
    torch.testing.assert_close(seen.weights[0, 0], (2 * cells @ cells.T).softmax(-1))
    assert seen.layer.asking.of.tolist() == [list(range(24))]
    torch.testing.assert_close(seen.values[0, 0], cells)
    assert seen.layer.is_global


@pytest.mark.parametrize(("module", "told"), [(_Gated, "a softmax times values"), (_Sorted, "sort in .*softmax in ")])
def test_attention_of_a_plugin_that_cannot_be_seen_is_an_error(module, told, draw, subject_of):
    subject = subject_of(wrap(module(), [3], [8]))
    with pytest.raises(InputError, match=told):
        draw("attention model PHOTO --size 64", subject)
