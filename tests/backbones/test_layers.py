"""The toolkit: what it computes is what torch computes, for less."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.modules import Conv2dReLU
from timm.layers import Conv2dSame
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import Conv2dNormActivation

from backbones import for_inference
from backbones.errors import InputError
from backbones.layers import (
    Attention,
    Blocks,
    ConvNorm,
    DistanceBias,
    FastLinear,
    LogPositionBias,
    MBConv,
    PreLogits,
    RelativePositionBias,
    SqueezeExcite,
    TableCache,
    activate,
    attend,
    fold_norm,
    fold_norm_before,
    halve,
    onednn,
    pad_same,
    pad_to_multiple,
    residual,
    window_partition,
    window_unpartition,
)


@pytest.mark.parametrize(
    "shape", [(2, 17, 24), (3, 24), (24,), (2, 5, 7, 24), (0, 4, 24), (2, 500, 24), (1, 30, 30, 24)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch_forward_and_backward(shape, bias):
    theirs = nn.Linear(24, 40, bias=bias)
    ours = FastLinear.of(copy.deepcopy(theirs))
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = ours(x), theirs(y)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(b)
    a.backward(upstream)
    b.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-4, rtol=1e-5)


def test_linear_takes_views_that_are_not_contiguous():
    layer = FastLinear.of(nn.Linear(8, 4))
    x = torch.randn(2, 8, 2000).transpose(1, 2)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-5)


def test_linear_follows_autocast_and_dtype():
    layer = FastLinear.of(nn.Linear(8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 8).double()).dtype == torch.float64


def test_residual_keeps_the_wider_dtype_and_overwrites_only_what_is_spare():
    x, update = torch.randn(3, 4), torch.randn(3, 4)
    before, given, expected = x.clone(), update.clone(), x + update
    assert torch.equal(residual(x, update), expected)
    assert torch.equal(update, given)
    assert residual(x, update.bfloat16(), spare=True).dtype == torch.float32
    assert torch.equal(residual(x, x, spare=True), 2 * x)
    assert residual(x, update, spare=True) is update
    assert torch.equal(update, expected)
    assert torch.equal(x, before)


def test_residual_scales_each_channel_of_the_update_and_lets_the_scale_learn():
    x, update, scale = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4, requires_grad=True)
    expected = x + scale.detach() * update
    learning = residual(x, update, scale, spare=True)
    learning.sum().backward()
    torch.testing.assert_close(scale.grad, update.sum((0, 1)))
    torch.testing.assert_close(learning.detach(), expected)
    with torch.no_grad():
        assert residual(x, update.bfloat16(), scale).dtype == torch.float32
        overwritten = residual(x, update, scale, spare=True)
    torch.testing.assert_close(overwritten, expected)
    assert overwritten.data_ptr() == update.data_ptr()


def test_attention_equals_the_formula():
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    heads = [t.reshape(2, -1, 2, 4).transpose(1, 2) for t in (q, k, v)]
    weights = (heads[0] @ heads[1].mT / 2).softmax(-1)
    torch.testing.assert_close(attend(q, k, v, heads=2), (weights @ heads[2]).transpose(1, 2).reshape(2, 5, 8))


@pytest.mark.parametrize("keys", [1, 700])
def test_fast_attention_to_many_keys_equals_pytorchs(keys):
    q, k, v = torch.randn(2, 900, 3 * 16), torch.randn(2, keys, 3 * 16), torch.randn(2, keys, 3 * 16)
    before = k.clone()
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, heads=3, fast=True), attend(q, k, v, heads=3), atol=1e-5, rtol=0)
    assert torch.equal(k, before)


@pytest.mark.skipif(not onednn.can_run(torch.zeros(1), torch.zeros(1)), reason="oneDNN has no such operators here")
def test_a_compilers_linear_layer_equals_pytorchs_and_so_do_its_gradients():
    x, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((2, 3, 8), (5, 8), (5,)))
    expected = F.linear(x, weight, bias)
    result = onednn.learning_linear(x, weight, bias)
    torch.testing.assert_close(result, expected)
    grad = torch.randn_like(result)
    gradients = (torch.autograd.grad(y, (x, weight, bias), grad) for y in (result, expected))
    for ours, pytorchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, pytorchs)


def test_attention_names_heads_that_do_not_fit():
    with pytest.raises(InputError, match="3 heads do not divide a width of 8"):
        Attention(8, 3)


@pytest.mark.parametrize("size", [(14, 14), (13, 9), (1, 1), (7, 20)])
def test_windows_are_put_back_where_they_came_from(size):
    x = torch.randn(2, *size, 3)
    windows = window_partition(x, 7)
    assert windows.shape[1:] == (49, 3)
    assert torch.equal(window_unpartition(windows, 7, 2, *size), x)


def test_a_window_holds_the_cells_of_one_square():
    x = torch.arange(4 * 4.0).reshape(1, 4, 4, 1)
    assert window_partition(x, 2)[1].flatten().tolist() == [2, 3, 6, 7]


def test_padding_is_zero_at_the_right_and_bottom_only():
    x = torch.ones(1, 1, 5, 8)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (1, 1, 8, 8)
    assert torch.equal(padded[..., :5, :], x)
    assert padded[..., 5:, :].abs().sum() == 0
    assert pad_to_multiple(padded, 4) is padded


class Shifted(nn.Module):
    """A block that takes a table, and may take a mask, beside what it changes."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x, table, mask=None):
        y = self.dropout(self.norm(self.linear(x))) + table
        return x + (y if mask is None else y * mask)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_pass_on_what_they_are_given_and_recompute_to_the_same_gradients(masked):
    blocks = Blocks(*(Shifted() for _ in range(3)))
    state = copy.deepcopy(blocks.state_dict())
    x, table, mask = torch.randn(4, 6), torch.randn(6, requires_grad=True), torch.rand(4, 1, requires_grad=True)
    learning = [table, *([mask] if masked else []), *blocks.parameters()]
    results = []
    for blocks.checkpointing in (False, True):
        blocks.load_state_dict(state)
        torch.manual_seed(0)
        out = blocks(x, table, mask=mask if masked else None)
        results.append([out, *torch.autograd.grad(out.square().sum(), learning), *blocks.buffers()])
        results[-1] = [value.clone() for value in results[-1]]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_slice_of_blocks_runs_as_the_whole_does(training, monkeypatch):
    recomputed = []
    monkeypatch.setattr(
        "backbones.layers.blocks.checkpoint", lambda block, *args: recomputed.append(block) or block(*args)
    )
    blocks = Blocks(*(Shifted() for _ in range(4))).train(training)
    blocks.checkpointing = True
    x = table = torch.ones(3, 6)
    part = blocks[1:3]
    assert list(part) == list(blocks)[1:3]
    assert part.training is training
    part(x, table)
    assert recomputed == (list(part) if training else [])
    assert isinstance(blocks[0], Shifted)


