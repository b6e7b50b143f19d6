"""Losses of segmenters: sums, class weights, hard pixels; ignored pixels change nothing."""

import math

import pytest
import torch
from torch.nn import functional as F

from backbones.errors import InputError
from backbones_tasks.data.segmentation import SegmentationData, ShapesOptions
from backbones_tasks.training.losses import LOSSES, SegmentationLoss, balanced_weights, parse
from backbones_tasks.training.segmentation import SegmentationTask

WEIGHTED = [(name, None) for name in LOSSES] + [(name, [0.5, 1.0, 2.0]) for name in LOSSES if name != "lovasz"]


@pytest.fixture
def batch():
    """Logits (2, 3, 8, 10) with a gradient, and masks of which a third is ignored."""
    masks = torch.randint(0, 3, (2, 8, 10))
    masks[:, ::3] = 255
    return torch.randn(2, 3, 8, 10, requires_grad=True), masks


@pytest.mark.parametrize(("name", "weights"), WEIGHTED)
def test_ignored_pixels_change_nothing(batch, name, weights):
    logits, masks = batch
    loss = SegmentationLoss(name, class_weights=weights)
    ignored = (masks == 255)[:, None].expand_as(logits)
    changed = torch.where(ignored, 10 * torch.randn_like(logits), logits)
    value = loss(logits, masks)
    assert value > 0
    torch.testing.assert_close(loss(changed, masks), value)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[ignored].abs().max() == 0
    assert gradient[~ignored].abs().max() > 0


@pytest.mark.parametrize(("name", "weights"), WEIGHTED)
def test_where_no_pixel_counts_the_loss_is_zero(batch, name, weights):
    logits, masks = batch
    value = SegmentationLoss(name, class_weights=weights)(logits, torch.full_like(masks, 255))
    value.backward()  # other processes wait for these gradients
    assert value == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize(("name", "weights"), WEIGHTED)
def test_every_loss_teaches(name, weights):
    masks = torch.randint(0, 3, (2, 8, 8))
    logits = torch.zeros(2, 3, 8, 8, requires_grad=True)
    loss = SegmentationLoss(name, class_weights=weights)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    before = loss(logits, masks).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(logits, masks).backward()
        optimizer.step()
    assert loss(logits, masks) < 0.3 * before
    assert (logits.argmax(1) == masks).float().mean() > 0.95


def test_cross_entropy_is_pytorchs(batch):
    logits, masks = batch
    weights = [0.5, 1.0, 2.0]
    for given, options in ((None, {}), (weights, {}), (None, {"label_smoothing": 0.1})):
        found = SegmentationLoss("ce", {"ce": options}, class_weights=given)(logits, masks)
        weight = None if given is None else torch.tensor(given)
        torch.testing.assert_close(found, F.cross_entropy(logits, masks, weight, ignore_index=255, **options))


def test_a_pixel_of_weight_two_counts_as_two_pixels():
    logits, masks = torch.randn(1, 2, 1, 3), torch.tensor([[[0, 0, 1]]])
    for name in ("ce", "ohem"):
        options = {"ohem": {"thresh": 1.0}} if name == "ohem" else None
        weighted = SegmentationLoss(name, options, class_weights=[1.0, 2.0])(logits, masks)
        doubled = SegmentationLoss(name, options)(logits[..., [0, 1, 2, 2]], masks[..., [0, 1, 2, 2]])
        torch.testing.assert_close(weighted, doubled)


def test_hard_pixels_are_those_below_the_threshold():
    chances = torch.tensor([0.95, 0.8, 0.6, 0.3, 0.1])  # of the true class, which is 0
    logits = torch.stack((chances.log(), (1 - chances).log()))[None, :, None]
    masks = torch.zeros(1, 1, 5, dtype=torch.long)
    losses = -chances.log()

    def found(**options):
        return SegmentationLoss("ohem", {"ohem": options})(logits, masks)

    torch.testing.assert_close(found(thresh=0.7, min_kept=0.2), losses[2:].mean())
    torch.testing.assert_close(found(thresh=0.2, min_kept=0.2), losses[4:].mean())
    torch.testing.assert_close(found(thresh=0.2, min_kept=0.75), losses[1:].mean(), msg="four of five are 75 %")
    torch.testing.assert_close(found(thresh=1.0, min_kept=0.2), losses.mean())


