"""The toolkit: what it computes is what torch computes, for less."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.errors import InputError
from backbones.layers import (
    Attention,
    Blocks,
    Linear,
    TableCache,
    attend,
    gelu,
    pad_to_multiple,
    residual,
    window_partition,
    window_unpartition,
)


@pytest.mark.parametrize("shape", [(2, 17, 24), (3, 24), (24,), (2, 5, 7, 24), (0, 4, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch_forward_and_backward(shape, bias):
    ours, theirs = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    theirs.load_state_dict(ours.state_dict())
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
    layer = Linear(8, 4)
    x = torch.randn(2, 8, 5).transpose(1, 2)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-5)


def test_linear_follows_autocast_and_dtype():
    layer = Linear(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 8).double()).dtype == torch.float64


def test_gelu_overwrites_only_what_autograd_does_not_need():
    x = torch.randn(4, 5)
    expected = F.gelu(x)
    needed = x.clone().requires_grad_()
    assert torch.equal(gelu(needed * 1), expected)
    with torch.no_grad():
        spare = x.clone()
        assert torch.equal(gelu(spare), expected)
        assert torch.equal(spare, expected)


def test_residual_leaves_its_input_and_keeps_the_wider_dtype():
    x, update = torch.randn(3, 4), torch.randn(3, 4)
    before, expected = x.clone(), x + update
    assert torch.equal(residual(x, update.clone()), expected)
    assert torch.equal(x, before)
    assert residual(x, update.bfloat16()).dtype == torch.float32


def test_attention_equals_the_formula():
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    heads = [t.reshape(2, -1, 2, 4).transpose(1, 2) for t in (q, k, v)]
    weights = (heads[0] @ heads[1].mT / 2).softmax(-1)
    torch.testing.assert_close(attend(q, k, v, heads=2), (weights @ heads[2]).transpose(1, 2).reshape(2, 5, 8))


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


def test_blocks_recompute_to_the_same_gradients():
    blocks = Blocks(*(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(3)))
    x = torch.randn(4, 6)
    gradients = []
    for blocks.checkpointing in (False, True):
        blocks.zero_grad()
        torch.manual_seed(0)
        blocks(x).sum().backward()
        gradients.append([p.grad.clone() for p in blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class TestTableCache:
    def test_computes_once_per_size_until_the_source_changes(self):
        cache, source, calls = TableCache(), nn.Parameter(torch.ones(3)), []

        def compute():
            calls.append(1)
            return source * 2

        with torch.no_grad():
            first = cache.get((1, 2), source, compute)
            assert cache.get((1, 2), source, compute) is first
            cache.get((3, 4), source, compute)
            assert len(calls) == 2
            source.add_(1)
            assert torch.equal(cache.get((1, 2), source, compute), torch.full((3,), 4.0))
            source.data = torch.zeros(3)
            assert torch.equal(cache.get((1, 2), source, compute), torch.zeros(3))

    def test_computes_anew_where_gradients_flow(self):
        cache, source = TableCache(), nn.Parameter(torch.ones(3))
        assert cache.get(1, source, lambda: source * 2).requires_grad

    def test_serves_autograd_after_inference_mode(self):
        cache, source = TableCache(), nn.Parameter(torch.ones(3))
        with torch.inference_mode():
            cache.get(1, source, lambda: source * 2)
        with torch.no_grad():
            assert not cache.get(1, source, lambda: source * 2).is_inference()

    def test_keeps_few_entries_and_copies_none(self):
        cache, source = TableCache(entries=2), torch.ones(3)
        with torch.no_grad():
            for size in range(5):
                cache.get(size, source, lambda: source * 2)
        assert len(cache._tables) == 2
        assert copy.deepcopy(cache)._tables == pickle.loads(pickle.dumps(cache))._tables == {}
