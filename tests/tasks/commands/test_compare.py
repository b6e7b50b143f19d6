"""`backbones compare`: one recipe, several backbones, one table; interrupted, failing, resumed."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_files import same, weights

from backbones.cli import main
from backbones.cli.bench import timing
from backbones_tasks.commands import comparison
from backbones_tasks.pictures.tradeoff import _unbeaten, save_tradeoff
from backbones_tasks.training.callbacks import read_metrics
from backbones_tasks.training.segmentation import SegmentationTask

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=32",
    "--data.shapes.train=8",
    "--data.shapes.val=4",
    "--data.batch_size=4",
    "--model.decoder_options={decoder_channels: 8}",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


class PowerCut(BaseException):
    """Ends a process without a word."""


@pytest.fixture
def started(monkeypatch):
    """Trainings run in the test's own process, which is faster; these are their folders and whether they went on."""
    runs = []

    def run(argv, log):
        monkeypatch.delenv("BACKBONES_RUN", raising=False)
        runs.append((Path(argv[argv.index("--out") + 1]).name, "--ckpt_path" in argv))
        log.touch()
        try:
            return "" if main(argv) == 0 else "refused"
        except Exception as error:
            return str(error)

    monkeypatch.setattr(comparison, "_in_process", run)
    monkeypatch.setattr(comparison, "SECONDS", 0.05)
    monkeypatch.setattr(timing, "_peak_memory", lambda case: 12.5)  # takes a process of its own
    return runs


def compared(*options):
    return main(["compare", "segmentation", *map(str, options)])


def table(folder="c"):
    with Path(folder, "comparison.csv").open(newline="") as file:
        return {row["backbone"]: row for row in csv.DictReader(file)}


def metrics(run):
    return read_metrics(Path(run, "metrics.csv"))


def break_off(patch, backbone, epoch):
    """Have the training of a backbone end abruptly in an epoch."""
    step = SegmentationTask.training_step

    def breaks_off(self, batch, batch_idx):
        if self.hparams["backbone"]["name"].endswith(backbone) and (self.current_epoch, batch_idx) == (epoch, 1):
            raise PowerCut
        return step(self, batch, batch_idx)

    patch.setattr(SegmentationTask, "training_step", breaks_off)


