"""How detectors bring images to a size, however long and narrow they are."""

from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class Resizing(GeneralizedRCNNTransform):
    """torchvision's, where no side is ever less than a pixel: of 2000 x 1 pixels, its own would leave none.

    Without `min_size`, images stay at their own size.
    """

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if not self.min_size:
            return image, target
        if self.training or self.fixed_size is not None or torch.compiler.is_compiling() or torchvision._is_tracing():
            return super().resize(image, target)
        sides = image.shape[-2:]
        scale = min(self.min_size[-1] / min(sides), self.max_size / max(sides))
        if min(sides) * scale >= 1:
            return super().resize(image, target)
        height, width = (max(1, int(side * scale)) for side in sides)
        self.fixed_size = (width, height)
        try:
            return super().resize(image, target)
        finally:
            self.fixed_size = None


def resizing(like: GeneralizedRCNNTransform) -> Resizing:
    """The same as a transform of torchvision's."""
    own = (like.min_size, like.max_size, like.image_mean, like.image_std, like.size_divisible, like.fixed_size)
    return Resizing(*own, _skip_resize=like._skip_resize)
