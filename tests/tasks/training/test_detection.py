"""Detection by the commands, end to end, and what the task itself does."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from run_files import rows, weights

from backbones.cli import main
from backbones_tasks.data import rle
from backbones_tasks.data.shapes import CLASSES, draw_scene
from backbones_tasks.pictures.detection import Objects, draw_objects, save_objects
from backbones_tasks.training.detection import DetectionTask
from backbones_tasks.training.tasks import load_task

NARROW = "{fpn_channels: 16, box_channels: 32, mask_channels: 8, box_batch_size_per_image: 16, detections_per_img: 20}"
pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=64",
    "--data.shapes.train=8",
    "--data.shapes.val=4",
    "--data.batch_size=4",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of Mask R-CNN."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert fit("--out", folder, "--trainer.max_epochs=2") == 0
    os.environ.pop("BACKBONES_RUN", None)
    return folder


def fit(*options, detector="mask_rcnn", narrow=NARROW):
    model = [f"--model.detector={detector}", f"--model.detector_options={narrow}"]
    return main(["fit", "detection", *SMALL, *model, *map(str, options)])


def test_a_run_logs_the_parts_of_the_loss_and_the_precision_of_boxes_masks_and_classes(trained):
    names = ["train_loss", "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]
    for row in rows(trained):
        assert float(row["train_loss"]) == pytest.approx(sum(float(row[name]) for name in names[1:]), rel=1e-4)
        for kind in ("box", "mask"):
            for score in ("AP", "AP50", "AP75", *(f"AP/{name}" for name in CLASSES[1:])):
                value = float(row[f"{kind}_{score}"])
                assert 0 <= value <= 1 or np.isnan(value)
    assert (trained / "predictions.png").is_file()
    assert (trained / "curves.png").is_file()


def test_results_of_the_best_epoch_give_its_scores_to_pycocotools_itself(trained):
    best = max(rows(trained), key=lambda row: float(row["box_AP"]))
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        truth = COCO(str(trained / "coco_val" / "truth.json"))
        found = truth.loadRes(str(trained / "coco_val" / f"results_{name}.json"))
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(float(best[f"{name}_AP"]), abs=1e-6)
        assert evaluation.stats[1] == pytest.approx(float(best[f"{name}_AP50"]), abs=1e-6)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_checkpoints_are_measured(trained, capsys, command):
    assert main([command, "detection", "--ckpt_path", "best", "--out", str(trained)]) == 0
    score = float(capsys.readouterr().out.split("box_AP ")[1].split()[0])
    best = max(float(row["box_AP"]) for row in rows(trained))
    if command == "validate":
        assert score == pytest.approx(best, abs=1e-4)
    assert (trained / f"coco_{'val' if command == 'validate' else 'test'}" / "results_mask.json").is_file()


def test_a_run_that_broke_off_goes_on_exactly(trained, workplace, monkeypatch):
    step = DetectionTask.training_step

    def breaks_off(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("--trainer.max_epochs=2")
    torch.rand(3)  # a new process has another state
    assert main(["fit", "detection", "--ckpt_path", "last"]) == 0
    run = workplace / "runs" / "detection-001"
    assert rows(run) == rows(trained)
    expected = weights(trained)
    assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())


def test_images_are_labelled_with_boxes_and_masks_in_cocos_form(trained, workplace, capsys):
    (workplace / "images" / "deeper").mkdir(parents=True)
    Image.fromarray(draw_scene(0, 64).image).save("images/a.png")
    Image.fromarray(draw_scene(1, 90).image[:50]).convert("L").save("images/deeper/grey.jpg")
    Path("images/broken.jpg").write_bytes(b"\xff\xd8 no more")
    checkpoint = str(trained / "checkpoints" / "last.ckpt")
    command = ["predict", "detection", "--ckpt", checkpoint, "--images", "images", "--out", "out", "--threshold", "0"]
    assert main(command) == 1
    assert "broken.jpg" in capsys.readouterr().err
    results = json.loads(Path("out/results.json").read_text())
    assert results["classes"] == list(CLASSES)
    sizes = {"a.png": (64, 64), "deeper/grey.jpg": (50, 90)}
    assert results["images"].keys() == sizes.keys()
    for name, (height, width) in sizes.items():
        assert Image.open(Path("out/overlays") / Path(name).with_suffix(".png")).size == (width, height)
        assert results["images"][name]
        for entry in results["images"][name]:
            x, y, w, h = entry["bbox"]
            assert min(x, y, w, h) >= 0
            assert x + w <= width + 0.02
            assert y + h <= height + 0.02
            assert entry["category"] == CLASSES[entry["category_id"]]
            assert entry["segmentation"]["size"] == [height, width]
            assert rle.decode([entry["segmentation"]["counts"]], height, width).shape == (1, height, width)


def test_only_what_reaches_the_threshold_is_listed(trained, workplace):
    Image.fromarray(draw_scene(0, 64).image).save("a.png")
    task = load_task(trained / "checkpoints" / "last.ckpt", "detection")
    with torch.no_grad():
        (found,) = task([torch.from_numpy(draw_scene(0, 64).image).permute(2, 0, 1).float() / 255])
    scores = found["scores"].sort().values
    gap = int(scores.diff().argmax())  # no rounding moves a score over the middle of the widest gap
    middle = scores[gap : gap + 2].mean().item()
    arguments = ["--ckpt", str(trained / "checkpoints" / "last.ckpt"), "--images", "a.png", "--out", "out"]
    assert main(["predict", "detection", *arguments, "--threshold", str(middle)]) == 0
    listed = json.loads(Path("out/results.json").read_text())["images"]["a.png"]
    assert len(listed) == int((found["scores"] >= middle).sum()) > 0


@pytest.mark.parametrize("detector", ["cascade_rcnn", "retinanet", "fcos"])
def test_other_detectors_train_without_masks(detector, workplace):
    narrow = {
        "cascade_rcnn": "{fpn_channels: 16, box_channels: 32, box_batch_size_per_image: 16}",
        "retinanet": "{fpn_channels: 16, score_thresh: 0.5}",
        "fcos": "{fpn_channels: 64, score_thresh: 0.5}",
    }
    assert fit("--trainer.max_epochs=1", detector=detector, narrow=narrow[detector]) == 0
    (row,) = rows(workplace / "runs/detection-001")
    assert 0 <= float(row["box_AP"]) <= 1
    assert not any(name.startswith("mask_") for name in row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.detector=faster_rccn"], "did you mean 'faster_rcnn'?"),
        (["--model.detector=fcos", "--model.detector_options={box_nms_thresh: 0.5}"], "no option 'box_nms_thresh'"),
        (["--model.detector_options={fpn_chanels: 32}"], "did you mean 'fpn_channels'?"),
        (["--backbone=pvt_v2_b9"], "did you mean 'pvt_v2_b"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(arguments, message, capsys, workplace):
    assert main(["fit", "detection", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(workplace.iterdir())


@pytest.fixture
def folder(workplace):
    """Six scenes of two sizes in COCO's format."""
    images, annotations = [], []
    (workplace / "my" / "train").mkdir(parents=True)
    for i in range(6):
        scene = draw_scene(i, 60)
        Image.fromarray(scene.image[: 40 + 20 * (i % 2)]).save(workplace / "my" / "train" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 40 + 20 * (i % 2), "width": 60})
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
            x0, y0, x1, y1 = box[0], box[1], box[2], min(box[3], images[-1]["height"])
            if y1 > y0:
                entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 10 * label, "iscrowd": 0}
                annotations.append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(CLASSES) if i]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (workplace / "my" / "instances_train.json").write_text(json.dumps(content))
    return "my"