def test_an_interrupted_comparison_goes_on_exactly_and_ends_in_one_table(started, monkeypatch, capsys):
    names = ["mobilevit_xxs", "{name: edgevit_xxs, drop_path_rat: 0.1}", "mobilevitv2_050"]
    with monkeypatch.context() as patch:
        break_off(patch, "mobilevitv2_050", epoch=1)
        with pytest.raises(PowerCut):
            compared("--backbones", *names, "--out=c", *SMALL)
    assert started == [("mobilevit_xxs", False), ("edgevit_xxs", False), ("mobilevitv2_050", False)]
    assert table()["mobilevitv2_050"]["note"] == "not trained yet", "as it was when the one before it ended"
    assert main(["compare", "segmentation", "--out", "c", "--report"]) == 0
    assert table()["mobilevitv2_050"]["note"] == "not finished: 1 epochs so far"
    assert table()["mobilevitv2_050"]["mIoU"] == ""

    del started[:]
    torch.rand(3)  # a new process has another state
    capsys.readouterr()
    assert compared("--out=c") == 1, "one of them failed"
    assert started == [("edgevit_xxs", False), ("mobilevitv2_050", True)], "what is finished stays as it is"
    monkeypatch.delenv("BACKBONES_RUN", raising=False)
    assert main(["fit", "segmentation", *SMALL, "--backbone=mobilevitv2_050", "--out=whole"]) == 0
    assert same(weights("whole"), weights("c/mobilevitv2_050"))

    rows = table()
    assert list(rows)[-1] == "edgevit_xxs", "failures come last"
    assert rows["edgevit_xxs"]["note"] == "refused"
    best = [float(rows[name]["mIoU"]) for name in list(rows)[:2]]
    assert best == sorted(best, reverse=True)
    for name in ("mobilevit_xxs", "mobilevitv2_050"):
        row, run = rows[name], metrics(f"c/{name}")
        assert float(row["mIoU"]) == max(float(epoch["mIoU"]) for epoch in run)
        assert run[int(row["best_epoch"]) - 1]["mIoU"] == row["mIoU"]
        model = SegmentationTask(name, num_classes=5, decoder_options={"decoder_channels": 8}).model
        assert float(row["params_m"]) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.006)
        assert float(row["latency_ms"]) > 0
        assert float(row["gmacs"]) > 0
        assert row["peak_mb"] == "12.5"
        assert int(row["training_mb"]) > 100
    printed = capsys.readouterr().out
    lines = Path("c/comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == list(rows)
    assert all(name in printed for name in rows)
    assert "batch 1, 32 x 32" in lines[-1], "what latency was measured for"
    assert Image.open("c/comparison.png").size[0] > 800


def test_the_recipe_of_a_folder_stays_and_backbones_may_be_added(started, capsys):
    Path("recipe.yaml").write_text("model:\n  backbone: {name: pvt_v2_b0, drop_path_rate: 0.1}\n  lr: 5.0e-4\n")
    own = ["--config=recipe.yaml", "--trainer.max_epochs=1", *SMALL[:5], *SMALL[6:]]
    assert compared("--backbones", "mobilevit_xxs", "--out=c", *own) == 0
    before = weights("c/mobilevit_xxs")
    saved = torch.load("c/mobilevit_xxs/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["backbone"]["name"] == "mobilevit/mobilevit_xxs"
    assert saved["backbone"]["drop_path_rate"] == 0.1
    assert saved["lr"] == 5e-4

    capsys.readouterr()
    assert compared("--out=c", "--model.lr=0.1", "--data.flip=0.1") == 2
    refusal = capsys.readouterr().err
    assert "model.lr was 0.0005 and would be 0.1" in refusal
    assert "data.flip was 0.5 and would be 0.1" in refusal
    assert compared("--backbones", "mobilevit_xxs", "--out=c", *own, "--model.ema=0.9") == 2
    assert "model.ema was 0.0 and would be 0.9" in capsys.readouterr().err
    assert len(started) == 1

    more = "{name: mobilevit_xxs, drop_path_rate: 0.0}"
    assert compared("--backbones", "mobilevit_xxs", more, "--out=c", *own) == 0
    assert started[1:] == [("mobilevit_xxs-drop_path_rate=0.0", False)]
    assert same(before, weights("c/mobilevit_xxs"))
    assert set(table()) == {"mobilevit_xxs", "mobilevit_xxs drop_path_rate=0.0"}


def test_reports_are_made_of_what_is_there(started):
    assert compared("--backbones", "mobilevit_xxs", "--out=c", *SMALL, "--trainer.max_epochs=1") == 0
    files = {end: Path("c", f"comparison.{end}") for end in ("md", "csv", "png")}
    texts = {end: files[end].read_text() for end in ("md", "csv")}
    for file in files.values():
        file.unlink()
    assert compared("--out=c", "--report") == 0
    assert {end: files[end].read_text() for end in texts} == texts
    assert files["png"].is_file()
    assert len(started) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbones", "mobilevit_xxz"], "did you mean 'mobilevit_xxs'"),
        (["--backbones", "{drop_path_rate: 0.1}"], 'lack "name"'),
        (["--backbones", "{name: mobilevit_xxs, model.pol: max}"], "model.pol"),
        (["--backbones", "{name: mobilevit_xxs, data.batch_size: 2}"], "data.batch_size: a backbone may have options"),
        ([], "--backbones NAME NAME"),
        (["--backbones", "mobilevit_xxs", "--backbone", "pvt_v2_b0"], "not --backbone"),
        (["--backbones", "mobilevit_xxs", "--model.backbone=pvt_v2_b0"], "not --backbone"),
        (["--backbones", "mobilevit_xxs", "--ckpt_path", "last"], "goes on by itself"),
        (["--backbones", "mobilevit_xxs", "--model.lrr=1"], "did you mean 'model.lr'?"),
        (["--backbones", "mobilevit_xxs", "--model.ema=2"], "model.ema=2.0 must be"),
        (["--backbones", "mobilevit_xxs", "--out=run"], "run holds a run, not a comparison"),
        (["--report"], "--report goes with --out DIR alone"),
        (["--report", "--out=run"], "run holds no comparison"),
        (["--report", "--out=detection"], "detection compares detection, not segmentation"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(options, message, started, capsys):
    Path("run/checkpoints").mkdir(parents=True)
    Path("detection").mkdir()
    Path("detection/comparison.json").write_text('{"task": "detection", "backbones": []}')
    assert compared(*options) == 2
    assert message in capsys.readouterr().err
    assert not started
    assert not Path("runs").exists()


def test_a_backbone_may_have_a_pool_of_its_own(started):
    short = ["--trainer.max_epochs=1", *SMALL[:4], *SMALL[6:]]
    rows = ["mobilevit_xxs", "{name: mobilevit_xxs, model.pool: catavgmax}", "{name: mobilevit_xxs, model.pool: max}"]
    for _ in range(2):  # the second time nothing is left to do
        assert main(["compare", "classification", "--backbones", *rows, "--out=p", *short]) == 0
    table = Path("p/comparison.md").read_text()
    assert [line in table for line in ("| mobilevit_xxs pool=catavgmax |", "| mobilevit_xxs pool=max |")] == [True] * 2
    assert len(started) == 3
    for run, pool, width in (("mobilevit_xxs", None, 320), ("mobilevit_xxs-pool=catavgmax", "catavgmax", 640)):
        trained = torch.load(f"p/{run}/checkpoints/best.ckpt", weights_only=True)
        assert trained["hyper_parameters"]["pool"] == pool
        assert trained["state_dict"]["model.backbone.head.weight"].shape[1] == width


def test_detectors_and_classifiers_are_compared_by_their_own_scores(started):
    detector = ["--model.detector_options={fpn_channels: 8, box_channels: 8}", "--model.detector=mask_rcnn"]
    short = ["--backbones", "mobilevit_xxs", "--trainer.max_epochs=1", *SMALL[:4], *SMALL[6:]]
    assert main(["compare", "detection", "--out=d", *detector, *short]) == 0
    assert main(["compare", "classification", *short]) == 0
    assert {"box_AP", "box_AP50", "mask_AP"} <= table("d")["mobilevit_xxs"].keys()
    classified = table("runs/compare-classification-001")["mobilevit_xxs"]
    assert float(classified["top1"]) <= float(classified["top5"]) == 1
    assert float(classified["gmacs"]) > 0


@pytest.mark.parametrize(
    ("code", "printed", "reason"),
    [
        (0, ["RuntimeError: recovered from"], ""),
        (-9, ["epoch 1"], "ended by SIGKILL, as where memory is short"),
        (2, ["backbones: error: no such file", ""], "no such file"),
        (1, ["Traceback", "  File x", "torch.OutOfMemoryError: CUDA", "in a pipe"], "torch.OutOfMemoryError: CUDA"),
        (3, ["something", "  indented"], "something"),
        (3, [], "ended with code 3"),
    ],
)
def test_why_a_process_failed_is_told_in_a_line(code, printed, reason):
    assert comparison._reason(code, printed) == reason


def test_a_process_is_heard_and_its_end_is_told(tmp_path, capsys):
    log = tmp_path / "log.txt"
    assert comparison._in_process(["info", "no_such_backbone"], log).startswith("there is no backbone 'no_such")
    assert "no_such_backbone" in log.read_text()
    assert "  backbones: error: " in capsys.readouterr().out


def test_models_that_are_beaten_in_both_are_off_the_line(tmp_path):
    latencies, scores = [3, 1, 2, 2, 9], [0.5, 0.2, 0.4, 0.3, 0.45]
    assert _unbeaten(latencies, scores) == [1, 2, 0]
    for count in (1, 5):
        names = [f"a_long_name_of_backbone_{i}" for i in range(count)]
        save_tradeoff(tmp_path / "t.png", names, latencies[:count], scores[:count], [1, 2, 3, 4, 5][:count], "mIoU")
        assert Image.open(tmp_path / "t.png").size[0] > 800


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_process_behind_and_goes_on(workplace):
    command = [sys.executable, "-m", "backbones", "compare", "segmentation", "--out", "c"]
    environment = {k: v for k, v in os.environ.items() if k != "BACKBONES_RUN"}
    names = ["--backbones", "mobilevit_xxs", "mobilevitv2_050"]
    small = [*SMALL, "--data.shapes.train=200", "--trainer.max_epochs=3"]
    first = subprocess.Popen([*command, *names, *small], env=environment)
    while not Path("c/mobilevitv2_050/checkpoints/last.ckpt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert children
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/stat").exists() for child in children):
        assert time.monotonic() < deadline, "the training goes on without anybody to hear of it"
        time.sleep(0.1)
    before = Path("c/mobilevit_xxs/checkpoints/last.ckpt").stat().st_mtime_ns
    assert len(metrics("c/mobilevitv2_050")) < 3
    subprocess.run(command, env=environment, check=True)
    assert Path("c/mobilevit_xxs/checkpoints/last.ckpt").stat().st_mtime_ns == before
    assert "going on from" in Path("c/mobilevitv2_050/log.txt").read_text()
    assert main(["fit", "segmentation", *small, "--backbone=mobilevitv2_050", "--out=whole"]) == 0
    assert same(weights("whole"), weights("c/mobilevitv2_050"))
    assert all(float(row["peak_mb"]) > 1 for row in table().values())
