"""What does not fit: weights that would be ignored, parameters that would stay as they are, and what would help."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from .layouts import Recognised
from .report import LoadReport, Shape

if TYPE_CHECKING:
    from ..backbone import Backbone

# Buffers that models compute for themselves, and what only pre-training has a use for.
_COMPUTED = re.compile(
    r"(?:^|[._])(?:relative_position_index|attn_mask|relative_coords_table|num_batches_tracked|mask_token|bias_mask)$"
)
# Parts of detectors, segmenters and pre-training that stand beside a backbone's own without a prefix, and those of
# classifiers, which are another classifier's where the model is one.
_AROUND = re.compile(
    r"^(?:\w+_)?(?:neck|decoder\w*|decode_head|projector|predictor|proj_head|fpn|rpn\w*|roi_heads?|bbox_head|"
    r"mask_head|criterion|loss\w*|dino_head|ibot_head|logit_scale)(?=[._]|$)"
)
_CLASSIFIER = re.compile(r"^(?:heads?|classifier|fc|norm|fc_norm|pre_logits)\.")
_STAGE = re.compile(r"^stages\.(\d+)\.")
_BUFFERS = re.compile(r"\.running_(?:mean|var)$")

# What holds for every architecture: pattern of our names, what it is, what takes it.
_REMEDIES = (
    (r"^(?:out_norms|stage_norms)\.", "norms of the maps", "build with out_norm=True"),
    (r"^pyramid\.", "of a pyramid", "build with the pyramid and the out_indices that it was trained with"),
    (r"relative_position|rel_pos", "relative positions", "that is another architecture, or another variant of it"),
    (r"\.[qk]_norm\.", "norms of queries and keys", "that is a variant with qk-norm"),
    (r"\.(?:ls\d?|layer_scale\w*)\.|gamma(?:_\d)?$", "layer scales", "that is a variant with layer scale"),
    (r"reg(?:ister)?_tokens?$|storage_tokens$", "register tokens", "that is a variant with register tokens"),
)


def is_new(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of a model's parts that published weights do not hold."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


@dataclass
class Misfits:
    """Names, with shapes, that would be ignored, resp. stay as they are, for no good reason.

    Args:
        ignored: what the checkpoint has and the model lacks.
        mismatched: what both have in shapes that do not go into each other.
        missing: what the model has and the checkpoint lacks.
        why: sentences that group them, each with what would help.
    """

    ignored: dict[str, Shape] = field(default_factory=dict)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    missing: dict[str, Shape] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.ignored or self.mismatched or self.missing)

    def __str__(self) -> str:
        return "".join(f"\n- {sentence}" for sentence in self.why)

    @classmethod
    def find(cls, model: "Backbone", found: Recognised, own: Mapping[str, Tensor], report: LoadReport) -> "Misfits":
        """What of a report is not as it should be."""
        extra = {name: shape for name, shape in report.unexpected.items() if name in found.state}
        extra = {name: shape for name, shape in extra.items() if not _COMPUTED.search(name)}
        extra = {name: shape for name, shape in extra.items() if not _left_over(name, model)}
        whole = set(own)
        if extra:
            whole = model.whole_names()
            # The norm behind the last map, of releases whose classifiers have it there.
            norms = {name for name in extra if name.startswith(("out_norms.", "stage_norms."))}
            whole |= norms if len({name.rpartition(".")[0] for name in norms}) == 1 else set()
            extra = {name: shape for name, shape in extra.items() if name not in whole}
        parameters = dict(model.named_parameters())
        missing = {n: s for n, s in report.missing.items() if n in parameters or _BUFFERS.search(n)}
        loaded = {name.rpartition(".")[0] for name in report.loaded}
        optional = {  # a new part is loaded whole or not at all
            name
            for name in (*missing, *report.mismatched)
            if is_new(name, model.new_parts) and ("." not in name or name.rpartition(".")[0] not in loaded)
        }
        misfits = cls(
            ignored=extra,
            mismatched={name: shapes for name, shapes in report.mismatched.items() if name not in optional},
            missing={name: shape for name, shape in missing.items() if name not in optional},
        )
        misfits.why = [*_why(misfits, model, whole, found.state, report.notes)]
        return misfits


def _left_over(name: str, model: "Backbone") -> bool:
    if model.features_only and _CLASSIFIER.search(name):
        return True
    stage = _STAGE.match(name)
    if stage and not hasattr(model, "spec"):  # whose whole cannot be built
        return len(model.stages) <= int(stage[1]) < len(model.feature_info.info)
    return is_new(name, model.left_out) or _AROUND.search(name) is not None


def _why(
    misfits: Misfits, model: "Backbone", own: Iterable[str], theirs: Iterable[str], notes: Mapping[str, str]
) -> Iterator[str]:
    for names, others, fate, variant, known in (
        (misfits.ignored, own, "would be ignored", "deeper", (*model.remedies, *_REMEDIES)),
        (misfits.missing, theirs, "would stay as they are, because the checkpoint lacks them", "shallower", ()),
    ):
        beyond, rest = _by_depth(names, others)
        for blocks, (first, last, count) in beyond.items():
            span = f"{blocks} {first} to {last}" if last > first else f"{blocks} {first}"
            yield f"{count} tensors of {span} {fate}: the checkpoint is of a {variant} variant"
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name in rest:
            found = ((what, remedy) for pattern, what, remedy in known if re.search(pattern, name))
            groups[next(found, ("tensors", ""))].append(name)
        for (what, remedy), members in groups.items():
            some = ", ".join(members[:3]) + (", ..." if len(members) > 3 else "")
            yield f"{len(members)} {what} ({some}) {fate}" + (f": {remedy}" if remedy else "")
    for name, (given, wanted) in list(misfits.mismatched.items())[:5]:
        if name in notes:
            yield notes[name]
        elif len(given) == len(wanted) == 4 and (given[0], *given[2:]) == (wanted[0], *wanted[2:]):
            remedy = f": build with in_chans={given[1]}" if wanted[1] == model.in_chans else ""
            yield f"{name} takes {given[1]} channels, and the model's {wanted[1]}{remedy}"
        else:
            sizes = ["x".join(map(str, shape)) or "scalar" for shape in (given, wanted)]
            yield f"{name} is {sizes[0]}, and the model's {sizes[1]}"
    if len(misfits.mismatched) > 5:
        yield f"{len(misfits.mismatched) - 5} more are of other shapes than the model's"


def _by_depth(names: Iterable[str], others: Iterable[str]) -> tuple[dict[str, tuple[int, int, int]], list[str]]:
    """Names in blocks past the last one that others have: of each list first, last, count; and the rest."""
    last: dict[str, int] = {}
    for path, index in (place for name in others for place in _places(name)):
        last[path] = max(last.get(path, -1), index)
    beyond: dict[str, tuple[int, int, int]] = {}
    rest = []
    for name in names:
        for path, index in _places(name):
            if index > last.get(path, index):
                first, final, count = beyond.get(path, (index, index, 0))
                beyond[path] = min(first, index), max(final, index), count + 1
                break
        else:
            rest.append(name)
    return beyond, rest


def _places(name: str) -> list[tuple[str, int]]:
    """The lists of modules that a name goes through, and its index in each."""
    parts = name.split(".")
    return [(".".join(parts[:i]), int(part)) for i, part in enumerate(parts[:-1]) if part.isdigit()]
