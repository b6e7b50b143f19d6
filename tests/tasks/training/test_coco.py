"""COCO's evaluation: pycocotools' own numbers, on one process and on several."""

import contextlib
import copy
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbones.errors import InputError
from backbones_tasks.data import rle
from backbones_tasks.data.detection import DetectionData
from backbones_tasks.training.coco import CocoEvaluation

NAMES = ["background", "cat", "dog", "tree"]
IDS = {1: 3, 2: 7, 3: 90}
SIZE = (160, 200)
BOXES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def ellipse(x, y, w, h):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2 <= 0.25


def make_truth(images=6, seed=0):
    """Ellipses of all sizes and of two classes, some of them crowds; annotations begin with number 0."""
    rng = np.random.default_rng(seed)
    entries = []
    for image in range(1, images + 1):
        for _ in range(rng.integers(1, 6)):
            w, h = rng.uniform(8, 150, 2)
            x, y = rng.uniform(0, SIZE[1] - w), rng.uniform(0, max(1, SIZE[0] - h))
            counts = rle.encode_array(ellipse(x, y, w, h)[None])[0]
            entries.append(
                {
                    "id": len(entries),
                    "image_id": 10 * image,
                    "category_id": IDS[int(rng.integers(1, 3))],
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "area": float(rle.area(counts, *SIZE)),
                    "iscrowd": int(rng.random() < 0.15),
                    "segmentation": {"size": list(SIZE), "counts": counts},
                }
            )
    return {
        "images": [{"id": 10 * i, "file_name": f"{i}.png", "height": 160, "width": 200} for i in range(1, images + 1)],
        "annotations": entries,
        "categories": [{"id": number, "name": NAMES[label]} for label, number in IDS.items()],
    }


def predict(truth, image_id, noise=0.0, extra=0, seed=0):
    """What a detector with that much noise says about an image, as torchvision's detectors say it."""
    rng = np.random.default_rng((seed, image_id))
    labels = {number: label for label, number in IDS.items()}
    found = []
    for entry in truth["annotations"]:
        if entry["image_id"] == image_id and not entry["iscrowd"]:
            x, y, w, h = np.array(entry["bbox"]) * (1 + noise * rng.uniform(-1, 1, 4))
            found.append((x, y, w, h, labels[entry["category_id"]], rng.uniform(0.3, 1)))
    for _ in range(extra):
        found.append((*rng.uniform(0, 80, 2), *rng.uniform(10, 80, 2), int(rng.integers(1, 4)), rng.uniform(0, 0.8)))
    masks = np.stack([ellipse(*row[:4]) for row in found]) if found else np.zeros((0, *SIZE))
    rows = torch.tensor(found, dtype=torch.float32).reshape(-1, 6)
    return {
        "boxes": torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], dim=1),
        "labels": rows[:, 4].long(),
        "scores": rows[:, 5],
        "masks": torch.from_numpy(masks)[:, None].float() * 0.9,
    }


def evaluate(truth, **options):
    evaluation = CocoEvaluation(truth, NAMES, masks=True)
    for image in truth["images"]:
        evaluation.update([{"image_id": image["id"]}], [predict(truth, image["id"], **options)])
    return evaluation