def test_sums_are_weighted(batch):
    logits, masks = batch
    parts = {name: SegmentationLoss(name)(logits, masks) for name in LOSSES}
    found = SegmentationLoss("ce + 0.5*dice+.25*lovasz")(logits, masks)
    torch.testing.assert_close(found, parts["ce"] + 0.5 * parts["dice"] + 0.25 * parts["lovasz"])
    assert parse("ohem+2*focal") == [(1.0, "ohem"), (2.0, "focal")]


def test_options_reach_their_loss(batch):
    logits, masks = batch
    assert SegmentationLoss("focal", {"focal": {"gamma": 0.0}})(logits, masks) > SegmentationLoss("focal")(
        logits, masks
    )
    assert SegmentationLoss("dice", {"dice": {"log_loss": True}})(logits, masks) > SegmentationLoss("dice")(
        logits, masks
    )


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_does_not_spoil_sums_over_many_pixels(name):
    logits = torch.randn(1, 3, 300, 300).bfloat16()
    masks = torch.randint(0, 3, (1, 300, 300))
    loss = SegmentationLoss(name)
    torch.testing.assert_close(loss(logits, masks), loss(logits.double(), masks).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        ("dise", None, "unknown loss 'dise'; did you mean 'dice'?"),
        ("ce+", None, "'' is no loss; write a sum"),
        ("ce+ce", None, "ce is there twice"),
        ("ce", {"ohem": {}}, "given for ohem, but the loss is 'ce'"),
        ("ohem", {"ohem": {"treshold": 0.7}}, "loss 'ohem' has no option 'treshold'; did you mean 'thresh'?"),
        ("ohem", {"ohem": {"min_kept": 100000}}, "are shares"),
        ("focal", {"focal": {"mode": "binary"}}, "has no option 'mode'"),
    ],
)
def test_unknown_losses_and_options_are_refused(terms, options, message):
    with pytest.raises(InputError) as caught:
        SegmentationLoss(terms, options)
    assert message in str(caught.value)


def test_weights_that_no_loss_takes_are_refused():
    with pytest.raises(InputError, match="leave out class_weights"):
        SegmentationLoss("lovasz", class_weights=[1.0, 2.0])
    SegmentationLoss("ce+lovasz", class_weights=[1.0, 2.0])


def test_balanced_weights_make_classes_count_equally():
    pixels = torch.tensor([900, 90, 10, 0])
    weights = torch.tensor(balanced_weights(pixels))
    shares = weights * pixels
    assert shares[:3].tolist() == pytest.approx([1000 / 3] * 3)
    assert weights[3] == 0


def test_balanced_weights_are_those_of_the_training_masks_and_go_into_checkpoints():
    task = SegmentationTask(num_classes=5, class_weights="balanced", decoder_options={"decoder_channels": 8})
    data = SegmentationData(shapes=ShapesOptions(size=32, train=6, val=2))
    data.setup("fit")
    counted = sum(torch.bincount(data.datasets["train"][(0, i)][1].flatten(), minlength=5) for i in range(6))
    assert data.count_pixels("train").equal(counted)

    class Trainer:
        datamodule = data

    task._trainer = Trainer
    task.setup("fit")
    expected = (6 * 32 * 32 / ((counted > 0).sum() * counted.clamp(min=1))) * (counted > 0)
    assert task.hparams["class_weights"] == pytest.approx(expected.tolist())
    masks = data.datasets["val"][0][1][None]
    logits = torch.randn(1, 5, 32, 32)
    torch.testing.assert_close(task.loss(logits, masks), F.cross_entropy(logits, masks, expected.float()))
    Trainer.datamodule = None
    task.hparams["class_weights"] = "balanced"
    with pytest.raises(InputError, match="give a list instead"):
        task.setup("fit")


def test_class_weights_must_be_one_per_class():
    with pytest.raises(InputError, match="2 numbers for 3 classes, which are a, b, c"):
        SegmentationTask(num_classes=3, class_names=["a", "b", "c"], class_weights=[1.0, 2.0])


def test_a_perfect_prediction_has_no_hard_pixels_but_the_hardest():
    masks = torch.randint(0, 2, (1, 16, 16))
    logits = 20.0 * F.one_hot(masks, 2).permute(0, 3, 1, 2)
    assert SegmentationLoss("ohem")(logits, masks).item() == pytest.approx(math.log1p(math.exp(-20)), abs=1e-7)