def test_blocks_of_a_slice_export_and_compile_in_one_graph():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = Blocks(*(Shifted() for _ in range(4)))

        def forward(self, x):
            first = self.blocks[:2](x, x)
            return first, self.blocks[2:](first, x, mask=x)

    model, x = Tapped().eval(), torch.randn(5, 6)
    expected = model(x)
    for program in (
        torch.export.export(model, (x,)).module(),
        torch.compile(model, fullgraph=True, backend="eager"),
    ):
        assert all(torch.equal(a, b) for a, b in zip(program(x), expected, strict=True))


@pytest.mark.parametrize(
    ("act", "function"), [(None, lambda x: x), ("relu", F.relu), ("silu", F.silu), ("gelu", F.gelu)]
)
def test_activations_overwrite_only_what_is_spare_and_autograd_does_not_need(act, function):
    x = torch.randn(4, 5)
    given = x.clone()
    assert torch.equal(activate(x, act), function(given))
    assert torch.equal(x, given)
    needed = x.clone().requires_grad_() * 1
    assert torch.equal(activate(needed, act, spare=True), function(x))
    assert torch.equal(needed, given)
    spare = x.clone()
    assert torch.equal(activate(spare, act, spare=True), function(x))
    assert torch.equal(spare, function(x))


class TestConvNorm:
    @pytest.fixture(params=[{}, {"stride": 2, "act": "silu"}, {"stride": 2, "same": True, "bias": True, "groups": 2}])
    def layer(self, request, randomise):
        return randomise(ConvNorm(4, 6, 3, **request.param))

    @pytest.mark.parametrize("size", [(9, 10), (8, 8), (1, 1)])
    def test_folding_the_norm_changes_nothing(self, layer, size):
        x = torch.randn(2, 4, *size)
        expected = layer(x)
        folded = copy.deepcopy(layer).prepare_for_inference()
        assert type(folded.norm) is nn.Identity
        torch.testing.assert_close(folded(x), expected, atol=1e-5, rtol=1e-5)
        stride = layer.conv.stride[0]
        assert expected.shape == (2, 6, -(-size[0] // stride), -(-size[1] // stride))

    def test_a_layer_that_comes_between_stays_there(self, randomise):
        layer = randomise(ConvNorm(4, 6, between=True))
        x = torch.randn(2, 4, 8, 8)
        expected = layer(x, torch.tanh)
        torch.testing.assert_close(copy.deepcopy(layer).prepare_for_inference()(x, torch.tanh), expected)
        assert not torch.allclose(expected, layer(x), atol=1e-3)

    def test_training_learns_statistics(self, layer):
        layer.train()
        with torch.no_grad():
            layer(torch.randn(2, 4, 8, 8))
        assert layer.norm.num_batches_tracked == 1


def test_a_folded_norm_scales_the_bias_of_the_convolution_too(randomise):
    conv, norm = randomise(nn.Conv2d(4, 6, 3)), randomise(nn.BatchNorm2d(6))
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(fold_norm(conv, norm)(x), norm(conv(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("side", [1, 2, 8, 9, 31])
def test_same_padding_is_that_of_tensorflow(side, kernel):
    conv = Conv2dSame(3, 4, kernel, stride=2)
    x = torch.randn(1, 3, side, side + 1)
    ours = F.conv2d(pad_same(x, kernel, 2), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(ours, conv(x), atol=1e-5, rtol=1e-5)


def test_a_norm_before_a_convolution_is_folded_into_it(randomise):
    norm, conv = randomise(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)))
    x = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(fold_norm_before(norm, conv)(x), conv(norm(x)), atol=1e-5, rtol=1e-5)


class TestRelativePositionBias:
    def reference(self, table, height, width):
        """(heads, N, N) by loops over queries and keys; table (2 * height - 1, 2 * width - 1, heads)."""
        cells = [(y, x) for y in range(height) for x in range(width)]
        rows = [[table[qy - ky + height - 1, qx - kx + width - 1] for ky, kx in cells] for qy, qx in cells]
        return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)

    def test_a_bias_depends_on_query_minus_key(self):
        bias = RelativePositionBias((3, 4), heads=2)
        table = bias.table.detach().reshape(5, 7, 2)
        assert torch.equal(bias(3, 4)[0], self.reference(table, 3, 4))

    def test_other_grids_get_the_table_resized(self):
        bias = RelativePositionBias(4, heads=2)
        table = bias.table.detach().reshape(7, 7, 2).permute(2, 0, 1)
        for size in [(2, 6), (5, 3), (1, 1)]:
            resized = F.interpolate(table[None], size=[2 * side - 1 for side in size], mode="bicubic")[0]
            expected = self.reference(resized.permute(1, 2, 0), *size)
            torch.testing.assert_close(bias(*size)[0], expected, atol=1e-6, rtol=0)

    def test_a_table_in_the_order_of_tensorflow_is_turned_round(self):
        bias = RelativePositionBias(3, heads=2)
        table = torch.randn(2, 5, 5)
        bias.table.data = bias.fit(table)
        assert torch.equal(bias(3, 3)[0, :, 0, 4], table[:, 2 + 1, 2 + 1])  # the key is one cell down and right

    def test_a_table_of_another_window_is_resized(self):
        assert torch.equal(RelativePositionBias(3, heads=2).fit(table := torch.randn(25, 2)), table)
        assert RelativePositionBias(3, heads=2).fit(torch.randn(49, 2)).shape == (25, 2)
        with pytest.raises(InputError, match="35 relative positions"):
            RelativePositionBias(3, heads=2).fit(torch.randn(35, 2))


class TestDistanceBias:
    def test_a_bias_depends_on_distance_alone(self):
        bias = DistanceBias((3, 4), heads=2)
        nn.init.normal_(bias.table)
        table = bias.table.detach().reshape(2, 3, 4)
        cells = [(y, x) for y in range(3) for x in range(4)]
        rows = [[table[:, abs(qy - ky), abs(qx - kx)] for ky, kx in cells] for qy, qx in cells]
        assert torch.equal(bias(3, 4)[0], torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1))

    def test_on_other_grids_it_stays_symmetric_and_distance_zero_stays_where_it_is(self):
        bias = DistanceBias(4, heads=2)
        nn.init.normal_(bias.table)
        for size in [(2, 6), (5, 3), (1, 1)]:
            by_offset = bias.by_offset(*size)
            torch.testing.assert_close(by_offset, by_offset.flip(1).flip(2))
            torch.testing.assert_close(by_offset, by_offset.flip(2))
            torch.testing.assert_close(by_offset[:, size[0] - 1, size[1] - 1], bias.table[:, 0])

    def test_a_table_of_another_grid_is_resized(self):
        bias = DistanceBias(3, heads=2)
        assert torch.equal(bias.fit(table := torch.randn(2, 9)), table)
        large = torch.randn(2, 25)
        assert bias.fit(large).shape == (2, 9)
        torch.testing.assert_close(bias.fit(large)[:, 0], large[:, 0])
        with pytest.raises(InputError, match="35 distances"):
            bias.fit(torch.randn(2, 35))


class TestLogPositionBias:
    def test_a_bias_is_the_mlp_of_the_logarithm_of_query_minus_key(self):
        bias = LogPositionBias(heads=3, hidden=16).eval()
        offset = torch.tensor([2.0, -3.0])  # from cell (0, 4) to cell (2, 1) of a grid of 3 x 5
        expected = bias.fc2(F.relu(bias.fc1(offset.sign() * (1 + offset.abs()).log())))
        torch.testing.assert_close(bias(3, 5)[0, :, 2 * 5 + 1, 4], expected)

    def test_biases_by_offset_do_not_depend_on_the_grid(self):
        bias = LogPositionBias(heads=2, hidden=8).eval()
        torch.testing.assert_close(bias.by_offset(5, 6)[:, 2:-2, 3:-3], bias.by_offset(3, 3))

    def test_it_drops_in_training_and_is_kept_for_inference_alone(self):
        bias = LogPositionBias(heads=2, hidden=8)
        with torch.no_grad():
            assert not torch.equal(bias(3, 3), bias(3, 3))
            before = bias.eval()(3, 3)
            bias.fc2.weight.data.add_(1)
            assert not torch.equal(bias(3, 3), before)
            fast = bias.prepare_for_inference()
            assert fast(3, 3) is fast(3, 3)


def test_an_exported_linear_layer_is_one_on_any_machine():
    fast = for_inference(nn.Sequential(nn.Linear(16, 4)))
    program = torch.export.export(fast, (torch.randn(1, 4096, 16),))
    operators = [node.target for node in program.graph.nodes]
    assert torch.ops.aten.linear.default in operators
    assert torch.ops.aten.conv2d.default not in operators


@pytest.mark.parametrize("layers", [Conv2dNormActivation(8, 8), Conv2dReLU(8, 8, 3, padding=1)], ids=type)
def test_norms_fold_in_sequences_of_other_libraries(layers, randomise):
    layers = randomise(nn.Sequential(layers))
    x = torch.randn(2, 8, 6, 7)
    fast = for_inference(layers)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())
    with torch.no_grad():
        torch.testing.assert_close(fast(x.clone()), layers(x), atol=1e-5, rtol=1e-5)


class TestMBConv:
    OPTIONS = (
        {},
        {"stride": 2},
        {"stride": 2, "stride_mode": "pool", "pool": "max"},
        {"stride": 2, "pre_act": True, "se_early": True, "bias": False},
        {"stride": 2, "same": True, "pool": "avg3", "act": "gelu_tanh"},
        {"expand_output": False, "se_ratio": 1 / 16, "act": "silu", "se_act": "relu", "pre_act": True},
        {"stride": 2, "stride_mode": "pool", "pre_act": True, "se_early": True, "act": "silu"},
    )

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)])
    def test_folding_norms_changes_nothing(self, options, size, randomise):
        block = randomise(MBConv(16, 24, **options))
        x = torch.randn(2, 16, *size).contiguous(memory_format=torch.channels_last)
        before, expected = x.clone(), block(x)
        stride = options.get("stride", 1)
        assert expected.shape == (2, 24, *(-(-side // stride) for side in size))
        with torch.no_grad():
            torch.testing.assert_close(for_inference(block)(x), expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(x, before)
            assert torch.equal(block(x), expected)

    def test_a_shortcut_of_equal_width_is_projected_only_if_asked_for(self):
        assert MBConv(16, 16, stride=2).shortcut is None
        assert MBConv(16, 16, stride=2, project=True).shortcut.weight.shape == (16, 16, 1, 1)

    def test_widths_follow_the_output_or_the_input(self):
        for expand_output, hidden, squeezed in ((True, 96, 6), (False, 64, 16)):
            block = MBConv(16, 24, expand_output=expand_output)
            assert block.depthwise.conv.out_channels == hidden
            assert block.se.fc1.out_channels == squeezed

    def test_squeeze_excitation_overwrites_only_for_inference(self):
        layer, x = SqueezeExcite(8, 2), torch.randn(2, 8, 5, 5)
        gate = layer.fc2(F.silu(layer.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        before = x.clone()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), before * gate)
            assert torch.equal(x, before)
            assert layer.prepare_for_inference()(x) is x
        torch.testing.assert_close(x, before * gate)


@pytest.mark.parametrize(
    ("how", "expected"), [("avg", [3, 4.5, 7.5, 9]), ("max", [5, 6, 8, 9]), ("avg3", [12 / 9, 16 / 9, 24 / 9, 28 / 9])]
)
def test_halving_rounds_up_and_counts_what_it_says(how, expected):
    x = torch.arange(1, 10.0).reshape(1, 1, 3, 3)  # nine cells: windows of 3 x 3 see four, and five outside
    assert halve(x, how).flatten().tolist() == pytest.approx(expected)


def test_pre_logits_are_norm_linear_and_tanh():
    layer, x = PreLogits(8), torch.randn(2, 8)
    torch.testing.assert_close(
        layer(x), F.linear(F.layer_norm(x, (8,), eps=1e-6), layer.fc.weight, layer.fc.bias).tanh()
    )


class TestTableCache:
    def test_computes_once_per_key(self):
        cache, calls = TableCache(), []

        def compute():
            calls.append(1)
            return torch.ones(3)

        first = cache.get((1, 2), compute)
        assert cache.get((1, 2), compute) is first
        assert cache.get((3, 4), compute) is not first
        assert len(calls) == 2

    def test_serves_autograd_after_inference_mode(self):
        cache = TableCache()
        with torch.inference_mode():
            cache.get(1, lambda: torch.ones(3))
        (torch.ones(3, requires_grad=True) * cache.get(1, lambda: torch.ones(3))).sum().backward()

    def test_keeps_nothing_while_tracing_or_of_fake_tensors(self):
        cache, places = TableCache(), torch.zeros(1)
        torch.jit.trace(lambda x: x + cache.get(1, lambda: torch.ones(3)), places, check_trace=False)
        with FakeTensorMode():
            cache.get(1, lambda: torch.ones(3))
        assert cache._tables == {}

    def test_a_huge_table_is_not_kept(self):
        cache = TableCache(largest=5)
        assert cache.get(1, lambda: torch.ones(6)) is not cache.get(1, lambda: torch.ones(6))

    def test_keeps_few_entries_and_copies_none(self):
        cache = TableCache(entries=2)
        for size in range(5):
            cache.get(size, lambda: torch.ones(3))
        assert len(cache._tables) == 2
        assert copy.deepcopy(cache)._tables == pickle.loads(pickle.dumps(cache))._tables == {}

    def test_threads_may_share_it(self):
        cache = TableCache(entries=2)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: cache.get(i % 5, lambda: torch.full((2,), i % 5))[0].item(), range(2000)))
        assert found == [i % 5 for i in range(2000)]
