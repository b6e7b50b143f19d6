"""Losses of segmenters: weighted sums of several, in which ignored pixels change nothing."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss, LovaszLoss
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.errors import InputError

from ..options import nearest


class CrossEntropyLoss(nn.Module):
    """The mean over the pixels that count; zero where there is none.

    Args:
        ignore_index: value of pixels that do not count.
        class_weights: (classes,) weight of a pixel by its class; the mean is a weighted one.
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(self, ignore_index: int = 255, class_weights: Tensor | None = None, label_smoothing: float = 0.0):
        super().__init__()
        self.ignore_index, self.class_weights, self.label_smoothing = ignore_index, class_weights, label_smoothing

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        options = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        total = F.cross_entropy(logits, masks, _to(self.class_weights, logits), reduction="sum", **options)
        return total / _pixel_weights(masks, self.ignore_index, self.class_weights, logits).sum().clamp(min=_TINY)


class OHEMLoss(nn.Module):
    """Cross-entropy over the hard pixels alone: online hard example mining, as in HRNet's and mmsegmentation's.

    Args:
        ignore_index: value of pixels that do not count.
        class_weights: (classes,) weight of a pixel by its class; the mean is a weighted one.
        thresh: pixels whose true class has a probability under this are hard.
        min_kept: share of the pixels that count which are taken at least, the hardest ones.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        class_weights: Tensor | None = None,
        thresh: float = 0.7,
        min_kept: float = 0.0625,
    ):
        super().__init__()
        if not 0 < thresh <= 1 or not 0 < min_kept <= 1:
            raise InputError(f"ohem: thresh={thresh} and min_kept={min_kept} are shares, over 0 and up to 1")
        self.ignore_index, self.class_weights = ignore_index, class_weights
        self.thresh, self.min_kept = thresh, min_kept

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, masks, ignore_index=self.ignore_index, reduction="none")
        weights = _pixel_weights(masks, self.ignore_index, self.class_weights, logits)
        counted = losses.detach()[masks != self.ignore_index]
        if not len(counted):
            return losses.sum()  # zero, and still a function of the logits
        hardest = counted.topk(math.ceil(self.min_kept * len(counted)), sorted=False).values.min()
        weights = weights * (losses.detach() >= hardest.clamp(max=-math.log(self.thresh)))
        return (losses * weights).sum() / weights.sum().clamp(min=_TINY)


LOSSES: dict[str, type[nn.Module]] = {
    "ce": CrossEntropyLoss,
    "ohem": OHEMLoss,
    "dice": DiceLoss,
    "focal": FocalLoss,
    "lovasz": LovaszLoss,
}
_OURS = {"self", "mode", "ignore_index", "class_weights", "from_logits", "classes", "reduction"}
_TINY = 1e-12


class SegmentationLoss:
    """A weighted sum of losses.

    No module, for it has nothing that is learnt or saved.

    Args:
        terms: such as "ce", "ohem", "ce+dice" or "ce+0.5*lovasz"; the names are those of `LOSSES`.
        options: of the losses, by name, such as {"ohem": {"thresh": 0.9}}; those of dice, focal and lovasz are
            segmentation-models-pytorch's.
        ignore_index: value of pixels that do not count, and whose logits get no gradient.
        class_weights: one per class, for all but lovasz, which weighs classes equally by its nature.
        binary: logits are (0, x) for a single class: cross-entropy is then the sigmoid's, and dice is of that
            class alone.

    Raises:
        InputError: an unknown loss or option, or weights that none of the losses takes
    """

    def __init__(
        self,
        terms: str = "ce",
        options: Mapping[str, Mapping[str, Any]] | None = None,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        binary: bool = False,
    ):
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        options = dict(options or {})
        self.terms = []
        for factor, name in parse(terms):
            self.terms.append((factor, _build(name, options.pop(name, {}), ignore_index, weights, binary)))
        if options:
            raise InputError(f"loss_options are given for {', '.join(options)}, but the loss is {terms!r}")
        if weights is not None and all(isinstance(loss, LovaszLoss) for _, loss in self.terms):
            raise InputError(f"loss={terms!r} weighs classes equally by its nature: leave out class_weights")

    def __call__(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The loss of logits (B, classes, H, W) for masks (B, H, W); zero where no pixel counts."""
        logits = logits.float()  # sums over all pixels, which half precision cannot hold
        total: Any = 0
        for factor, loss in self.terms:
            # smp's means over no pixel at all are not numbers
            empty = isinstance(loss, (FocalLoss, LovaszLoss)) and not (masks != self.ignore_index).any()
            total = total + (logits.sum() * 0 if empty else factor * loss(logits, masks))
        return total


def parse(terms: str) -> list[tuple[float, str]]:
    """Factors and names of a sum: "ce+0.5*dice" is [(1.0, "ce"), (0.5, "dice")]."""
    found = []
    for term in terms.split("+"):
        match = re.fullmatch(r"\s*(?:(\d*\.?\d+)\s*\*)?\s*([a-z]+)\s*", term)
        if match is None:
            raise InputError(f"loss={terms!r}: {term!r} is no loss; write a sum such as 'ce' or 'ce+0.5*dice'")
        factor, name = match.groups()
        if name not in LOSSES:
            raise InputError(f"loss={terms!r}: unknown loss {name!r}; {nearest(name, LOSSES)}")
        if name in (other for _, other in found):
            raise InputError(f"loss={terms!r}: {name} is there twice; give it one factor")
        found.append((float(factor or 1), name))
    return found


def balanced_weights(pixels: Tensor) -> list[float]:
    """Weights by which all classes count equally, however many pixels (classes,) each has; 0 where it has none.

    As scikit-learn's "balanced": all pixels / (classes that there are * pixels of the class).
    """
    pixels = pixels.double()
    there = pixels > 0
    return torch.where(there, pixels.sum() / (there.sum() * pixels.clamp(min=1)), 0.0).tolist()


def _build(
    name: str, options: Mapping[str, Any], ignore_index: int, class_weights: Tensor | None, binary: bool
) -> nn.Module:
    kind = LOSSES[name]
    known = inspect.signature(kind.__init__).parameters.keys()
    for option in options:
        if option not in known - _OURS:
            raise InputError(f"loss {name!r} has no option {option!r}; {nearest(option, sorted(known - _OURS))}")
    given = {"ignore_index": ignore_index, "mode": "multiclass", "class_weights": class_weights}
    if binary and kind is DiceLoss:
        given["classes"] = [1]
    return kind(**{k: v for k, v in given.items() if k in known}, **options)


def _pixel_weights(masks: Tensor, ignore_index: int, class_weights: Tensor | None, like: Tensor) -> Tensor:
    """(B, H, W): the weight of each pixel's class, 1 without weights, and 0 where it is ignored."""
    counts = masks != ignore_index
    if class_weights is None:
        return counts.to(like.dtype)
    return _to(class_weights, like)[masks * counts] * counts


def _to(weights: Tensor | None, like: Tensor) -> Tensor | None:
    return None if weights is None else weights.to(like.device)