@pytest.mark.parametrize("crop", ["48", "null"])
def test_a_folder_of_images_trains_in_crops_or_whole(folder, crop, workplace):
    options = ["--data", folder, "--data.num_workers=0", "--data.val_fraction=0.4", "--trainer.max_epochs=1"]
    narrow = "{fpn_channels: 16, box_channels: 16" + (", min_size: 48, max_size: 64}" if crop == "null" else "}")
    assert fit(*options, f"--data.crop_size={crop}", detector="faster_rcnn", narrow=narrow) == 0
    results = json.loads(Path("runs/detection-001/coco_val/truth.json").read_text())
    assert {c["id"] for c in results["categories"]} == {10, 20, 30, 40}


def test_training_crops_are_not_resized_again_and_other_images_are_brought_to_their_scale():
    task = DetectionTask(num_classes=2, image_size=80)
    seen = []
    task.model.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    image = torch.rand(3, 64, 96)
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    task.model([image], [target])
    task.eval()([torch.rand(3, 100, 160)])
    assert seen == [(64, 96), (64, 96)]  # 100 x 160 becomes 50 x 80, and both are padded to multiples of 32


def test_whole_images_are_resized_as_torchvision_does():
    task = DetectionTask(num_classes=2, detector_options={"fpn_channels": 16, "min_size": 50, "max_size": 70})
    transform = task.model.transform
    assert (transform.min_size, transform.max_size, transform._skip_resize) == ((50,), 70, False)
    assert DetectionTask(num_classes=2).model.transform.min_size == (800,)


def test_pictures_show_the_boxes(tmp_path):
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    masks = np.zeros((2, 60, 80), dtype=bool)
    masks[0, 20:40, 10:30] = True
    objects = Objects(
        np.array([[10.0, 20, 30, 40], [40, 0, 79, 50]]), np.array([1, 2]), scores=np.array([0.9, 0.4]), masks=masks
    )
    picture = np.asarray(draw_objects(image, objects, ["background", "cat", "dog"]))
    assert picture.shape == image.shape
    assert (picture[20, 10:31] != 0).any(1).all(), "the upper edge of the first box"
    assert (picture[30, 20] != 0).any(), "inside its mask"
    assert (picture[55, 5] == 0).all()
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, dtype=int), scores=np.zeros(0))
    assert np.array_equal(np.asarray(draw_objects(image, nothing, ["background", "cat"])), image)
    save_objects(tmp_path / "p.png", [image] * 3, [objects, nothing, objects], [nothing] * 3, ["background", "a", "b"])
    assert Image.open(tmp_path / "p.png").width > 500


EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("detection_*.yaml"))


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda path: path.stem)
def test_examples_say_what_they_hold(config, capsys):
    content = yaml.safe_load(config.read_text())
    assert content["model"]["backbone"]
    small = [*SMALL, "--trainer.fast_dev_run=1", "--data.root=null", "--model.backbone=pvt_v2_b0"]
    assert main(["fit", "detection", "--config", str(config), *small]) == 0
