"""Strong augmentation: torchvision's own images, and masks and boxes that follow; copy-paste."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from backbones_tasks.data.detection import DetectionData
from backbones_tasks.data.folders import DataError
from backbones_tasks.data.objects import detection_augmentation, paste
from backbones_tasks.data.segmentation import SegmentationData, ShapesOptions, augmentation
from backbones_tasks.data.strong import Erasing, RandAugment, Strong, TrivialAugment

FILL = [10, 20, 30]
FILLS = {tv_tensors.Image: FILL, tv_tensors.Mask: 255, "others": None}
SHAPES = ShapesOptions(size=48, train=6, val=2)


def scene(seed=0, size=48):
    """An image whose pixels tell their own class: black ground, and two objects of one colour each."""
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, 6:20, 8:18] = 1
    masks[1, 22:40, 20:44] = 1
    image = masks[0] * 100 + masks[1] * 200
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]), format="XYXY", canvas_size=(size, size)
        ),
        "labels": torch.tensor([1, 2]),
        "area": masks.sum((1, 2)).float(),
        "iscrowd": torch.zeros(2, dtype=torch.int64),
        "masks": tv_tensors.Mask(masks),
    }
    return tv_tensors.Image(image.expand(3, -1, -1).clone()), target


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda o: RandAugment(2, 9, **o), lambda o: v2.RandAugment(2, 9, **o)),
        (lambda o: TrivialAugment(**o), lambda o: v2.TrivialAugmentWide(**o)),
    ],
)
def test_images_are_torchvisions_by_the_same_draws(ours, theirs):
    image = tv_tensors.Image(torch.randint(256, (3, 24, 32), dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.zeros(24, 32, dtype=torch.uint8))
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs({"fill": FILL})(image)
        torch.manual_seed(seed)
        found, _ = ours({"fill": FILLS})(image, mask)
        assert torch.equal(found, expected)
        torch.manual_seed(seed)
        assert torch.equal(ours({"fill": FILLS})(image), expected)


@pytest.mark.parametrize("move", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_masks_and_boxes_follow_every_change_of_geometry(move, monkeypatch):
    space = {move: v2.RandAugment._AUGMENTATION_SPACE[move]}
    monkeypatch.setattr(RandAugment, "_AUGMENTATION_SPACE", space)
    image, target = scene()
    for seed in range(6):
        torch.manual_seed(seed)
        moved, followed = RandAugment(2, 12, fill=FILLS)(image, target)
        assert not torch.equal(moved, image)
        for colour, mask, box in zip((100, 200), followed["masks"], followed["boxes"], strict=True):
            shown = (moved[0] == colour) & (moved[1] == colour)
            assert torch.equal(shown, mask == 1), "nearest pixels of image and mask alike"
            tight = masks_to_boxes(shown[None])[0] + torch.tensor([0, 0, 1, 1])
            assert (box[:2] <= tight[:2] + 1.5).all()
            assert (box[2:] >= tight[2:] - 1.5).all(), "the box holds the object"
            assert box.min() >= 0
            assert box.max() <= 48
        outside = (moved == torch.tensor(FILL)[:, None, None]).all(0)
        assert (followed["masks"][:, outside] == 255).all()


def test_what_is_erased_is_lost_to_masks_and_boxes():
    image, target = scene()
    both = torch.ones(48, 48, dtype=torch.uint8)
    erasing, seen = Erasing(1.0, FILL, 255), set()
    for seed in range(60):
        torch.manual_seed(seed)
        erased, mask, left = erasing(image, tv_tensors.Mask(both), target)
        painted = (erased == torch.tensor(FILL)[:, None, None]).all(0)
        assert painted.any()
        assert torch.equal(mask == 255, painted)
        for was, box, full in zip(target["boxes"], left["boxes"], target["masks"].bool(), strict=True):
            rest = full & ~painted
            if not rest.any():
                assert ((box[2:] - box[:2]) <= 0).any(), "nothing is left"
                seen.add("gone")
                continue
            tight = masks_to_boxes(rest[None])[0] + torch.tensor([0, 0, 1, 1])
            assert torch.equal(torch.as_tensor(box), tight.float()), "boxes of full rectangles are cut exactly"
            seen.add("cut" if not torch.equal(box, was) else "whole")
    assert seen == {"gone", "cut", "whole"}


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_a_detectors_boxes_stay_tight_around_what_is_seen(policy):
    image, target = scene()
    strong = Strong(policy, operations=3, magnitude=15, erasing=0.5)
    augment = detection_augmentation(48, (0.5, 2.0), 0.5, 0.0, strong=strong)
    objects = []
    for seed in range(40):
        torch.manual_seed(seed)
        found, told = augment(image, target)
        assert found.shape == (3, 48, 48)
        count = len(told["labels"])
        assert [len(told[name]) for name in ("boxes", "masks", "area", "iscrowd")] == [count] * 4
        for box, mask in zip(told["boxes"], told["masks"], strict=True):
            tight = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
            assert (box[:2] >= tight[:2]).all()
            assert (box[2:] <= tight[2:]).all(), "no box is larger than its mask"
            assert (box[2:] - box[:2] >= 1).all()
        objects.append(count)
    assert {0, 1, 2} >= set(objects) >= {1, 2}, "objects that leave the image are dropped"


def test_a_segmenters_pixels_without_an_image_do_not_count():
    image, target = scene()
    mask = tv_tensors.Mask((target["masks"] * torch.tensor([1, 2], dtype=torch.uint8)[:, None, None]).sum(0))
    augment = augmentation(48, (1.0, 1.0), 0.0, 0.0, 255, strong=Strong("randaugment", 2, 20, erasing=1.0))
    ignored = []
    for seed in range(10):
        torch.manual_seed(seed)
        _, told = augment(image, mask)
        assert set(told.unique().tolist()) <= {0, 1, 2, 255}
        ignored.append((told == 255).float().mean().item())
    assert min(ignored) > 0
    assert max(ignored) > 0.1


@pytest.mark.parametrize("data", [SegmentationData, DetectionData])
def test_shapes_are_augmented_in_training_alone_by_seed_epoch_and_index(data):
    options = {"auto_augment": "trivialaugment", "random_erasing": 0.5}
    plain, strong, again = (data(shapes=SHAPES, **more) for more in ({}, options, options))
    for each in (plain, strong, again):
        each.setup("fit")

    def images(module, split, key):
        return module.datasets[split][key][0]

    for i in range(6):
        assert torch.equal(images(strong, "train", (1, i)), images(again, "train", (1, i)))
    assert sum(torch.equal(images(strong, "train", (1, i)), images(plain, "train", (1, i))) for i in range(6)) < 4
    assert torch.equal(images(strong, "val", 0), images(plain, "val", 0))


@pytest.mark.parametrize(
    "options", [{"random_erasing": 1.5}, {"ra_magnitude": 31}, {"auto_augment": "randaugment", "range": "uint16"}]
)
@pytest.mark.parametrize("data", [SegmentationData, DetectionData])
def test_what_cannot_be_is_refused(data, options, tmp_path):
    with pytest.raises(DataError):
        data(root=str(tmp_path), **options) if "range" in options else data(**options)


# Copy-paste


def test_pasted_objects_cover_what_is_below():
    image, target = scene()
    other, objects = v2.RandomHorizontalFlip(1.0)(*scene())
    other = tv_tensors.wrap(other // 2, like=other)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = torch.randint(2, (2,)).unique()
        torch.manual_seed(seed)
        found, told = paste(image, target, other, objects)
        pasted = objects["masks"][chosen]
        covered = pasted.amax(0) > 0
        assert torch.equal(found[0], torch.where(covered, other[0], image[0]))
        below = target["masks"] * ~covered
        kept = below.amax((1, 2)) > 0
        assert torch.equal(torch.as_tensor(told["masks"]), torch.cat([below[kept], pasted]))
        assert torch.equal(told["labels"], torch.cat([target["labels"][kept], objects["labels"][chosen]]))
        tight = masks_to_boxes(told["masks"]) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(torch.as_tensor(told["boxes"]), tight.float())
        seen.add((int(kept.sum()), len(chosen)))
    assert len(seen) > 1
    none = {name: value[:0] if torch.is_tensor(value) else value for name, value in objects.items()}
    assert paste(image, target, other, none)[0] is image


@pytest.mark.parametrize("masks", [False, True])
def test_copy_paste_adds_objects_in_training_alone(masks):
    plain, pasting = (DetectionData(shapes=SHAPES, masks=True, copy_paste=p) for p in (0.0, 1.0))
    pasting.masks = masks
    for each in (plain, pasting):
        each.setup("fit")
    more = 0
    for i in range(6):
        image, target = pasting.datasets["train"][(0, i)]
        assert ("masks" in target) == masks
        again, _ = pasting.datasets["train"][(0, i)]
        assert torch.equal(image, again), "by seed, epoch and index alone"
        more += len(target["labels"]) - len(plain.datasets["train"][(0, i)][1]["labels"])
        if masks:
            assert torch.equal(target["area"], target["masks"].sum((1, 2)).float())
    assert more > 0
    assert torch.equal(pasting.datasets["val"][0][0], plain.datasets["val"][0][0])
    assert "masks" not in pasting.datasets["val"][0][1] or masks
    with pytest.raises(DataError, match="give crop_size"):
        DetectionData(copy_paste=0.5, crop_size=None)


def test_large_scale_jitter_is_torchvisions():
    """At [0.1, 2], as its reference scripts have it: the image resized by as much, then cut or padded."""
    image = tv_tensors.Image(torch.randint(256, (3, 60, 80), dtype=torch.uint8))
    _, target = scene(size=48)
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(60, 80))
    target = {**{k: v for k, v in target.items() if k != "masks"}, "boxes": boxes}
    ours = detection_augmentation(64, (0.1, 2.0), 0.0, 0.0)
    sizes = []
    for seed in range(8):
        torch.manual_seed(seed)
        resized, moved = v2.ScaleJitter((64, 64), (0.1, 2.0))(image, target)
        torch.manual_seed(seed)
        found, told = ours(image, target)
        assert found.shape == (3, 64, 64)
        sizes.append(resized.shape[-1])
        if max(resized.shape) <= 64:  # padded, nothing is cut
            widths = [boxes[:, 2] - boxes[:, 0] for boxes in (told["boxes"], moved["boxes"])]
            assert np.allclose(widths[0], widths[1][widths[1] >= 1][: len(widths[0])], atol=1e-3)
    assert min(sizes) < 32 < 64 < max(sizes)
