"""Strong augmentation: RandAugment, TrivialAugment and random erasing, which masks and boxes follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from .folders import DataError

Policy = Literal["randaugment", "trivialaugment"]

_GEOMETRY = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}


@dataclass(frozen=True)
class Strong:
    """Options of strong augmentation.

    policy: "randaugment" draws `operations` of fourteen changes of geometry and colour, each at `magnitude` of 30;
    "trivialaugment" one, at a magnitude drawn as well. erasing: probability that a rectangle is painted over.
    photographs: whether images have three bands of 8 bits, which the policies are for.

    Raises:
        DataError: a number that cannot be, or a policy for other images
    """

    policy: Policy | None = None
    operations: int = 2
    magnitude: int = 9
    erasing: float = 0.0
    photographs: bool = True

    def __post_init__(self) -> None:
        if self.operations < 1 or not 0 <= self.magnitude <= 30:
            raise DataError(
                f"ra_operations={self.operations} must be at least 1, and ra_magnitude={self.magnitude} from 0 to 30"
            )
        if not 0 <= self.erasing <= 1:
            raise DataError(f"random_erasing={self.erasing} must be from 0 to 1")
        if self.policy and not self.photographs:
            raise DataError(
                f"auto_augment={self.policy} changes photographs of 8 bits; leave it out with range or bands"
            )

    def steps(self, fill: Sequence[float], mask_fill: int = 0) -> list[v2.Transform]:
        """The transforms, none if nothing is asked for.

        Args:
            fill: what images have where nothing is left
            mask_fill: what masks have there
        """
        steps: list[v2.Transform] = []
        fills = {tv_tensors.Image: list(fill), tv_tensors.Mask: mask_fill, "others": None}
        common = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": fills}
        if self.policy == "randaugment":
            steps.append(RandAugment(self.operations, self.magnitude, **common))
        elif self.policy == "trivialaugment":
            steps.append(TrivialAugment(**common))
        if self.erasing:
            steps.append(Erasing(self.erasing, fill, mask_fill))
        return steps


class _Followed:
    """One of torchvision's policies, by the same draws, whose changes of geometry masks and boxes follow.

    torchvision's refuse masks and boxes. Called with an image, or with it and its mask, or a dict with masks and boxes.
    """

    def forward(self, image: Any, *rest: Any) -> Any:
        self.moves: list[tuple[str, float]] = []
        image = super().forward(image)
        return (image, *(self._follow(each) for each in rest)) if rest else image

    def _apply_image_or_video_transform(self, image: Any, transform_id: str, magnitude: float, **options: Any) -> Any:
        if transform_id in _GEOMETRY:
            self.moves.append((transform_id, magnitude))
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, **options)

    def _follow(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._follow(each) for name, each in value.items()}
        if isinstance(value, tv_tensors.Mask | tv_tensors.BoundingBoxes):
            for move in self.moves:  # masks by the nearest pixel, whatever the interpolation
                value = super()._apply_image_or_video_transform(
                    value, *move, interpolation=self.interpolation, fill=self._fill
                )
        return value


class RandAugment(_Followed, v2.RandAugment):
    """RandAugment (https://arxiv.org/abs/1909.13719)."""


class TrivialAugment(_Followed, v2.TrivialAugmentWide):
    """TrivialAugment (https://arxiv.org/abs/2103.10158)."""


class Erasing(v2.RandomErasing):
    """torchvision's random erasing (https://arxiv.org/abs/1708.04896): what is painted over is lost to masks and boxes.

    Args:
        p: probability
        fill: of images
        mask_fill: of masks; boxes shrink to what is left beside the rectangle, to nothing under it
    """

    def __init__(self, p: float, fill: Sequence[float], mask_fill: int = 0):
        super().__init__(p, value=list(fill))
        self.mask_fill = mask_fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["v"] is None or not isinstance(inpt, tv_tensors.Mask | tv_tensors.BoundingBoxes):
            return super().transform(inpt, params)
        top, left, bottom, right = params["i"], params["j"], params["i"] + params["h"], params["j"] + params["w"]
        plain = inpt.as_subclass(torch.Tensor).clone()
        if isinstance(inpt, tv_tensors.Mask):
            plain[..., top:bottom, left:right] = self.mask_fill
        else:
            x0, y0, x1, y1 = plain.unbind(-1)
            across = (left <= x0) & (right >= x1)
            down = (top <= y0) & (bottom >= y1)
            plain = torch.stack(
                [
                    torch.where(down & (left <= x0), x0.clamp(min=right).minimum(x1), x0),
                    torch.where(across & (top <= y0), y0.clamp(min=bottom).minimum(y1), y0),
                    torch.where(down & (right >= x1), x1.clamp(max=left).maximum(x0), x1),
                    torch.where(across & (bottom >= y1), y1.clamp(max=top).maximum(y0), y1),
                ],
                dim=-1,
            )
        return tv_tensors.wrap(plain, like=inpt)