def by_hand(truth, results, kind):
    """pycocotools' twelve numbers, and its AP by class."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        classes = {}
        for i, number in enumerate(coco.getCatIds()):
            values = evaluation.eval["precision"][:, :, i, 0, 2]
            classes[coco.cats[number]["name"]] = np.mean(values[values > -1]) if (values > -1).any() else math.nan
    return evaluation.stats, classes


def test_numbers_are_those_of_pycocotools_to_the_last_digit(tmp_path):
    evaluation = evaluate(make_truth(), noise=0.08, extra=3)
    scores = evaluation.compute()
    evaluation.save(tmp_path)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats, classes = by_hand(tmp_path / "truth.json", tmp_path / f"results_{name}.json", kind)
        ours = [scores[f"{name}_{score}"] for score in BOXES]
        print(f"{name}: {ours}")
        assert ours == stats[:6].tolist()
        for label in ("cat", "dog"):
            assert scores[f"{name}_AP/{label}"] == classes[label]
        assert math.isnan(scores[f"{name}_AP/tree"]), "none is there to be found"
        assert len({round(value, 3) for value in ours}) > 3
        assert 0.1 < scores[f"{name}_AP"] < 0.9, "neither all right nor all wrong"


def test_numbers_are_those_of_the_original_annotations(shared_data, tmp_path):
    """The truth goes through our samples, results through category ids, and nothing is lost on the way."""
    data = DetectionData(str(shared_data / "coco_det"), masks=True, check=False, num_workers=0)
    data.setup("validate")
    dataset = data.datasets["val"]
    evaluation = CocoEvaluation(dataset.coco(), data.class_names, masks=True)
    rng = np.random.default_rng(0)
    for sample in dataset.samples:
        target = sample.target()
        boxes, masks = target["boxes"].numpy(), target["masks"].numpy()
        shift = rng.integers(-4, 5)
        evaluation.update(
            [target],
            [
                {
                    "boxes": torch.from_numpy(boxes + rng.normal(0, 3, boxes.shape)),
                    "labels": target["labels"],
                    "scores": torch.from_numpy(rng.random(len(boxes))),
                    "masks": torch.from_numpy(np.roll(masks, shift, axis=2))[:, None].float(),
                }
            ],
        )
    scores = evaluation.compute()
    evaluation.save(tmp_path)
    file = shared_data / "coco_det" / "annotations" / "instances_val2017.json"
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats, classes = by_hand(str(file), tmp_path / f"results_{name}.json", kind)
        assert [scores[f"{name}_{score}"] for score in BOXES] == stats[:6].tolist()
        for label, value in classes.items():
            assert scores[f"{name}_AP/{label}"] == pytest.approx(value, abs=0, rel=0, nan_ok=True)
        print(name, stats[:6])
        assert 0.2 < scores[f"{name}_AP"] < 0.95


def test_perfect_predictions_score_one():
    scores = evaluate(make_truth(), noise=0.0).compute()
    assert {name for name, value in scores.items() if not math.isnan(value)} >= {"box_AP", "mask_AP75", "box_AP/cat"}
    assert all(value == pytest.approx(1) for value in scores.values() if not math.isnan(value))


def test_annotation_zero_counts():
    """pycocotools takes a hit on it for none."""
    truth = make_truth(1)
    truth["annotations"] = truth["annotations"][:1]
    truth["annotations"][0]["iscrowd"] = 0
    assert truth["annotations"][0]["id"] == 0
    assert evaluate(truth).compute()["box_AP"] == pytest.approx(1)


def test_what_is_found_within_a_crowd_is_no_false_positive():
    def score(iscrowd):
        truth = make_truth(1)
        single, crowd = (copy.deepcopy(truth["annotations"][0]) for _ in range(2))
        single.update(bbox=[0.0, 0.0, 20.0, 20.0], area=400.0, iscrowd=0, category_id=3)
        crowd.update(bbox=[50.0, 50.0, 100.0, 100.0], area=10000.0, iscrowd=iscrowd, category_id=3)
        truth["annotations"] = [single, crowd]
        evaluation = CocoEvaluation(truth, NAMES)
        boxes = torch.tensor([[0.0, 0, 20, 20], [60, 60, 80, 80], [90, 60, 110, 80], [10, 100, 30, 120]])
        scores = torch.tensor([0.5, 0.9, 0.9, 0.1])  # in the crowd are the surest
        evaluation.update(
            [{"image_id": 10}], [{"boxes": boxes, "labels": torch.ones(4, dtype=torch.int64), "scores": scores}]
        )
        return evaluation.compute()["box_AP50"]

    assert score(iscrowd=1) == pytest.approx(1)
    assert score(iscrowd=0) == pytest.approx(51 / 101 / 3)  # half of the two found, at a precision of one third


def test_no_predictions_score_zero_and_can_be_saved(tmp_path):
    truth = make_truth()
    evaluation = CocoEvaluation(truth, NAMES, masks=True)
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, *SIZE),
    }
    evaluation.update([{"image_id": image["id"]} for image in truth["images"]], [empty] * len(truth["images"]))
    scores = evaluation.compute()
    assert (scores["box_AP"], scores["mask_AP"]) == (0, 0)
    assert json.loads(evaluation.save(tmp_path)[0].read_text()) == []


def test_results_are_in_cocos_format(tmp_path):
    truth = make_truth(1)
    box = [round(v, 3) for v in truth["annotations"][0]["bbox"]]
    evaluation = evaluate(truth)
    files = evaluation.save(tmp_path / "new")
    assert [file.name for file in files] == ["results_box.json", "results_mask.json", "truth.json"]
    boxes, masks = (json.loads(file.read_text()) for file in files[:2])
    assert boxes[0].keys() == {"image_id", "category_id", "bbox", "score"}
    assert boxes[0]["image_id"] == 10
    assert {entry["category_id"] for entry in boxes} <= {3, 7}, "the data set's ids, not labels"
    assert [round(v, 3) for v in boxes[0]["bbox"]] == pytest.approx(box, abs=1e-3)
    assert masks[0].keys() == {"image_id", "category_id", "segmentation", "score"}
    assert rle.encode(masks[0]["segmentation"], *SIZE) == truth["annotations"][0]["segmentation"]["counts"]


def test_only_images_that_were_seen_count_and_each_once(tmp_path):
    truth = make_truth()
    evaluation = CocoEvaluation(truth, NAMES, masks=True)
    for image_id in (10, 20, 10, 10):
        evaluation.update([{"image_id": torch.tensor(image_id)}], [predict(truth, image_id, 0.1, 2)])
    part = {**truth, "images": truth["images"][:2]}
    part["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in (10, 20)]
    assert evaluation.compute() == pytest.approx(evaluate(part, noise=0.1, extra=2).compute(), nan_ok=True, abs=0)
    assert evaluation.compute()["box_AP"] != evaluate(truth, noise=0.1, extra=2).compute()["box_AP"]
    evaluation.save(tmp_path)
    assert [image["id"] for image in json.loads((tmp_path / "truth.json").read_text())["images"]] == [10, 20]
    evaluation.reset()
    assert math.isnan(evaluation.compute()["box_AP"])


def test_it_is_quiet_and_leaves_the_truth_alone(capsys):
    truth = make_truth()
    before = copy.deepcopy(truth)
    evaluate(truth).compute()
    assert capsys.readouterr() == ("", "")
    assert truth == before


def test_misuse_is_named():
    truth = make_truth()
    with pytest.raises(InputError, match="image_id 5 is not among the 6 images"):
        CocoEvaluation(truth, NAMES).update([{"image_id": 5}], [predict(truth, 10)])
    boxes = {name: value for name, value in predict(truth, 10).items() if name != "masks"}
    with pytest.raises(InputError, match="the predictions have none"):
        CocoEvaluation(truth, NAMES, masks=True).update([{"image_id": 10}], [boxes])
    with pytest.raises(InputError, match="the truth has the categories cat, dog, tree"):
        CocoEvaluation(truth, ["background", "wolf"])
    small = {**predict(truth, 10), "masks": predict(truth, 10)["masks"][..., :50]}
    with pytest.raises(InputError, match=r"masks of image 10 are \(160, 50\)"):
        CocoEvaluation(truth, NAMES, masks=True).update([{"image_id": 10}], [small])


WORKER = """
import importlib.util, json, sys
import torch.distributed as dist
rank, init, test_file, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
spec = importlib.util.spec_from_file_location("kit", test_file)
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)
dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
truth = kit.make_truth(7)
evaluation = kit.CocoEvaluation(truth, kit.NAMES, masks=True)
ids = [image["id"] for image in truth["images"]]
for image_id in (ids + ids[:1])[rank::2]:  # a sampler that repeats the first image, so that both get four
    evaluation.update([{"image_id": image_id}], [kit.predict(truth, image_id, noise=0.08, extra=3)])
scores = evaluation.compute()
files = evaluation.save(out)
print(json.dumps([scores, [file.name for file in files]]))
"""


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    expected = evaluate(make_truth(7), noise=0.08, extra=3)
    arguments = [f"file://{tmp_path}/init", __file__, str(tmp_path / "out")]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    (scores, files), (other, none) = (json.loads(output.splitlines()[-1]) for output in outputs)
    print(scores)
    assert scores == pytest.approx(expected.compute(), nan_ok=True, abs=0, rel=0)
    assert other == pytest.approx(scores, nan_ok=True, abs=0, rel=0)
    assert (len(files), none) == (3, []), "one process writes"
    expected.save(tmp_path / "one")
    for name in files:
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "out" / name).read_text()
