"""Trainings of the four tasks that are killed at any moment, and go on: `python tests/campaign/kills.py 50`.

Each is ended by SIGKILL, SIGTERM or a disk that is full from some moment on. Then every checkpoint that is there must
be readable, and the run must go on to the same numbers, to the last digit, as one that nobody ended. Trainings are
forked from this process, which has imported what they need. Prints one line of JSON with counts.
"""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from run_files import rows, same, weights

from backbones.cli import main
from backbones.errors import BackboneError
from backbones_tasks.commands import fit as _  # noqa: F401  (imported once, for all that are forked)
from backbones_tasks.files import is_checkpoint, read_checkpoint

SHAPES = {"size": 32, "train": 8, "val": 2}
COMMON = ["--data.batch_size=4", *(f"--data.shapes.{k}={v}" for k, v in SHAPES.items())]
DETECTOR = {"fpn_channels": 16}
HEADS = {
    "det": {"task": "detection", "detector": "retinanet", "detector_options": DETECTOR},
    "cls": {"task": "classification"},
}
TASKS = {
    "segmentation": [*COMMON, "--model.decoder_options={decoder_channels: 8}"],
    "classification": COMMON,
    "detection": [*COMMON, "--model.detector=retinanet", f"--model.detector_options={json.dumps(DETECTOR)}"],
    "multitask": [
        f"--model.heads={json.dumps(HEADS)}",
        f"--data.heads={json.dumps({name: {'batch_size': 4, 'shapes': SHAPES} for name in HEADS})}",
    ],
}
TRAINER = ["--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
DISK = 400  # MiB


def start(arguments, folder):
    """A training in a process of its own; what it says goes to a file."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 98
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def finish(child):
    """Its exit code; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill(folder):
    """Leave no byte free on its disk."""
    with (folder / "filler").open("wb", buffering=0) as stream:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(b"\0" * size)


@contextlib.contextmanager
def small_disk(folder):
    """A disk of few MiB at a folder, where this process may mount one; yields whether."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "none", folder], capture_output=True, check=False
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


def read_all(run):
    """Every file of a run that is read again, whole; returns how many checkpoints there are."""
    if (run / "metrics.csv").exists():
        with (run / "metrics.csv").open(newline="") as stream:
            assert all(row["epoch"].isdigit() for row in csv.DictReader(stream))
    found = [path for path in (run / "checkpoints").glob("[!.]*.ckpt") if is_checkpoint(path)]
    for path in found:
        assert {"state_dict", "optimizer_states"} <= read_checkpoint(path).keys()
    return len(found)


def kill(task, how, place, epochs, after, whole):
    """End a training so many seconds after so many epochs, check it, go on with it.

    Returns what was there, or None if it ended before.
    """
    begin = ["fit", task, *TASKS[task], *TRAINER, "--out=run"]
    child = start(begin, place)
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return None
        if deadline is None and (place / "said.txt").exists():
            said = (place / "said.txt").read_text()
            if epochs < 0 or ("run folder: " in said and said.count("\nepoch ") >= epochs):
                deadline = time.monotonic() + after
        time.sleep(0.005)
    if how == "disk":
        fill(place)
    else:
        os.kill(child, getattr(signal, how))
    code, said = finish(child), (place / "said.txt").read_text()
    (place / "filler").unlink(missing_ok=True)
    if code == 0:
        return None
    run = place / "run"
    began = (run / "config.yaml").exists()
    if how == "SIGTERM" and "run folder: " in said:
        assert code == 143, (code, said)
        assert "go on with: backbones fit" in said, said
    if how == "disk":
        assert code == 2, (code, said)
        assert "Traceback" not in said, said
    kept = read_all(run) if began else 0
    again = ["fit", task, "--out=run", "--ckpt_path=last"] if began else begin
    code = finish(start(again, place))
    assert code == 0, (again, (place / "said.txt").read_text())
    assert rows(run) == rows(whole), (rows(run), rows(whole))
    assert same(weights(run), weights(whole))
    assert same(weights(run, "best"), weights(whole, "best"))
    return "with a checkpoint" if kept else "within the first epoch" if began else "before the run folder"


def campaign(count, folder, seed=0):
    """So many kills; counts by task, by means and by what was there."""
    draw, counts = random.Random(seed), Counter()
    os.chdir(folder)
    warm = ["fit", "segmentation", *TASKS["segmentation"], *TRAINER, "--trainer.max_epochs=1", "--out=warm"]
    with contextlib.redirect_stdout(sys.stderr):
        main(warm)  # all that is imported late is, before anything is forked
    os.environ.pop("BACKBONES_RUN")
    whole, seconds = {}, {}
    for task in TASKS:
        place = folder / f"whole-{task}"
        place.mkdir()
        began = time.monotonic()
        code = finish(start(["fit", task, *TASKS[task], *TRAINER, "--out=run"], place))
        assert code == 0, (place / "said.txt").read_text()
        whole[task], seconds[task] = place / "run", time.monotonic() - began
    with small_disk(folder / "disk") as mounted:
        means = ["SIGKILL", "SIGTERM", *(["disk"] if mounted else [])]
        number = 0
        while counts["kills"] < count:
            task, how = list(TASKS)[number % 4], means[number // 4 % len(means)]
            place = (folder / "disk" if how == "disk" else folder) / f"{number:03d}"
            number += 1
            place.mkdir()
            try:
                epochs = draw.choice((-1, 0, 0, 1, 1, 2, 2))
                found = kill(task, how, place, epochs, draw.uniform(0, seconds[task] / 3), whole[task])
            except (AssertionError, BackboneError) as error:
                counts["kills"] += 1
                counts["failed"] += 1
                print(f"{task} {how}: {error}", file=sys.stderr, flush=True)
                continue
            finally:
                shutil.rmtree(place, ignore_errors=True)
            if found is None:
                counts["ended before"] += 1
                continue
            counts.update(["kills", task, how, found])
            print(f"{counts['kills']} {task} {how} {found}", file=sys.stderr, flush=True)
    return dict(counts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(campaign(int(sys.argv[1]), Path(scratch))))
