"""The drawn data set is exact, and a function of its seed."""

import numpy as np
import pytest

from backbones_tasks.data.segmentation import ShapesDataset
from backbones_tasks.data.shapes import CLASSES, SHAPES, _distance, draw_scene


@pytest.mark.parametrize("seed", range(20))
def test_masks_boxes_and_labels_agree(seed):
    scene = draw_scene(seed, 64)
    assert scene.image.shape == (64, 64, 3)
    assert scene.image.dtype == np.uint8
    assert (scene.masks.sum(0) <= 1).all(), "visible parts do not overlap"
    drawn = np.zeros((64, 64), dtype=int)
    for mask, label, box in zip(scene.masks, scene.labels, scene.boxes, strict=True):
        drawn[mask] = label
        x0, y0, x1, y1 = box.astype(int)
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0, "the box holds the whole shape"
        inside = mask[y0:y1, x0:x1]
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1])), "and is tight"
    assert np.array_equal(drawn, scene.mask)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi * 0.85**2),
        ("square", 2.0),  # corners on the unit circle
        ("triangle", 3 * np.sqrt(3) / 4),
        ("star", 10 * 0.5 * 1.1 * 0.5 * np.sin(np.pi / 5)),
    ],
)
def test_outlines_enclose_the_area_of_their_formula(shape, area):
    y, x = (np.mgrid[:400, :400] + 0.5 - 200) / 150
    inside = _distance(shape, np.stack([x, y], -1), 1.0, 0.3) <= 0
    assert inside.mean() * (400 / 150) ** 2 == pytest.approx(area, rel=0.01)


def test_distance_is_in_pixels():
    points = np.array([[3.0, 0.0], [0.0, 0.0]])
    assert _distance("square", points, np.sqrt(2), np.pi / 4) == pytest.approx([2, -1], abs=1e-6)


def test_equal_seeds_give_equal_scenes_and_others_do_not():
    a, b, c = draw_scene((1, 2)), draw_scene((1, 2)), draw_scene((1, 3))
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.mask, b.mask)
    assert not np.array_equal(a.image, c.image)


def test_every_class_occurs():
    labels = {int(label) for seed in range(30) for label in draw_scene(seed, 48).labels}
    assert labels == set(range(1, len(CLASSES)))
    assert CLASSES[1:] == SHAPES


def test_training_draws_new_shapes_every_epoch_and_validation_never():
    train, val = ShapesDataset(4, 32, "train"), ShapesDataset(4, 32, "val")
    assert not train[(0, 1)][0].equal(train[(1, 1)][0])
    assert train[(1, 1)][0].equal(train[(1, 1)][0])
    assert val[1][0].equal(val[1][0])
    assert not val[1][0].equal(train[(0, 1)][0])
