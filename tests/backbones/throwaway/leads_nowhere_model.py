"""A module without the class that its plugin names."""

from torch import nn

from backbones import wrap


class Halves(nn.Module):
    def forward(self, images):
        return [images[:, :1, ::4, ::4].repeat(1, 8, 1, 1), images[:, :1, ::8, ::8].repeat(1, 16, 1, 1)]


def PresentNet(**options):
    return wrap(Halves(), channels=(8, 16), strides=(4, 8), **options)
