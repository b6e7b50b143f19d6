"""Pictures, and what prediction refuses; the command itself is tested with the training."""

import numpy as np
import pytest
import torch

from backbones.errors import InputError, WeightsError
from backbones_tasks.commands.predict import predict
from backbones_tasks.pictures.colours import IGNORED, colourise, index_png, overlay, palette
from backbones_tasks.pictures.curves import save_curves
from backbones_tasks.pictures.segmentation import save_predictions
from backbones_tasks.training.tasks import load_task


def test_palette_tells_classes_apart():
    colours = palette(150)
    assert len(set(colours)) == 150
    assert palette(5) == colours[:5]


def test_index_png_keeps_the_indices():
    mask = np.array([[0, 1, 2], [2, 255, 0]])
    image = index_png(mask, palette(3))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), mask)
    assert np.array_equal(np.asarray(index_png(np.array([[300]]), palette(301))), [[300]])


def test_overlay_mixes_image_and_class_colour():
    image = np.full((1, 2, 3), 100, dtype=np.uint8)
    mixed = overlay(image, np.array([[0, 255]]), [(200, 0, 50)])
    assert mixed.tolist() == [[[150, 50, 75], [50, 50, 50]]]
    assert tuple(colourise(np.array([[-1]]), palette(2))[0, 0]) == IGNORED


def test_pictures_are_written(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 60, 3), dtype=np.uint8) for _ in range(2)]
    masks = [rng.integers(0, 3, (40, 60)) for _ in range(2)]
    save_predictions(tmp_path / "p.png", images, masks, masks[::-1], ["a", "b", "c"])
    (tmp_path / "m.csv").write_text("epoch,train_loss,val_loss,mIoU,pixel_acc\n0,1.5,1.4,0.3,0.6\n1,1.0,,,\n")
    save_curves(tmp_path / "c.png", tmp_path / "m.csv", ("mIoU", "pixel_acc"))
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("p.png", "c.png"))


def test_predict_names_what_is_missing(tmp_path):
    arguments = ["segmentation", "--out", str(tmp_path / "out"), "--ckpt", str(tmp_path / "no.ckpt")]
    with pytest.raises(InputError, match="no such file or folder"):
        predict([*arguments, "--images", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no images in it"):
        predict([*arguments, "--images", str(tmp_path)])
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no\.ckpt: no such checkpoint"):
        predict([*arguments, "--images", str(tmp_path)])


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    path = tmp_path / "detector.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {}, "task": "detection"}, path)
    with pytest.raises(InputError, match=r"detector\.ckpt is a checkpoint of detection, not of segmentation"):
        load_task(path, "segmentation")


@pytest.mark.parametrize(("option", "value"), [("--window", "31"), ("--overlap", "1")])
def test_windows_that_cannot_be_are_refused(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        predict(["segmentation", "--ckpt", "a.ckpt", "--images", "a.png", "--out", str(tmp_path), option, value])
    assert f"{value} must be" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"broken\.ckpt .* cannot be read as a checkpoint"):
        load_task(path, "segmentation")
