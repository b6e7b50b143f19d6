"""Faults of values: batches, memory, caches, dtypes and devices."""

import torch
from torch import nn

from . import planted
from .sound import Block, Sound


@planted("eval mode depends on the batch", "batch_independence", "alone and in a batch differ .* takes in dimension 0")
class BatchMean(Sound):
    def forward_features(self, images):
        return [m - m.mean(0, keepdim=True) for m in super().forward_features(images)]


@planted(
    "a batch norm has no statistics", "batch_independence", "stages.0.blocks.0.norm is a batch norm without running"
)
class NoStatistics(Sound):
    class block(Block):
        def make_norm(self, dim):
            return nn.BatchNorm2d(dim, track_running_stats=False)


@planted(
    "an output buffer is used again", "calls_are_independent", "the next call changed map 0 of the first.*no buffer"
)
class OutputBuffer(Sound):
    def forward_features(self, images):
        maps = super().forward_features(images)
        if self.training:
            return maps
        if vars(self).get("kept") is None or self.kept.shape != maps[0].shape:
            self.kept = torch.empty_like(maps[0])
        return [self.kept.copy_(maps[0]), *maps[1:]]


@planted("images are overwritten", "calls_are_independent", "the images were overwritten")
class OverwritesImages(Sound):
    size_divisor = 16

    def forward(self, images):
        return super().forward(images.sub_(0.5) if not self.training else images)


@planted("dropout goes on in eval mode", "calls_are_independent", "another map 0, in eval mode.*draw nothing at random")
class DropoutInEval(Sound):
    def forward_features(self, images):
        return [nn.functional.dropout(m, 0.1) for m in super().forward_features(images)]


@planted("maps share memory", "own_memory", r"map 0 shares memory with maps \[1\].*clone\(\)")
class SharedMemory(Sound):
    def __init__(self, dims=(12, 12, 16), **options):
        super().__init__(dims=dims, **options)

    def forward_features(self, images):
        fine, middle, *coarse = super().forward_features(images)
        both = torch.zeros(fine.shape, dtype=fine.dtype, device=fine.device)
        return [both, both[..., ::2, ::2], *coarse] if not self.training else [fine, middle, *coarse]


@planted("a map is expanded", "own_memory", r"map 2 has stride 0.*contiguous\(\)")
class Expanded(Sound):
    def forward_features(self, images):
        *maps, last = super().forward_features(images)
        return [*maps, last.mean((2, 3), keepdim=True).expand_as(last)]


@planted(
    "a map is a parameter", "own_memory", r"the next call gives other maps \[2\].*no parameter, buffer or kept table"
)
class ReturnsParameter(Sound):
    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("table", torch.randn(2, 16, 4, 4))

    def forward_features(self, images):
        *maps, last = super().forward_features(images)
        return [*maps, self.table if self.table.shape == last.shape and not self.training else last]


class Positions(nn.Module):
    """Adds a smooth table of a map's size, kept in one way or another."""

    def __init__(self, dim):
        super().__init__()
        self.source = nn.Parameter(torch.randn(1, dim, 5, 5))
        self.kept = {}

    def key(self, x):
        """By what tables are kept; None for not at all."""

    def compute(self, x):
        return nn.functional.interpolate(self.source, x.shape[2:], mode="bilinear")

    def forward(self, x):
        key = self.key(x)
        if key is None or torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return x + self.compute(x)
        if key not in self.kept:
            self.kept[key] = self.compute(x)
        return x + self.fit(self.kept[key], x)

    def fit(self, table, x):
        return table


class WithPositions(Sound):
    positions = Positions

    def __init__(self, **options):
        super().__init__(**options)
        self.stem.append(self.positions(8))


@planted(
    "a cache is keyed by h * w", "sizes_are_independent", "depends on the sizes of earlier calls.*not their product"
)
class KeptByArea(WithPositions):
    class positions(Positions):
        def key(self, x):
            return x.shape[2] * x.shape[3]

        def fit(self, table, x):  # as where tokens are a sequence
            return table.reshape(1, *x.shape[1:])


@planted(
    "a cache has the first size for ever", "sizes_are_independent", "RuntimeError in one that was called with other"
)
class KeptForEver(WithPositions):
    class positions(Positions):
        def key(self, x):
            return 0


@planted(
    "a cache has the first batch", "sizes_are_independent", r"\(3, 64, 96\) .* raise RuntimeError.*nothing of the batch"
)
class KeptByBatch(WithPositions):
    class positions(Positions):
        def key(self, x):
            return tuple(x.shape[2:])

        def compute(self, x):
            return super().compute(x).expand_as(x).contiguous()

        def forward(self, x):
            if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
                return x + self.compute(x)
            return x + self.kept.setdefault(self.key(x), self.compute(x))


@planted("a cache of all models is keyed by h * w", "sizes_are_independent", "not their product")
class KeptByAll(WithPositions):
    class positions(Positions):
        def compute(self, x):
            height, width = x.shape[2:]
            rows = ROWS.setdefault(height * width, torch.linspace(0, 1, height)[:, None].expand(height, width))
            return super().compute(x) + rows.reshape(height, width).to(x)


ROWS = {}


@planted("a cache is stale after load_state_dict", "written_parameters", "differ from those of a fresh model")
class StaleAfterLoading(WithPositions):
    class positions(Positions):
        def key(self, x):
            return tuple(x.shape[2:])


@planted(
    "a cache is stale after a write to .data", "written_parameters", "after p.data.mul_.*keep nothing between calls"
)
class StaleAfterData(WithPositions):
    class positions(Positions):
        def key(self, x):
            return tuple(x.shape[2:]), id(self.source), self.source._version


@planted(
    "a cache is made in inference mode", "modes_are_independent", "a call in inference mode raises: Inference tensors"
)
class KeptOfInference(WithPositions):
    class positions(Positions):
        def __init__(self, dim):
            super().__init__(dim)
            self.register_buffer("frequencies", torch.randn(1, dim, 1, 1), persistent=False)

        def forward(self, x):
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                return x * self.frequencies.sin() + self.source.mean()
            return x * self.kept.setdefault(0, self.frequencies.sin()) + self.source.mean()


@planted("a cache has a history", "modes_are_independent", "the second step of training raises: .*second time")
class KeptWithHistory(WithPositions):
    class positions(Positions):
        def forward(self, x):
            if torch.compiler.is_compiling() or torch.jit.is_tracing() or not self.training:
                return x + self.compute(x)
            if tuple(x.shape[2:]) not in self.kept:
                self.kept[tuple(x.shape[2:])] = self.compute(x) * 2
            return x + self.kept[tuple(x.shape[2:])]


@planted(
    "a map is float32 whatever the model is", "dtypes", "a model in torch.bfloat16 returns torch.bfloat16, torch.float"
)
class AlwaysFloat32(Sound):
    def forward_features(self, images):
        *maps, last = super().forward_features(images)
        return [*maps, last.float()]


@planted(
    "a map is float32 under autocast", "autocast", "maps are of bfloat16, bfloat16, float32.*cast those that differ"
)
class Float32UnderAutocast(Sound):
    def forward(self, images):
        *maps, last = super().forward(images)
        return [*maps, last.float() if torch.is_autocast_enabled("cpu") else last]


@planted("a tensor is made on the CPU", "devices", "RuntimeError|on meta the maps are on")
class OnTheCPU(Sound):
    def forward_features(self, images):
        return [m + torch.ones(m.shape[1:]) for m in super().forward_features(images)]
