"""Faults of what comes out: maps, their shapes, and classifiers."""

import torch
from torch import nn

from backbones import Backbone

from . import planted
from .sound import Sound


@planted("no Backbone is built", "builds", "is a Sequential.*backbones.wrap")
def module_alone(**options):
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4))


@planted("the constructor fails", "builds", r"in __init__: self.head = nn.Linear\(8, .ten.\)")
class ConstructorFails(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.head = nn.Linear(8, "ten")


@planted("a stage does not halve its map", "shapes", "map 1 of images .* is not stride 8; declare the strides")
class WrongStride(Sound):
    def stage(self, in_dim, dim, rates):
        stage = super().stage(in_dim, dim, rates)
        stage.down = nn.Conv2d(in_dim, dim, 1) if dim == 12 else stage.down
        return stage


@planted("channels are not those declared", "shapes", "has 12 channels, and 24 are declared; correct `channels`")
class WrongChannels(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.feature_info.info[1]["num_chs"] = 24


@planted("maps are NHWC", "shapes", r"has its channels last; return them first, as m.permute\(0, 3, 1, 2\)")
class ChannelsLast(Sound):
    def forward_features(self, images):
        return [m.permute(0, 2, 3, 1) for m in super().forward_features(images)]


@planted("maps are NHWC, by a forward of its own", "shapes", r"channels first, as m.permute\(0, 3, 1, 2\)")
class ChannelsLastForward(Sound):
    def forward(self, images):
        return [m.permute(0, 2, 3, 1) for m in super().forward(images)]


@planted("maps are tokens", "shapes", "is a sequence of tokens; return maps as .*unflatten")
class Tokens(Sound):
    def forward_features(self, images):
        return [m.flatten(2).mT for m in super().forward_features(images)]


@planted("maps come coarse first", "shapes", "is what is declared for map 2; return maps finest first")
class CoarseFirst(Sound):
    def forward_features(self, images):
        return super().forward_features(images)[::-1]


@planted("one tensor is returned", "shapes", "returned one tensor .*; return a list of maps")
class OneTensor(Sound):
    def forward_features(self, images):
        return super().forward_features(images)[0]


@planted("a map is missing", "shapes", "returned 2 maps, and map 2 was asked for; return one per stride")
class OneMissing(Sound):
    def forward_features(self, images):
        return super().forward_features(images)[:2]


@planted("height and width are exchanged", "shapes", "has height and width exchanged; look for a reshape")
class Transposed(Sound):
    def forward_features(self, images):
        return [m.mT for m in super().forward_features(images)]


@planted("sizes are rounded down", "any_size", "is not stride 4; .* or pad what a stage cannot divide")
class Floor(Sound):
    size_divisor = 1


@planted("one size alone is taken", "any_size", r"RuntimeError: .*in forward_features: x = x \+ self.positions")
class OneSize(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.positions = nn.Parameter(torch.zeros(1, 8, 112, 112))

    def forward_features(self, images):
        x = self.stem(images)
        x = x + self.positions
        return [x := stage(x) for stage in self.stages]


@planted("one pixel gives NaN", "any_size", "1 x 1 give values that are not finite.*unbiased variance")
class UnbiasedVariance(Sound):
    size_divisor = 4

    def __init__(self, dims=(8, 12), depths=(1, 2), **options):
        Backbone.__init__(self, channels=dims, strides=(4, 8), **options)
        self.stem = nn.Conv2d(self.in_chans, dims[0], 4, 4)
        self.stages = nn.ModuleList(self.wanted(nn.Conv2d(*w, 3, s, 1) for *w, s in ((8, 8, 1), (8, 12, 2))))

    def forward_features(self, images):
        return [m / m.std((2, 3), keepdim=True) for m in super().forward_features(images)]


@planted("out_indices are ignored", "feature_info", "with out_indices=.*pass out_indices on to Backbone.__init__")
class IgnoresOutIndices(Sound):
    def __init__(self, out_indices=None, **options):
        super().__init__(**options)


@planted("stages that nobody needs are built", "out_indices", "no fewer parameters are built.*Backbone.wanted")
class BuildsAll(Sound):
    def wanted(self, stages):
        return stages


@planted("parts are named by their place in the list", "out_indices", "name parts by their index in the full pyramid")
class NamedByPlace(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.last = f"last_norm_{len(self.out_indices)}"
        self.add_module(self.last, nn.BatchNorm2d(self.out_channels[-1]))

    def forward_features(self, images):
        *maps, last = super().forward_features(images)
        return [*maps, self.get_submodule(self.last)(last)]


@planted("in_chans is ignored", "in_chans", "What was promised: Images with other than three channels")
class ThreeChannels(Sound):
    def __init__(self, in_chans=3, **options):
        super().__init__(in_chans=in_chans, **options)
        self.stem[0] = nn.Conv2d(3, 8, 2, 2)


@planted("output_strides are claimed and not kept", "output_strides", "claims 8, and .* dilate in place of striding")
class ClaimsStrides(Sound):
    output_strides = (32, 8)


@planted("output_stride is told and not handed on", "output_strides", "output_stride=8 strides are told as")
class StridesNotHandedOn(Sound):
    output_strides = (32, 8)

    def __init__(self, output_stride=32, **options):
        super().__init__(**options)


@planted(
    "global_pools are claimed and not kept", "global_pools", r"claims 'max', and .*features are those of \['avg'\]"
)
class ClaimsPools(Sound):
    global_pools = ("avg", "max")

    def forward_head(self, features, pre_logits=False):
        x = features.mean((2, 3))
        return x if pre_logits else self.head(x)


@planted("reset_classifier forgets how to pool", "global_pools", r"differ from those after reset_classifier\(3, 'max'")
class ForgetsPool(Sound):
    global_pools = ("avg", "max")

    def __init__(self, **options):
        super().__init__(**options)
        self.pools_by = self.global_pool

    def forward_head(self, features, pre_logits=False):
        x = features.amax((2, 3)) if self.pools_by == "max" else features.mean((2, 3))
        return x if pre_logits else self.head(x)


@planted("reset_classifier does nothing", "classifier", r"after reset_classifier\(3\), logits are \(2, 7\)")
class KeepsClassifier(Sound):
    def reset_classifier(self, num_classes, global_pool=None):
        pass


@planted("the forward does more than its halves", "classifier", r"forward_head\(forward_features\(x\)\) differs")
class MoreThanItsHalves(Sound):
    def forward(self, images):
        maps = super().forward(images)
        return maps if self.features_only else maps * 2
