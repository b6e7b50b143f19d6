"""Pictures, what prediction refuses and survives, and what it writes; more is tested with the training."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.errors import InputError, WeightsError
from backbones_tasks.commands.predict import predict
from backbones_tasks.files import WriteError, save, write_json
from backbones_tasks.pictures.colours import IGNORED, colourise, index_png, overlay, palette
from backbones_tasks.pictures.curves import save_curves
from backbones_tasks.pictures.segmentation import save_predictions
from backbones_tasks.training.classification import ClassificationTask
from backbones_tasks.training.detection import DetectionTask
from backbones_tasks.training.segmentation import SegmentationTask
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
    (tmp_path / "images").mkdir()
    arguments = ["segmentation", "--out", str(tmp_path / "out"), "--ckpt", str(tmp_path / "no.ckpt")]
    with pytest.raises(InputError, match="no such file or folder"):
        predict([*arguments, "--images", str(tmp_path / "none")])
    with pytest.raises(InputError, match="no images in it"):
        predict([*arguments, "--images", str(tmp_path / "images")])
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no\.ckpt: no such checkpoint"):
        predict([*arguments, "--images", str(tmp_path / "images")])


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


def checkpoint(task, path="model.ckpt"):
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "task": task.name}, path)
    return path


@pytest.fixture
def classifier(workplace):
    """A checkpoint, and a folder of three images."""
    Path("photos").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (40, 30)).save(f"photos/{name}")
    return checkpoint(ClassificationTask(num_classes=3, image_size=32))


def run(task, ckpt, *options):
    return predict([task, "--ckpt", ckpt, "--device", "cpu", *options])


def test_an_image_that_fails_does_not_end_the_others(classifier, monkeypatch, capsys):
    forward, seen = ClassificationTask.forward, []

    def fails(self, images):
        seen.append(images)
        if len(seen) == 2:
            raise RuntimeError("no memory\nfor this")
        return forward(self, images)

    monkeypatch.setattr(ClassificationTask, "forward", fails)
    assert run("classification", classifier, "--images", "photos", "--out", "out") == 1
    told = capsys.readouterr()
    assert "2 of 3 images labelled" in told.out
    assert "not labelled: photos/b.png: RuntimeError: no memory for this\n" in told.err
    assert json.loads(Path("out/results.json").read_text())["images"].keys() == {"a.png", "c.png"}


@pytest.mark.parametrize("ends", ["signal", "disk"])
def test_what_was_done_is_kept_when_prediction_ends_early(classifier, monkeypatch, capsys, ends):
    label, seen = ClassificationTask.predict_file, []

    def interrupted(self, *args):
        seen.append(args)
        if len(seen) == 3 and ends == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if len(seen) == 3:
            raise WriteError("out/overlays/c.png cannot be written: no space left on device")
        return label(self, *args)

    monkeypatch.setattr(ClassificationTask, "predict_file", interrupted)
    with pytest.raises(SystemExit if ends == "signal" else WriteError) as ended:
        run("classification", classifier, "--images", "photos", "--out", "out")
    assert ends == "disk" or ended.value.code == 143
    assert json.loads(Path("out/results.json").read_text())["images"].keys() == {"a.png", "b.png"}
    assert "2 of 3 images labelled" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (1, 1)])
@pytest.mark.parametrize("task", ["segmentation", "classification", "detection"])
def test_images_of_odd_sizes_are_labelled(workplace, task, size, capsys):
    narrow = {"decoder_channels": 8} if task == "segmentation" else {"fpn_channels": 8}
    options = {
        "segmentation": lambda: SegmentationTask(num_classes=2, decoder_options=narrow),
        "classification": lambda: ClassificationTask(num_classes=2, image_size=32),
        "detection": lambda: DetectionTask(
            num_classes=2, image_size=32, detector="retinanet", detector_options=narrow, class_names=["none", "a"]
        ),
    }
    Path("photos").mkdir()
    Image.new("RGB", size).save("photos/odd.png")
    Image.new("RGB", (40, 30)).save("photos/plain.png")
    code = run(task, checkpoint(options[task]()), "--images", "photos", "--out", "out")
    told = capsys.readouterr()
    assert (code, told.err.count("not labelled")) == (0, 0), told.err
    assert "2 of 2 images labelled" in told.out


def test_results_never_share_a_name(workplace):
    Path("photos/deep").mkdir(parents=True)
    for name in ("x.jpg", "x.png", "x.jpg.png", "y.png", "deep/y.jpg", "Z.png", "z.jpg"):
        Image.new("RGB", (8, 8)).save(f"photos/{name}")
    task = SegmentationTask(num_classes=2, decoder_options={"decoder_channels": 8})
    assert run("segmentation", checkpoint(task), "--images", "photos", "--out", "out") == 0
    masks = {path.relative_to("out/masks").as_posix() for path in Path("out/masks").rglob("*.png")}
    named = {"x.jpg.png", "x.png.png", "x.jpg.png.png", "y.png", "deep/y.png", "Z.png.png", "z.jpg.png"}
    assert masks == named


def test_only_what_predict_wrote_is_written_over(classifier, capsys):
    images = Path("photos/images")
    images.mkdir()
    for path in Path("photos").glob("*.png"):
        path.rename(images / path.name)
    mask = Path("photos/masks/a.png")
    mask.parent.mkdir()
    mask.write_bytes(b"true mask")
    other = Path("other/masks")
    other.mkdir(parents=True)
    Path("linked").mkdir()
    refused = {
        "photos": "holds the images themselves",
        "photos/images": "holds the images themselves",
        "photos/images/out": "lies among the images",
        "other": "holds masks, which predict did not write",
        "model.ckpt": "is no folder",
    }
    for out, why in refused.items():
        with pytest.raises(InputError, match=why):
            run("classification", classifier, "--images", "photos/images", "--out", out)
    assert mask.read_bytes() == b"true mask"
    assert run("classification", classifier, "--images", "photos/images", "--out", "out") == 0
    assert run("classification", classifier, "--images", "photos/images", "--out", "out") == 0  # its own
    Path("out/masks").symlink_to(mask.parent.absolute())
    with pytest.raises(InputError, match="out/masks is a link to"):
        run("classification", classifier, "--images", "photos/images", "--out", "out")
    Path("out/masks").unlink()
    Path("out/results.json").unlink()
    Path("out/results.json").symlink_to(mask.absolute())
    with pytest.raises(InputError, match="is a link to"):
        run("classification", classifier, "--images", "photos/images", "--out", "out")
    assert mask.read_bytes() == b"true mask"


def test_links_deeper_down_are_not_followed(workplace):
    Path("photos/deep").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("photos/deep/a.png")
    task = checkpoint(SegmentationTask(num_classes=2, decoder_options={"decoder_channels": 8}))
    assert run("segmentation", task, "--images", "photos", "--out", "out") == 0
    Path("out/masks/deep/a.png").unlink()
    Path("out/masks/deep").rmdir()
    Path("true").mkdir()
    Path("out/masks/deep").symlink_to(Path("true").absolute())
    with pytest.raises(InputError, match="out/masks/deep is a link to"):
        run("segmentation", task, "--images", "photos", "--out", "out")
    assert not list(Path("true").iterdir())


def test_its_own_output_is_not_labelled(classifier):
    Path("photos/labelled").mkdir()
    Image.new("RGB", (8, 8)).save("photos/labelled/overlay.png")
    Path("photos/labelled/predict.json").write_text("{}")
    assert run("classification", classifier, "--images", "photos", "--out", "out") == 0
    assert json.loads(Path("out/results.json").read_text())["images"].keys() == {"a.png", "b.png", "c.png"}


@pytest.mark.parametrize("annotated", [False, True])
def test_detections_are_what_pycocotools_loads(workplace, annotated):
    torch.manual_seed(0)
    options = {"fpn_channels": 8, "mask_channels": 8, "box_channels": 16, "score_thresh": 0.0}
    task = DetectionTask(
        detector="mask_rcnn", num_classes=3, class_names=["none", "cat", "dog"], image_size=64, detector_options=options
    )
    Path("photos/deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = []
    for i, name in enumerate(("b.png", "deep/a.png")):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(f"photos/{name}")
        images.append({"id": 70 + i, "file_name": name, "height": 48, "width": 64})
    box = {"bbox": [2, 2, 60, 40], "segmentation": [[2, 2, 62, 2, 62, 42, 2, 42]], "area": 2400, "iscrowd": 0}
    objects = [{"id": i + 1, "image_id": 70 + i, "category_id": 9, **box} for i in range(2)]
    content = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    }
    Path("truth.json").write_text(json.dumps(content))
    told = ["--annotations", "truth.json"] if annotated else []
    assert run("detection", checkpoint(task), "--images", "photos", "--out", "out", *told) == 0
    truth = COCO("truth.json" if annotated else "out/coco/images.json")
    for kind, measure in (("box", "bbox"), ("mask", "segm")):
        found = truth.loadRes(f"out/coco/results_{kind}.json")
        assert set(found.getImgIds()) == ({70, 71} if annotated else {1, 2})
        assert {entry["category_id"] for entry in found.loadAnns(found.getAnnIds())} <= (
            {4, 9} if annotated else {1, 2}
        )
        evaluation = COCOeval(truth, found, measure)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert annotated == (evaluation.stats[8] >= 0)  # recall; -1 where there is no truth
    assert Path("out/coco/images.json").exists() != annotated


def test_annotations_that_do_not_fit_the_model_are_refused(workplace):
    task = DetectionTask(
        num_classes=2, class_names=["none", "cat"], image_size=32, detector_options={"fpn_channels": 8}
    )
    Image.new("RGB", (40, 30)).save("a.png")
    Path("truth.json").write_text(json.dumps({"images": [], "categories": [{"id": 1, "name": "dog"}]}))
    Path("no.json").write_text("{}")
    for file, why in (
        ("truth.json", "no category cat"),
        ("no.json", "not in COCO's format"),
        ("none.json", "No such file"),
    ):
        with pytest.raises(InputError, match=why):
            run("detection", checkpoint(task), "--images", "a.png", "--out", "out", "--annotations", file)
    assert not Path("out").exists()


def test_a_full_disk_is_told_in_a_sentence(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"a\.json cannot be written: no space left on device"):
            write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(WriteError, match=r"the folder .* is gone"):
        write_json(tmp_path / "none" / "a.json", {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_torch_says_why_a_checkpoint_cannot_be_written():
    with pytest.raises(OSError, match="No space left on device"):
        save({"a": torch.zeros(100_000)}, Path("/dev/full"))
