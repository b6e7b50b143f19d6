"""Faults of training: gradients, freezing, layers, checkpointing, and what a step leaves in memory."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import planted
from .sound import Block, Sound

# --- what learns ----------------------------------------------------------------------------------------------


@planted(
    "a parameter is never used", "gradients", "2 of 32 parameters get no gradient: left_over.bias, left_over.weight"
)
class UnusedParameter(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.left_over = nn.Linear(3, 3)


@planted(
    "the stem is frozen by the constructor", "gradients", "built with requires_grad=False: stem.*let frozen_stages"
)
class FrozenStem(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.stem.requires_grad_(False)


@planted("gradients are cut off", "gradients", "4 of 30 parameters get no gradient: stem")
class Detached(Sound):
    def forward_features(self, images):
        x = self.stem(images).detach()
        return [x := stage(x) for stage in self.stages]


@planted(
    "statistics of what is frozen move", "frozen_stages", "stem.1.num_batches_tracked.*override train.. only to extend"
)
class FrozenMoves(Sound):
    def train(self, mode=True):
        nn.Module.train(self, mode)
        return self


@planted("norm_eval is not handed on", "norm_eval", "norm_eval=True, and .*override train.. only to extend")
class IgnoresNormEval(Sound):
    def __init__(self, norm_eval=False, **options):
        super().__init__(**options)


class OwnNorm(nn.Module):
    """A batch norm that is no subclass of torch's, and calls its statistics as it likes."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("square", torch.ones(dim))

    def forward(self, x):
        mean, square = self.mean, self.square
        if self.training:
            mean, square = x.mean((0, 2, 3)), x.square().mean((0, 2, 3))
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.square.lerp_(square, 0.1)
        scale = self.weight * (square - mean.square() + 1e-3).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class WithOwnNorm(Sound):
    class block(Block):
        make_norm = OwnNorm


@planted(
    "an own batch norm does not know norm_eval", "norm_eval", "let OwnNorm, which is not known for a batch norm, be a"
)
class OwnNormInEval(WithOwnNorm):
    pass


@planted(
    "an own batch norm counts twice in checkpoints", "checkpointing", "let OwnNorm call its statistics running_mean"
)
class OwnNormInCheckpoints(WithOwnNorm):
    pass


@planted(
    "freezable() leaves a stage out", "freezable", "leaves out 10 parameters, .*stages.1.*then one entry per stage"
)
class FreezableLeavesOut(Sound):
    def freezable(self):
        stem, first, _, *others = super().freezable()
        return [stem, first, *others]


@planted("freezable() leaves the last stage out", "freezable", "leaves out .* parameters, .*stages.2")
class FreezableLeavesLastOut(Sound):
    def freezable(self):
        return super().freezable()[:-1]


@planted("freezable() has stages in the wrong order", "freezable", r"entry 2 of freezable\(\) runs before entry 1")
class FreezableInDisorder(Sound):
    def freezable(self):
        stem, *stages = super().freezable()
        return [stem, *stages[::-1]]


@planted(
    "group_matcher() leaves a stage out",
    "layer_decay",
    r"group_matcher\(\) matches 10 parameters in no layer.*stages.1",
)
class MatcherLeavesOut(Sound):
    def group_matcher(self, coarse=False):
        return {"stem": r"^stem", "blocks": [(r"^stages\.([02])\.blocks\.(\d+)", None), (r"^stages\.([02])", None)]}


@planted(
    "group_matcher() has stages in the wrong order", "layer_decay", r"has layers \(.*\) in entry \d of freezable\(\)"
)
class MatcherInDisorder(Sound):
    def group_matcher(self, coarse=False):
        first, *others = (rf"^stages\.{i}" for i in (2, 1, 0))
        return {"stem": r"^stem", "a": first, "b": others[0], "c": others[1]}


@planted("group_matcher() has one layer for all", "layer_decay", "there are 1 lr scales in all")
class OneLayer(Sound):
    def group_matcher(self, coarse=False):
        return {"all": r".*"}


@planted("no_weight_decay() leads nowhere", "no_weight_decay", r"names table, .* give full names, such as stem.table")
class DecayLeadsNowhere(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.stem.register_parameter("table", nn.Parameter(torch.zeros(1, 8, 1, 1)))

    def no_weight_decay(self):
        return {"table"}


# --- memory ---------------------------------------------------------------------------------------------------


@planted(
    "checkpointing is ignored", "checkpointing", "KB are kept for the backward pass, and .* KB without.*layers.Blocks"
)
class IgnoresCheckpointing(Sound):
    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable


@planted(
    "checkpointing cannot be turned off", "checkpointing", r"after set_grad_checkpointing\(False\), .* KB are kept"
)
class KeepsCheckpointing(Sound):
    def set_grad_checkpointing(self, enable=True):
        super().set_grad_checkpointing(enable or self.checkpointing)


@planted("checkpoints count twice in batch norms", "checkpointing", "num_batches_tracked.*backbones.layers.Blocks or")
class CountsTwice(Sound):
    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable

    def _run(self, stage, x):
        if not (self.checkpointing and self.training):
            return stage(x)
        return checkpoint(stage, x, use_reentrant=False)


@planted("checkpoints draw anew", "checkpointing", "the gradient of .* differs.*preserve_rng_state=True")
class DrawsAnew(CountsTwice):
    class block(Block):
        def make_norm(self, dim):
            return nn.GroupNorm(1, dim)

    def _run(self, stage, x):
        if not (self.checkpointing and self.training):
            return stage(x)
        return checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)


@planted(
    "the first checkpoint gets no gradient", "checkpointing", "there is no gradient of stages.0.*use_reentrant=False"
)
class Reentrant(CountsTwice):
    def forward_features(self, images):
        x = images
        maps = []
        for i, stage in enumerate(self.stages):
            whole = nn.Sequential(self.stem, stage) if i == 0 else stage
            again = self.checkpointing and self.training
            x = checkpoint(whole, x, use_reentrant=i == 0) if again else whole(x)
            maps.append(x)
        return maps


@planted("an activation is kept", "nothing_is_kept", "in stages.0.blocks.0.last, .*hand it on as an argument")
class KeepsActivation(Sound):
    class block(Block):
        def update(self, x):
            self.last = super().update(x)
            return self.last


@planted(
    "activations are kept in a list of the module's file", "nothing_is_kept", "KB, are still in memory, outside of"
)
class KeepsInList(Sound):
    def forward_features(self, images):
        maps = super().forward_features(images)
        if self.training:
            SEEN[:] = [*SEEN, maps[0].detach().clone()][-100:]
        return maps


SEEN = []
