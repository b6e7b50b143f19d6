"""Every option of the four tasks with values that cannot be: refused by name, in a line, with no run folder made."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from pytorch_lightning import Trainer

from backbones.cli import main
from backbones_tasks.ranges import RANGES
from backbones_tasks.training.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from test_ranges import OPTIONS, outside

SMALL = ["--data.shapes.size=32", "--data.shapes.train=4", "--data.shapes.val=2"]
DECIDED = {"model.num_classes", "model.ignore_index", "model.seed", "data.seed", "model.image_size", "model.crop"}
READING = {"data.bands", "data.mean", "data.std", "data.nodata", "data.range"}  # these have a campaign of their own
FIXED = DECIDED | READING
OTHERS = {
    "model.backbone": [
        "nothing",
        "{pretrained: true}",
        "{name: pvt_v2_b0, drop_path_rate: 2}",
        "{name: pvt_v2_b0, in_chans: 0}",
    ],
    "model.optimizer": ["adamm", "{}", "3.5"],
    "model.optimizer_options": ["{betas: [2, 2]}", "{beta: 1}", "[1]"],
    "model.schedule": ["cosinus", "[]"],
    "model.schedule_options": ["{decay_rat: 1}", "3"],
    "data.root": ["nowhere", "/dev/null"],
    "data.check": ["maybe"],
    "data.shapes": ["3", "{sise: 3}"],
    "trainer.accelerator": ["abacus"],
    "trainer.strategy": ["none-such"],
    "trainer.precision": ["7"],
    "trainer.devices": ["0", "[]", "many"],
    "trainer.gradient_clip_algorithm": ["norms"],
    "trainer.max_time": ["soon"],
}
OF_TASK = {
    "segmentation": {
        "model.decoder": ["upernett", "smp/unte"],
        "model.decoder_options": ["{decoder_channels: -8}", "{channels: 8}", "3"],
        "model.loss": ["cee", "ce+", "ce+ce"],
        "model.loss_options": ["{ce: {label: 1}}", "{dice: {}}", "{ohem: {thresh: 2}}"],
        "model.class_weights": ["[1, 2]", "balancedd"],
        "model.aux": ["7"],
        "data.layout": ["ade"],
    },
    "classification": {"model.pool": ["mean"], "data.auto_augment": ["randaug"], "data.faults": ["ignore"]},
    "detection": {
        "model.detector": ["yolo"],
        "model.detector_options": ["{fpn_channel: 8}", "{fpn_channels: -8}", "{batch_norm: none}"],
        "data.classes": ["[cat]"],
    },
    "multitask": {
        "model.heads": ["{'a': {}}", "{'a': {task: none}}", "3", "{a: {task: detection, weight: -1}}"],
        "data.order": ["any"],
    },
}


def cases():
    """Options with values that cannot be; what tasks share is walked over once, with segmentation."""
    seen = set()
    for task in TASKS:
        found = {}
        for option in sorted(option for owner, option in OPTIONS if owner == task and option not in FIXED):
            key = option if f"{task}:{option}" not in RANGES else f"{task}:{option}"
            if key in seen:
                continue
            seen.add(key)
            below, *_, not_a_number, _ = outside(RANGES[key])
            values = [below, ".nan" if not_a_number != below else ".inf", "{a: 1}"]
            found[option] = [f"[{v}, {v}]" if RANGES[key].rising and v != "{a: 1}" else str(v) for v in values]
        shared = OTHERS if task == "segmentation" else {}
        for option, values in {**found, **shared, **OF_TASK[task]}.items():
            yield from ((task, option, value) for value in values)


@pytest.mark.slow  # hundreds of command lines
def test_values_that_cannot_be_are_refused_by_name_before_a_run_folder_is_made(workplace, monkeypatch, capsys):
    class Started(Exception):
        pass

    def starts(*args, **kwargs):
        raise Started

    monkeypatch.setattr(Trainer, "fit", starts)
    counts, wrong = Counter(), []
    for task, option, value in cases():
        argument = f"--{option}={value}"
        small = [] if task == "multitask" else SMALL
        try:
            code = main(["fit", task, *small, "--trainer.accelerator=cpu", argument])
            verdict = "refused" if code == 2 else f"exit code {code}"
        except Started:
            verdict = "silent"
        except BaseException as error:
            verdict = f"raw {type(error).__name__}: {error}"
        told = capsys.readouterr().err
        if verdict == "refused":
            if Path("runs").exists():
                verdict = "left a run folder"
            elif told.count("\n") != 1:
                verdict = f"not one line: {told}"
            elif not any(
                word in told for word in (option.rpartition(".")[2], value, *re.findall(r"\w{3,}|'a'", value))
            ):
                verdict = f"not named: {told}"
        with capsys.disabled():
            print(task, argument, verdict, flush=True)
        counts[verdict if verdict in ("refused", "silent") else verdict.split()[0]] += 1
        if verdict != "refused":
            wrong.append(f"{task} {argument}: {verdict}")
        if Path("runs").exists():
            shutil.rmtree("runs")
            monkeypatch.delenv("BACKBONES_RUN", raising=False)
    print(dict(counts))
    assert counts["refused"] > 71
    assert not wrong, "\n".join(wrong)
