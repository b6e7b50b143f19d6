"""Windows over images of any size, and averages over resized and mirrored ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from backbones.errors import InputError
from backbones_tasks.training.inference import Inference, average
from backbones_tasks.training.segmentation import SegmentationTask
from backbones_tasks.training.sliding import slide, spans


def per_pixel(image):
    """Logits of a model that sees one pixel at a time, so that windows can change nothing."""
    return torch.cat((image, -image), dim=1).float()


def windows(model, image, window, overlap, **options):
    """The bands that `slide` yields of an image in memory."""
    rows = lambda top, bottom: image[..., top:bottom, :]  # noqa: E731
    return list(slide(lambda part: model(part).softmax(1), rows, image.shape[-2:], window, overlap, **options))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    options = {"decoder_channels": 8}
    return SegmentationTask("pvt_v2_b0", num_classes=3, decoder_options=options).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(100, 100), (64, 200), (131, 77), (10, 300), (64, 64), (1, 1), (300, 65)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_windows_change_nothing_for_a_model_that_sees_one_pixel(size, overlap):
    images = torch.randn(2, 3, *size)
    found = torch.cat(windows(per_pixel, images, 64, overlap), dim=-2)
    torch.testing.assert_close(found, per_pixel(images).softmax(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
def test_windows_are_weighted_by_their_middles_whatever_the_overlap(overlap):
    def model(part):  # knows its own middle: one at it, falling to the rim
        y, x = (1 - torch.linspace(-1, 1, side).abs() for side in part.shape[-2:])
        return (y[:, None] * x).expand(1, 1, -1, -1)

    image = torch.zeros(1, 1, 150, 90)
    (expected, total) = torch.zeros(2, 150, 90)
    for down in spans(150, 40, overlap):
        for across in spans(90, 40, overlap):
            places = torch.arange(1, 41.0)
            ramp = torch.minimum(places, places.flip(0))
            area = (slice(down.start, down.end), slice(across.start, across.end))
            expected[area] += model(image[0, :, area[0], area[1]])[0, 0] * ramp[:, None] * ramp
            total[area] += ramp[:, None] * ramp
    rows = lambda top, bottom: image[..., top:bottom, :]  # noqa: E731
    found = torch.cat(list(slide(model, rows, (150, 90), 40, overlap)), dim=-2)
    torch.testing.assert_close(found[0, 0], expected / total)


@pytest.mark.parametrize(("side", "window", "overlap"), [(100, 64, 0.0), (1000, 64, 0.3), (65, 64, 0.9), (7, 64, 0.5)])
def test_neighbouring_windows_overlap_by_at_least_what_was_asked_for(side, window, overlap):
    found = spans(side, window, overlap)
    assert (found[0].start, found[-1].end, found[-1].done) == (0, side, side)
    for one, next_one in pairwise(found):
        assert one.end - one.start == window
        assert one.end - next_one.start >= window * overlap
        assert one.done == next_one.start


def test_no_window_is_larger_than_asked_for_and_small_images_are_whole():
    seen = []

    def model(part):
        seen.append(tuple(part.shape[-2:]))
        return per_pixel(part)

    windows(model, torch.randn(1, 3, 150, 40), 64, 0.25)
    assert set(seen) == {(64, 40)}
    assert len(seen) == 3


def test_rows_are_asked_for_in_order_and_given_out_as_soon_as_they_are_done():
    asked, image = [], torch.randn(1, 3, 400, 50)

    def rows(top, bottom):
        asked.append((top, bottom))
        return image[..., top:bottom, :]

    bands = slide(lambda part: per_pixel(part).softmax(1), rows, (400, 50), 64, 0.25)
    given = 0
    for band in bands:
        given += band.shape[-2]
        assert given >= asked[-1][0], "rows above the last window are out"
        assert all(0 < bottom - top <= 64 for top, bottom in asked)
    assert given == 400
    assert asked == sorted(asked)


def test_pieces_are_reduced_before_they_are_put_together():
    image = torch.randn(1, 3, 150, 90)
    labels = torch.cat(windows(per_pixel, image, 64, 0.25, reduce=lambda p: p.argmax(1).byte()), dim=-2)
    assert labels.dtype == torch.uint8
    assert labels.equal(per_pixel(image).argmax(1).byte())


def test_one_window_over_the_whole_image_is_exactly_the_model(task):
    image = torch.rand(1, 3, 75, 90)
    expected = task(image).softmax(1)
    assert Inference(window=90).probabilities(task, image).equal(expected)
    assert Inference(window=64).probabilities(task, image).ne(expected).any()
    assert Inference().logits(task, image).equal(task(image))


def test_windows_equal_the_whole_image_further_from_their_rims_than_the_model_sees():
    model = torch.nn.Conv2d(3, 4, 9, padding=4).requires_grad_(False)
    image = torch.randn(1, 3, 150, 90)
    difference = (Inference(window=64).probabilities(model, image) - model(image).softmax(1)).abs().amax((0, 1))
    near = [torch.zeros(side, dtype=torch.bool) for side in (150, 90)]
    for side, close in zip((150, 90), near, strict=True):
        for rim in {rim for span in spans(side, 64, 0.25) for rim in (span.start, span.end)} - {0, side}:
            close[rim - 4 : rim + 4] = True
    near = near[0][:, None] | near[1]
    assert difference[~near].max() < 1e-6
    assert difference[near].max() > 1e-3


def test_mirrored_images_are_averaged(task):
    image = torch.rand(2, 3, 40, 50)
    expected = (task(image).softmax(1) + task(image.flip(-1)).flip(-1).softmax(1)) / 2
    found = average(task, image, flip=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(average(task, image.flip(-1), flip=True), found.flip(-1))


def test_scales_are_averaged_at_the_size_of_the_image():
    sizes = []

    def model(images):
        sizes.append(tuple(images.shape[-2:]))
        return per_pixel(images)

    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 40, 64)  # resized, a ramp remains itself but at its ends
    found = average(model, ramp, scales=(0.5, 1.0, 1.5), flip=True)
    assert sizes == [(20, 32)] * 2 + [(40, 64)] * 2 + [(60, 96)] * 2
    assert found.shape == (1, 6, 40, 64)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 40, 64))
    expected = per_pixel(ramp).softmax(1)
    torch.testing.assert_close(found[..., 4:-4], expected[..., 4:-4], atol=1e-4, rtol=1e-4)


def test_logits_of_averages_give_their_probabilities_and_windows_average_too(task):
    image = torch.rand(1, 3, 64, 100)
    inference = Inference(scales=(0.75, 1.25), flip=True, window=64)
    probabilities = inference.probabilities(task, image)
    torch.testing.assert_close(inference.logits(task, image).softmax(1), probabilities)
    left = average(task, image[..., :64], inference.scales, flip=True)
    first_reached_by_another = spans(100, 64, 0.25)[1].start
    torch.testing.assert_close(
        probabilities[..., :first_reached_by_another], left[..., :first_reached_by_another], atol=1e-6, rtol=1e-5
    )


def test_a_side_of_one_pixel_survives_small_scales():
    assert average(per_pixel, torch.rand(1, 3, 1, 5), scales=(0.1,)).shape == (1, 6, 1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales=()"),
        ({"scales": (1.0, 0.0)}, "must be over 0"),
        ({"window": 31}, "window=31 must be at least 32"),
        ({"overlap": 1.0}, "overlap=1.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(InputError) as caught:
        Inference(**options)
    assert message in str(caught.value)


def test_validation_measures_what_inference_says(task):
    images, masks = torch.rand(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))

    def measured(**inference):
        other = SegmentationTask(
            "pvt_v2_b0", num_classes=3, decoder_options={"decoder_channels": 8}, inference=inference
        )
        other.load_state_dict(task.state_dict())
        logged = {}
        other.eval().log = lambda name, value, **options: logged.update({name: float(value)})
        with torch.no_grad():
            other.evaluate((images, masks), "val")
        return logged | {name: float(score) for name, score in other.finish("val").items()}

    averaged = measured(scales=[0.5, 1.0], flip=True)
    probabilities = average(task, images, (0.5, 1.0), flip=True)
    assert averaged["pixel_acc"] == pytest.approx((probabilities.argmax(1) == masks).float().mean().item())
    nll = torch.nn.functional.nll_loss(probabilities.log(), masks).item()
    assert averaged["val_loss"] == pytest.approx(nll, rel=1e-4)
    assert averaged["val_loss"] != pytest.approx(measured()["val_loss"], rel=1e-4)
    assert np.isfinite(measured(window=32)["val_loss"])
