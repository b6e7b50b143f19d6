"""What becomes of objects, their boxes and masks, in augmented images: cut, dropped, pasted."""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.ops import box_area, masks_to_boxes
from torchvision.transforms import v2

from .loading import jitter
from .reading import Reading
from .strong import Strong

Target = dict[str, Any]


class CutBoxes(v2.Transform):
    """Shrink the boxes that a crop cut to what is left of their masks, where there are masks."""

    def forward(self, image: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
        if not len(target.get("masks", ())):
            return image, target
        boxes, masks = target["boxes"], target["masks"].as_subclass(torch.Tensor)
        seen = masks.amax((1, 2)) > 0
        tight = torch.zeros_like(boxes.as_subclass(torch.Tensor))  # of no size, where nothing is left
        tight[seen] = masks_to_boxes(masks[seen]) + tight.new_tensor([0, 0, 1, 1])
        cut = torch.cat([boxes[:, :2].maximum(tight[:, :2]), boxes[:, 2:].minimum(tight[:, 2:])], dim=1)
        return image, {**target, "boxes": tv_tensors.wrap(cut, like=boxes)}


def sanitize() -> v2.Transform:
    """Drop objects of which less than a pixel is left."""
    return v2.SanitizeBoundingBoxes(labels_getter=_per_object)


def detection_augmentation(
    crop_size: int | None,
    scale: tuple[float, float],
    flip: float,
    color_jitter: float,
    reading: Reading = Reading(),  # noqa: B008  (never changed)
    strong: Strong = Strong(),  # noqa: B008  (never changed)
) -> v2.Transform:
    """Large-scale jitter and crop (https://arxiv.org/abs/2012.07177), horizontal flip, colour jitter, and `strong`.

    At scale 1 an image just fits into the crop, which is padded where the image is smaller. Objects of which less
    than a pixel is left are dropped. Without `crop_size` images stay whole.
    """
    steps: list[v2.Transform] = []
    if crop_size is not None:
        steps += [
            v2.ScaleJitter((crop_size, crop_size), scale),
            v2.RandomCrop(crop_size, pad_if_needed=True, fill={tv_tensors.Image: reading.fill, tv_tensors.Mask: 0}),
            CutBoxes(),
        ]
    steps.append(v2.RandomHorizontalFlip(flip))
    steps += jitter(color_jitter, reading.channels)
    return v2.Compose([*steps, *strong_steps(strong, reading), sanitize()])


def strong_steps(strong: Strong, reading: Reading) -> list[v2.Transform]:
    """Strong augmentation of images with objects, whose boxes are then cut."""
    steps = strong.steps(reading.fill)
    return [*steps, CutBoxes()] if steps else []


def paste(image: torch.Tensor, target: Target, other: torch.Tensor, objects: Target) -> tuple[torch.Tensor, Target]:
    """Some objects of another image of the same size, with their masks, onto this one: simple copy-paste.

    Which of them is drawn as in torchvision's reference; what they cover is lost to the objects below, which are
    dropped where nothing is left (https://arxiv.org/abs/2012.07177).

    Args:
        image, target: an augmented image (C, H, W) and its objects, with masks
        other, objects: another
    """
    count = len(objects["labels"])
    if not count:
        return image, target
    chosen = torch.randint(count, (count,)).unique()
    pasted = objects["masks"].as_subclass(torch.Tensor)[chosen]
    covered = pasted.amax(0) > 0
    result = torch.where(covered, other.as_subclass(torch.Tensor), image.as_subclass(torch.Tensor))
    below = target["masks"].as_subclass(torch.Tensor) * ~covered
    together = {
        **target,
        "masks": tv_tensors.Mask(torch.cat([below, pasted])),
        "boxes": tv_tensors.wrap(torch.cat([target["boxes"], objects["boxes"][chosen]]), like=target["boxes"]),
        **{name: torch.cat([target[name], objects[name][chosen]]) for name in ("labels", "area", "iscrowd")},
    }
    return sanitize()(*CutBoxes()(tv_tensors.wrap(result, like=image), together))


def with_areas(target: Target) -> Target:
    """A target whose areas are those of its masks, or else of its boxes, as they are now."""
    masks = target.get("masks")
    # summing in float32 is exact, and fifteen times as fast as in int64
    pixels = box_area(target["boxes"]) if masks is None else masks.sum((1, 2), dtype=torch.float32)
    return {**target, "area": pixels}


def _per_object(inputs: tuple[Any, Target]) -> list[torch.Tensor]:
    return [inputs[1][name] for name in ("labels", "area", "iscrowd")]
