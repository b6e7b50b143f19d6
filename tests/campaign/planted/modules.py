"""Faults of a module among others: state, copies, hooks, parameters that are written, and programs made of it."""

import torch
from torch import nn

from . import planted
from .sound import Block, Sound

# --- state ----------------------------------------------------------------------------------------------------


@planted(
    "what decides the maps is not saved", "state_dict", "with the loaded state gives another map 0.*persistent buffers"
)
class StateLost(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward_features(self, images):
        if self.training:
            self.seen += 1
        return [m + self.seen for m in super().forward_features(images)]


@planted(
    "state_dict() has other keys", "state_dict", "whose keys .*encoder.* are no names of its .*belong into key_layouts"
)
class WrongKey(Sound):
    def state_dict(self, *args, **options):
        return {f"encoder.{name}": value for name, value in super().state_dict(*args, **options).items()}


@planted("a parameter is made by the first call", "state_dict", "the first call changes the keys of the state: scale")
class MadeByCall(Sound):
    def forward_features(self, images):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(()))
        return super().forward_features(images)


@planted("a copy refers to the original", "copies", "a deepcopy gives other maps.*refers to the original")
class RefersToOriginal(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.norms = [self.stem[1]]

    def __deepcopy__(self, memo):
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_parameters"})
        return other


@planted("it cannot be pickled", "copies", "a pickle raises .*keep no lambda")
class HoldsLambda(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.activation = lambda x: x.relu()


@planted("parameters are channels-last", "contiguous", "are not contiguous: stages.0.*out of the constructor")
class ChannelsLastParameters(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.to(memory_format=torch.channels_last)


# --- calls ----------------------------------------------------------------------------------------------------


@planted(
    "a weight is used without its layer",
    "every_module_is_called",
    "in training mode, 1 of 15 .*stem.0.*call the module",
)
class WeightWithoutCall(Sound):
    def forward_features(self, images):
        conv, norm = self.stem
        x = norm(nn.functional.conv2d(images, conv.weight, conv.bias, conv.stride))
        return [x := stage(x) for stage in self.stages]


@planted(
    "a layer is called in training alone", "every_module_is_called", "in eval mode, 1 of 15 .*stem.1.*call the module"
)
class CallsInTrainingAlone(Sound):
    def forward_features(self, images):
        conv, norm = self.stem
        x = conv(images)
        if self.training:
            x = norm(x)
        else:
            statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            x = nn.functional.batch_norm(x, *statistics, eps=norm.eps)
        return [x := stage(x) for stage in self.stages]


@planted("what a hook saw is overwritten", "hooks", r"eval mode under no_grad.*blocks.0.norm.*ReLU\(\) without inplace")
class Overwrites(Sound):
    class block(Block):
        def update(self, x):
            return self.norm(self.conv(x)).relu_()


@planted(
    "what a hook saw is overwritten without gradients", "hooks", "under no_grad.*overwritten later: stages.0.*x [+] y"
)
class OverwritesWithoutGradients(Sound):
    def forward_features(self, images):
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            x = x.mul(2) if torch.is_grad_enabled() else x.mul_(2)
            maps.append(x)
        return maps


class Folding(nn.Module):
    """Keeps weights with the norm folded in, by the version counters of what they are made of."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        conv, norm = self.conv, self.norm
        if self.training or torch.is_grad_enabled():
            return norm(conv(x))
        made_of = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        versions = [(id(t), t._version) for t in made_of]
        if vars(self).get("versions") != versions:
            self.versions, scale = versions, norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = conv.weight * scale[:, None, None, None]
            self.folded = weight, (conv.bias - norm.running_mean) * scale + norm.bias
        conv(x[..., : conv.stride[0], : conv.stride[1]]), norm(x.new_zeros(1, len(norm.weight), 1, 1))  # seen by hooks
        return nn.functional.conv2d(x, *self.folded, conv.stride)


@planted(
    "folded weights are kept by version", "written_parameters", r"after p.data.mul_\(\).*those of a fresh model.*\.data"
)
class Folds(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.stem = Folding(*self.stem)


@planted(
    "a norm's attribute is read",
    "frozen_norms",
    "'_Frozen' object has no attribute 'eps'.*What was promised: Batch norms",
)
class ReadsTheNorm(Sound):
    def forward_features(self, images):
        x = self.stem(images) * (1 + 0 * self.stem[1].eps)
        return [x := stage(x) for stage in self.stages]


class FoldsTheOriginal(nn.Sequential):
    def __deepcopy__(self, memo):
        return self

    def prepare_for_inference(self):
        self[0].weight.data.mul_(2)
        return self


@planted(
    "for_inference changes the original",
    "for_inference",
    "changed the model that it was given: its mode, stem.0.weight",
)
class ChangesOriginal(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.stem = FoldsTheOriginal(*self.stem)


# --- programs -------------------------------------------------------------------------------------------------


@planted("calls are counted", "trace", "gives another graph the second time.*leave something behind")
class CountsCalls(Sound):
    def forward_features(self, images):
        self.calls = vars(self).get("calls", 0) + 1
        maps = super().forward_features(images)
        return [m + 0 for m in maps] if self.calls > 1 else maps


@planted("a value decides what is computed", "export", "GuardOnDataDependentSymNode|data-dependent|Could not guard")
class DecidesByValue(Sound):
    def forward_features(self, images):
        maps = super().forward_features(images)
        return [m * 2 for m in maps] if images.abs().max() > 3 else maps


@planted("a size is a Python constant", "export", "onstraint|specialized|constant")
class ConstantSize(Sound):
    def forward_features(self, images):
        maps = super().forward_features(images)
        return [m / SIZES.setdefault(tuple(m.shape[2:]), m.shape[2] * m.shape[3]) for m in maps]


SIZES = {}
