"""Key layouts: how one source names parameters, and under which layout and prefix a checkpoint fits a model."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import WeightsError

__all__ = ["KeyLayout", "Recognised", "recognise", "split_in_proj"]

#: What repositories call the copy of the weights that is averaged over training.
AVERAGED = re.compile(r"(?:^|[._])(?:\w+_)?(?:ema|teacher|averaged?|target|swa)(?=[._]|$)")


@dataclass(frozen=True)
class KeyLayout:
    """How one source names parameters: regular expressions that turn its names into ours, in turn.

    Names that turn into "" are left out: buffers that the model computes, such as tables of indices.
    What names alone cannot say, such as one tensor that is two of ours or rows in another order, is `prepare`'s:
    it is given the checkpoint under the source's names, and returns what `renames` are then applied to.
    """

    name: str
    renames: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors under our names; of two that get one name, the second keeps its own."""
        converted = {}
        for source, value in (self.prepare(state) if self.prepare else state).items():
            key = source
            for pattern, replacement in self.renames:
                key = re.sub(pattern, replacement, key)
            if key:
                converted[source if key in converted else key] = value
        return converted


def split_in_proj(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For `KeyLayout.prepare`: the `in_proj_*` of nn.MultiheadAttention as the `q.*` and `kv.*` that it stacks."""
    split = {}
    for key, value in state.items():
        owner, found, kind = key.rpartition("in_proj_")
        if not found or len(value) % 3:
            split[key] = value
            continue
        dim = len(value) // 3
        split[f"{owner}q.{kind}"], split[f"{owner}kv.{kind}"] = value[:dim], value[dim:]
    return split


@dataclass(frozen=True)
class Recognised:
    """A state dict under our names.

    Args:
        state: what stands under `prefix`, renamed.
        around: what stands beside it, under its own names.
        layout, prefix: under which it fits best.
        matched: how many names the model has, and how many of them with the same shape.
    """

    state: Mapping[str, Tensor]
    around: Mapping[str, Tensor]
    layout: str
    prefix: str
    matched: tuple[int, int]


def recognise(state: Mapping[str, Tensor], own: Mapping[str, Tensor], layouts: Sequence[KeyLayout]) -> Recognised:
    """The layout and the prefix (`backbone.`, `module.`, ...) under which most of a checkpoint fits a model.

    Of copies that fit as well under several prefixes, the one that is averaged over training.

    Raises:
        WeightsError: several copies fit as well, and nothing says which is meant.
    """
    prefixes = Counter({"": len(state)})
    for key in state:
        parts = key.split(".")
        prefixes.update(".".join(parts[:n]) + "." for n in range(1, min(len(parts), 6)))
    found: list[Recognised] = []
    for prefix, size in prefixes.most_common(32):
        if found and 2 * size < found[0].matched[0]:
            break  # too few to fit better, even if a layout splits them, as are all that follow
        inner = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        # `stages_0.` is `stages.0.` in what timm's features_only=True has saved
        unfolded = {re.sub(r"^([a-z_]+)_(\d+)\.", r"\1.\2.", k): v for k, v in inner.items()}
        spellings = [inner] if unfolded.keys() == inner.keys() else [inner, unfolded]
        tried = []
        for layout, spelling in itertools.product(layouts, spellings):
            converted = layout.convert(spelling)
            names = [name for name in converted if name in own]
            matched = len(names), sum(converted[name].shape == own[name].shape for name in names)
            tried.append(Recognised(converted, {}, layout.name, prefix, matched))
        best = max(tried, key=lambda each: each.matched)
        if not found or best.matched > found[0].matched:
            found = [best]
        elif best.matched == found[0].matched and best.prefix.startswith(found[0].prefix):
            found = [best]  # which leaves out what does not belong to the backbone
        elif best.matched == found[0].matched:
            found.append(best)
    best, *others = found
    averaged = [each for each in found if AVERAGED.search(each.prefix)]
    if others and 2 * best.matched[0] > len(own):
        if len(averaged) == 1:
            best = averaged[0]
        elif not all(_same(best, other) for other in others):
            fitting = ", ".join(repr(each.prefix) for each in found)
            raise WeightsError(
                f"it holds several sets of weights that fit, under {fitting}; pass the state dict of the one that is "
                "meant, without its prefix"
            )
    around = {k: v for k, v in state.items() if not k.startswith(best.prefix)}
    return Recognised(best.state, around, best.layout, best.prefix, best.matched)


def _same(one: Recognised, other: Recognised) -> bool:
    return one.state.keys() == other.state.keys() and all(
        value is other.state[key] or (value.shape == other.state[key].shape and value.equal(other.state[key]))
        for key, value in one.state.items()
    )
