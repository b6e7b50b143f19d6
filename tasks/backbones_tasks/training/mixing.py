"""timm's mixup and CutMix of a batch, with soft labels of images and with masks."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from backbones.errors import InputError


def make_mixup(options: Mapping[str, Any], num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix by a task's options `mixup`, `cutmix`, `mixup_prob` and `mixup_switch_prob`."""
    alphas = options["mixup"], options["cutmix"]
    if not any(alphas):
        return None
    chances = {"prob": options["mixup_prob"], "switch_prob": options["mixup_switch_prob"]}
    return Mixup(*alphas, **chances, label_smoothing=options.get("label_smoothing", 0.0), num_classes=num_classes)


def mix_labels(mixup: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images of a batch mixed with each other, and soft labels (B, classes); of an odd number, the last one is not."""
    even = _begin(images)
    mixed, soft = mixup(images[:even].clone(), labels[:even])
    if even < len(images):
        rest = mixup_target(labels[even:], mixup.num_classes, 1.0, mixup.label_smoothing)
        mixed, soft = torch.cat([mixed, images[even:]]), torch.cat([soft, rest])
    return mixed, soft


def mix_masks(mixup: Mixup, images: Tensor, masks: Tensor) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """Images (B, C, H, W) of a batch mixed with each other as `mix_labels` does, and their masks with a share each.

    What CutMix pastes brings its mask along. Of two images that mixup lays over each other, both masks hold, each with
    its share: the loss is the mean of the losses by them, which for cross-entropy is that of the soft mask.
    """
    even = _begin(images)
    half = even // 2
    mark = images.new_zeros(even, 1, *images.shape[2:])  # mixed with the images, it tells how: no draw is done twice
    mark[:half] = 1
    mixed, _ = mixup(torch.cat([images[:even], mark], 1), masks.new_zeros(even))
    images = torch.cat([mixed[:, :-1], images[even:]])
    kept = mixed[0, -1]  # the share (H, W) of the first image in itself, which all have
    partners = torch.cat([masks[:even].flip(0), masks[even:]])
    if bool(((kept == 0) | (kept == 1)).all()):
        return images, [(1.0, torch.where(kept == 1, masks, partners))]
    share = float(kept[0, 0])
    return images, [(share, masks), (1 - share, partners)]


def mixed_loss(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, masks: list[tuple[float, Tensor]]) -> Tensor:
    """The loss of logits by several masks, each with its share."""
    total: Any = sum(share * loss(logits, mask) for share, mask in masks)
    return total


def _begin(images: Tensor) -> int:
    """Have timm, which draws from numpy's generator, draw by torch's; returns how many images have a partner."""
    if len(images) < 2:
        raise InputError("model.mixup and model.cutmix mix the images of a batch: give a batch_size of 2 or more")
    np.random.seed(torch.randint(2**31, ()).item())  # noqa: NPY002  (timm draws from the global generator)
    return len(images) // 2 * 2
