"""Panoptic models: torchvision's interface, segments that cover each pixel once, stuff in one piece."""

import pytest
import torch
from small_heads import SMALL

from backbones.errors import InputError
from backbones_tasks import build_panoptic, from_pretrained
from backbones_tasks.models.hf_panoptic import merge

BACKBONE = "timm/test_resnet"


def panoptic(architecture="hf/mask2former", **options):
    given = {**SMALL[architecture], "min_size": 64, "max_size": 96, **options}
    return build_panoptic(architecture, backbone=BACKBONE, num_classes=5, things=3, **given)


def pair():
    """Two images of different sizes, each all sky and ground, the first with two things as well."""
    images = [torch.rand(3, 60, 82), torch.rand(3, 80, 51)]
    targets = []
    for image, things in zip(images, (2, 0), strict=True):
        height, width = image.shape[-2:]
        masks = torch.zeros(2 + things, height, width, dtype=torch.uint8)
        masks[0, : height // 2], masks[1, height // 2 :] = 1, 1
        for i in range(things):
            masks[2 + i, 10 * i : 10 * i + 8, 5:20] = 1
            masks[:2] *= 1 - masks[2 + i]
        targets.append({"masks": masks, "labels": torch.tensor([3, 4, 0, 0][: 2 + things])})
    return images, targets


@pytest.mark.parametrize("architecture", ["hf/mask2former", "hf/maskformer"])
def test_it_trains_and_predicts_on_images_of_two_sizes(architecture, tmp_path):
    model, (images, targets) = panoptic(architecture, score_thresh=0.0, overlap_thresh=0.0), pair()
    losses = model(images, targets)
    assert sum("_0" in name for name in losses) == 3
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    with torch.no_grad():
        found = model(images)
    for image, said in zip(images, found, strict=True):
        assert said["segments"].shape == image.shape[-2:]
        ids = set(said["segments"].unique().tolist()) - {0}
        assert ids == set(range(1, len(said["labels"]) + 1)), "each segment has a pixel at least"
        assert torch.equal(said["things"], said["labels"] < 3)
        stuff = said["labels"][~said["things"]]
        assert len(stuff.unique()) == len(stuff)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for a, b in zip(loaded(images), found, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


def test_masks_are_put_together_as_the_paper_says():
    """Written out pixel by pixel: two things, two pieces of one stuff, and a mask that has lost too much."""
    masks = torch.zeros(5, 4, 6)
    masks[0, :2, :2] = 0.9  # a thing
    masks[1, :2, 1:4] = 0.8  # another, of which the first takes a column: 2 of 6 pixels
    masks[2, 2:, :3] = 0.7  # stuff
    masks[3, 2:, 3:] = 0.7  # and more of it
    masks[4, 2:, :4] = 0.6  # nearly all of it is the stuff's
    scores, labels = torch.tensor([0.9, 0.9, 0.8, 0.8, 0.6]), torch.tensor([0, 0, 2, 2, 1])
    said = merge(masks, scores, labels, things=2, overlap_thresh=0.6)
    expected = torch.tensor([[1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 0, 0], [3] * 6, [3] * 6])
    assert torch.equal(said["segments"], expected)
    assert said["labels"].tolist() == [0, 0, 2]
    assert said["things"].tolist() == [True, True, False]
    strict = merge(masks, scores, labels, things=2, overlap_thresh=0.7)
    assert strict["labels"].tolist() == [0, 2], "the second thing keeps two thirds of itself"
    nothing = merge(masks[:0], scores[:0], labels[:0], things=2, overlap_thresh=0.5)
    assert nothing["segments"].sum() == len(nothing["labels"]) == 0


def test_what_cannot_work_is_an_error_that_names_it():
    with pytest.raises(InputError, match=r"unknown architecture 'mask2former'; did you mean 'hf/mask2former'"):
        build_panoptic("mask2former", backbone=BACKBONE, num_classes=2, things=1)
    with pytest.raises(InputError, match=r"things=9 of num_classes=5"):
        build_panoptic(backbone=BACKBONE, num_classes=5, things=9)
    with pytest.raises(InputError, match=r"hf/mask2former has no option 'overlap_tresh'; did you"):
        panoptic(overlap_tresh=0.1)
    with pytest.raises(InputError, match=r"needs targets; call eval\(\)"):
        panoptic()(pair()[0])
