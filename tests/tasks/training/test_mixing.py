"""mixup and CutMix: timm's own images from the same draws, for labels and for masks."""

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch.nn import functional as F

from backbones.errors import InputError
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.losses import SegmentationLoss
from backbones_tasks.training.mixing import make_mixup, mix_labels, mix_masks, mixed_loss
from backbones_tasks.training.segmentation import SegmentationTask

CLASSES = 5
CASES = [(0.8, 0.0, 1.0, 0.5), (0.0, 1.0, 1.0, 0.5), (0.8, 1.0, 0.7, 0.3)]


def options(mixup, cutmix, prob=1.0, switch=0.5, smoothing=0.0):
    chances = {"mixup_prob": prob, "mixup_switch_prob": switch}
    return {"mixup": mixup, "cutmix": cutmix, **chances, "label_smoothing": smoothing}


def batch(count=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 16, 20, generator=draw)
    masks = torch.randint(CLASSES, (count, 16, 20), generator=draw)
    masks[:, :2] = 255
    return images, masks


def timms(case, seed, images, labels):
    """What timm makes of a batch by the draws that ours are to make at a torch seed."""
    torch.manual_seed(seed)
    np.random.seed(torch.randint(2**31, ()).item())  # noqa: NPY002
    mixup, cutmix, prob, switch = case
    return Mixup(mixup, cutmix, prob=prob, switch_prob=switch, label_smoothing=0.1, num_classes=CLASSES)(
        images.clone(), labels
    )


@pytest.mark.parametrize("case", CASES)
def test_images_are_timms_and_masks_follow_them(case):
    """Of cross-entropy, the loss is that of the soft mask, which is mixed as timm mixes images."""
    images, masks = batch()
    loss, kinds = SegmentationLoss("ce"), set()
    for seed in range(12):
        ours = make_mixup(options(*case, smoothing=0.1), CLASSES)
        expected, _ = timms(case, seed, images, masks[:, 0, 0] % CLASSES)
        torch.manual_seed(seed)
        mixed, told = mix_masks(ours, images, masks)
        assert torch.equal(mixed, expected)
        # the masks as images of one channel per class, and one of what counts
        layers = F.one_hot(masks.clamp(max=CLASSES), CLASSES + 1).movedim(-1, 1).float()
        soft, _ = timms(case, seed, layers, masks[:, 0, 0] % CLASSES)
        found = sum(
            share * F.one_hot(mask.clamp(max=CLASSES), CLASSES + 1).movedim(-1, 1).float() for share, mask in told
        )
        assert torch.allclose(found, soft, atol=1e-6)
        logits = torch.randn(4, CLASSES, 16, 20)
        by_soft = -(soft[:, :CLASSES] * logits.log_softmax(1)).sum() / soft[:, :CLASSES].sum()
        assert torch.allclose(mixed_loss(loss, logits, told), by_soft, rtol=1e-4)
        kinds.add("mixup" if len(told) == 2 else "none" if torch.equal(mixed, images) else "cutmix")
    assert kinds == {"mixup"} if not case[1] else {"cutmix"} if not case[0] else {"mixup", "cutmix", "none"}


def test_labels_are_timms_and_the_last_of_an_odd_batch_stays_as_it_is():
    case = CASES[2]
    images, _ = batch()
    labels = torch.tensor([0, 1, 2, 3])
    ours = make_mixup(options(*case, smoothing=0.1), CLASSES)
    for seed in range(4):
        expected = timms(case, seed, images, labels)
        torch.manual_seed(seed)
        assert all(map(torch.equal, mix_labels(ours, images, labels), expected))
        torch.manual_seed(seed)
        mixed, soft = mix_labels(ours, torch.cat([images, images[:1]]), torch.tensor([0, 1, 2, 3, 4]))
        assert torch.equal(mixed[:4], expected[0])
        assert torch.equal(mixed[4], images[0])
        assert soft[4].tolist() == pytest.approx([0.02, 0.02, 0.02, 0.02, 0.92])
    for count in (3, 1):
        images, masks = batch(count)
        if count > 1:
            mixed, told = mix_masks(ours, images, masks)
            assert torch.equal(mixed[2], images[2])
            assert all(torch.equal(mask[2], masks[2]) for _, mask in told)
        else:
            with pytest.raises(InputError, match="batch_size of 2 or more"):
                mix_masks(ours, images, masks)


@pytest.mark.parametrize("loss", ["ce", "ohem+0.5*dice", "focal+lovasz"])
def test_a_segmenter_trains_on_mixed_images_by_every_loss(loss):
    torch.manual_seed(0)
    narrow = {"decoder_options": {"decoder_channels": 8}, "num_classes": CLASSES}
    task = SegmentationTask("timm/test_resnet", loss=loss, aux=True, mixup=0.8, cutmix=1.0, **narrow).train()
    task.log = lambda *_, **__: None
    for _ in range(4):
        images, masks = batch()
        total = task.training_step((F.interpolate(images, (32, 40)), masks.repeat(1, 2, 2)), 0)
        total.backward()
        assert total.isfinite()


def test_the_chances_are_the_tasks_options():
    for task in (ClassificationTask, SegmentationTask):
        made = task(
            "timm/test_resnet", num_classes=CLASSES, mixup=0.2, cutmix=1.0, mixup_prob=0.3, mixup_switch_prob=0.9
        )
        assert (made.mix.mix_prob, made.mix.switch_prob) == (0.3, 0.9)
        assert task("timm/test_resnet", num_classes=CLASSES).mix is None
