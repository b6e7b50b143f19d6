"""Faults of what is drawn at random, and of what a model changes for the whole program."""

import random
import warnings

import numpy as np
import torch
from timm.layers import DropPath
from torch import nn

from . import planted
from .sound import Block, Sound, blocks_of


@planted("a seed is set in every call", "random_numbers", "in eval mode changes the random numbers of torch")
class SetsSeed(Sound):
    def forward_features(self, images):
        torch.manual_seed(0)
        return super().forward_features(images)


@planted("a seed is set in training", "random_numbers", "random numbers of torch go on alike whatever the seed was")
class SetsSeedInTraining(Sound):
    def forward_features(self, images):
        if self.training:
            torch.manual_seed(0)
        return super().forward_features(images)


@planted("numpy's seed is set in training", "random_numbers", "random numbers of numpy go on alike")
class SetsSeedOfNumpy(Sound):
    def forward_features(self, images):
        if self.training:
            np.random.seed(0)  # noqa: NPY002
        return super().forward_features(images)


@planted("random numbers are drawn in eval mode", "random_numbers", "in eval mode changes the random numbers of Python")
class DrawsInEval(Sound):
    def forward_features(self, images):
        random.random()
        return super().forward_features(images)


@planted(
    "there is dropout with all rates 0", "rates_of_zero", r"two calls in training mode .*stages.0.blocks.0.dropout"
)
class DropoutUnasked(Sound):
    class block(Block):
        def __init__(self, dim, rate):
            super().__init__(dim, rate)
            self.dropout = nn.Dropout(0.1)

        def update(self, x):
            return self.dropout(super().update(x))


@planted("drop_path_rate is ignored", "drop_path", "drop_path_rate=0.3 changes nothing in training mode.*or refuse")
class DropPathIgnored(Sound):
    def rates(self, depths):
        return [[0.0] * depth for depth in depths]


@planted("drop_path_rate is doubled", "drop_path", "at .*0.6.*more than asked for.*Backbone.drop_path_rates")
class DropPathDoubled(Sound):
    class block(Block):
        def make_drop_path(self, rate):
            return DropPath(2 * rate)


@planted("branches are dropped twice", "drop_path", "4 branches are dropped twice in a row, which keeps 0.49 of them")
class DropPathTwice(Sound):
    class block(Block):
        def update(self, x):
            return self.drop_path(super().update(x))


@planted("drop_path_rate is the same at every depth", "drop_path", "which is the same at every depth")
class DropPathConstant(Sound):
    def rates(self, depths):
        return [[self.drop_path_rate] * depth for depth in depths]


@planted("a drop path of its own is the same at every depth", "drop_path", "which is the same at every depth")
class OwnDropPathConstant(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        for block in blocks_of(self):
            block.rate = self.drop_path_rate

    class block(Block):
        make_drop_path = None

        def __init__(self, dim, rate):
            nn.Module.__init__(self)
            self.conv, self.norm = nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim)

        def forward(self, x):
            if not self.training or not self.rate:
                return x + self.update(x)
            keep = 1 - self.rate
            return x + self.update(x) / keep * (keep + torch.rand(len(x), 1, 1, 1, device=x.device)).floor_()


@planted("drop_path_rate falls with depth", "drop_path", "which does not ascend")
class DropPathFalls(Sound):
    def rates(self, depths):
        return [rates[::-1] for rates in self.drop_path_rates(depths)[::-1]]


@planted("drop_path_rate is halved", "drop_path", "and none at the rate asked for")
class DropPathHalved(Sound):
    class block(Block):
        def make_drop_path(self, rate):
            return DropPath(0.4 * rate)


@planted("drop path goes on in eval mode", "drop_path", "two calls in eval mode differ.*self.training")
class DropPathInEval(Sound):
    def forward_features(self, images):
        return [m * (torch.rand(len(m), 1, 1, 1) >= self.drop_path_rate) for m in super().forward_features(images)]


@planted("drop path depends on what is pruned", "drop_path", r"with out_indices=\(0, 1\) drop path rates change from")
class DropPathOfPart(Sound):
    def rates(self, depths):
        count = self.out_indices[-1] + 1
        return self.drop_path_rates(depths[:count])


@planted("building it silences warnings", "side_effects", "building it changes the filters of warnings for the whole")
class SilencesWarnings(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        warnings.simplefilter("ignore", category=ResourceWarning)


@planted(
    "calling it turns gradients off", "side_effects", "a call in eval mode changes torch's default dtype or grad mode"
)
class TurnsGradientsOff(Sound):
    def forward_features(self, images):
        torch.set_grad_enabled(self.training)
        return super().forward_features(images)
