"""Levels of exact strides from maps of any stride."""

import math

import pytest
import torch

from backbones import InputError, Pyramid

STRIDES = (4, 8, 16, 32)


@pytest.mark.parametrize("stride", [4, 8, 14, 16, 32])
@pytest.mark.parametrize("halve", [True, False])
def test_levels_have_declared_widths_and_exact_strides(stride, halve):
    pyramid = Pyramid(16, stride, STRIDES, halve)
    height, width = 5, 7
    levels = pyramid([torch.randn(2, 16, height, width)] * 4)
    for level, channels, out in zip(levels, Pyramid.channels(16, stride, STRIDES, halve), STRIDES, strict=True):
        assert level.shape == (2, channels, math.ceil(height * stride / out), math.ceil(width * stride / out))


def test_simple_pyramid_halves_the_width_with_each_up_sampling():
    assert Pyramid.channels(768, 16, STRIDES) == (192, 384, 768, 768)
    assert Pyramid.channels(768, 32, STRIDES) == (96, 192, 384, 768)
    assert Pyramid.channels(768, 16, STRIDES, halve=False) == (768,) * 4


def test_the_level_of_the_maps_own_stride_is_the_map():
    x = torch.randn(1, 16, 3, 3)
    assert torch.equal(Pyramid(16, 16, (16,))([x])[0], x)


def test_max_pooling_keeps_the_last_cell_of_an_odd_side():
    x = torch.full((1, 4, 3, 3), -5.0)
    x[..., 2, 2] = -1.0
    (level,) = Pyramid(4, 16, (32,))([x])
    assert level.shape == (1, 4, 2, 2)
    assert level[0, 0].tolist() == [[-5.0, -5.0], [-5.0, -1.0]]


def test_one_map_serves_all_levels_and_a_wrong_number_is_told():
    pyramid, x = Pyramid(16, 16, STRIDES).eval(), torch.randn(1, 16, 3, 5)
    for a, b in zip(pyramid(x), pyramid([x] * 4), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match=r"strides \(4, 8, 16, 32\) takes a map for each, or a tensor for all; got 3"):
        pyramid([x] * 3)
