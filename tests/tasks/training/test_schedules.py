"""Schedules: timm's rates step by step, warm-up told in epochs or steps, cycles that fill the training, a plateau."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_files import rows, same, weights
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import SGD

from backbones.cli import main
from backbones.errors import InputError
from backbones_tasks.training.schedules import OPTIONS, make_schedule
from backbones_tasks.training.segmentation import SegmentationTask

LR, EPOCHS, PER_EPOCH = 0.5, 10, 10
STEPS = EPOCHS * PER_EPOCH
CYCLES = {"cycle_limit": 2, "cycle_mul": 3.0, "cycle_decay": 0.5}
# ours, and what timm is told for the same
CASES = [
    *(pytest.param(name, {}, {}, EPOCHS, id=name) for name in ("cosine", "tanh", "constant", "wsd", "rsqrt")),
    pytest.param("poly", {}, {"decay_rate": 0.9}, EPOCHS, id="poly"),
    pytest.param("step", {"decay_epochs": 3, "decay_rate": 0.5}, {}, EPOCHS, id="step"),
    pytest.param("multistep", {"decay_milestones": [3, 7], "decay_rate": 0.1}, {}, EPOCHS, id="multistep"),
    pytest.param("cosine", {"cycle_limit": 2}, {}, 5, id="two cycles"),
    pytest.param("cosine", CYCLES, {}, 2.5, id="a second cycle three times as long"),
    pytest.param("tanh", CYCLES, {}, 2.5, id="tanh in cycles"),
    pytest.param("poly", CYCLES, {"decay_rate": 0.9}, 2.5, id="poly in cycles"),
    pytest.param(
        "cosine", {"cycle_limit": 4, "cycle_decay": 0.5, "min_lr": 0.01, "cooldown_epochs": 2}, {}, 2, id="cooldown"
    ),
    pytest.param("cosine", {"warmup_prefix": True}, {}, EPOCHS - 1, id="warm-up before the cycle"),
    pytest.param("cosine", {"k_decay": 0.5, "noise": [0.4, 0.9], "noise_pct": 0.3}, {}, EPOCHS, id="noise"),
    pytest.param("step", {"decay_epochs": 3, "warmup_prefix": True}, {}, EPOCHS, id="warm-up before steps"),
]
SMALL = ["--data.shapes.size=32", "--data.shapes.train=2", "--data.shapes.val=2", "--data.batch_size=2"]
SMALL += ["--model.decoder_options={decoder_channels: 8}", "--backbone=timm/test_resnet"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def optimizer():
    """Two groups, one of which learns at a tenth."""
    return SGD([{"params": [nn.Parameter(torch.ones(1))], "lr_scale": s} for s in (1.0, 0.1)], lr=LR)


def options(schedule, own=None, **more):
    return {"schedule": schedule, "schedule_options": own or {}, "lr": LR, "warmup": 0.1, **more}


def rates(scheduler, optimizer):
    found = []
    for step in range(STEPS):
        found.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step_update(step + 1)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("name", "own", "also", "length"), CASES)
def test_rates_are_timms_at_each_of_100_steps(name, own, also, length):
    ours, theirs = optimizer(), optimizer()
    told = {"updates_per_epoch": PER_EPOCH, "step_on_epochs": False, "warmup_epochs": 1, "warmup_lr": LR / 100}
    scheduler, epochs = create_scheduler_v2(theirs, name, num_epochs=length, **told, **own, **also)
    found = rates(make_schedule(options(name, own), ours, STEPS, EPOCHS), ours)
    assert torch.allclose(found, rates(scheduler, theirs), rtol=1e-9, atol=1e-12)
    assert torch.allclose(found[:, 1], found[:, 0] / 10)
    assert epochs in (EPOCHS, EPOCHS + 1), "timm counts as many, a warm-up before steps aside"
    if "cycle_limit" in own:
        rises = found[11:, 0] > found[10:-1, 0] + 1e-9
        assert rises.sum() == own["cycle_limit"] - 1, "every cycle begins within the training"


@pytest.mark.parametrize("warmup", [{"warmup_epochs": 3}, {"warmup_steps": 30}, {"warmup": 0.3}])
def test_a_warmup_is_told_as_a_share_in_epochs_or_in_steps(warmup):
    found = optimizer()
    seen = rates(make_schedule(options("constant", **{**warmup, "warmup_lr": 0.2}), found, STEPS, EPOCHS), found)[:, 0]
    assert seen[:30].tolist() == pytest.approx([0.2 + 0.3 * step / 30 for step in range(30)])
    assert seen[30:].tolist() == pytest.approx([LR] * 70)


@pytest.mark.parametrize(
    ("name", "own", "more", "message"),
    [
        ("cosinus", {}, {}, "did you mean 'cosine'"),
        ("cosine", {"decay_rat": 1}, {}, "cosine has no option 'decay_rat'"),
        ("cosine", {"decay_milestones": [1]}, {}, "cosine has no option 'decay_milestones'"),
        ("step", {"cycle_limit": 2}, {}, "step has no option 'cycle_limit'"),
        ("none", {"min_lr": 1}, {}, "it takes none"),
        ("none", {}, {"warmup_lr": 0.1}, "has no warm-up"),
        ("cosine", {"cycle_mul": 2}, {}, "give cycle_limit"),
        ("cosine", {"cycle_limit": 0}, {}, "whole number of cycles"),
        ("cosine", {"cycle_limit": 2, "cycle_mul": 0}, {}, "cycle_mul must be over 0"),
        ("cosine", {"cooldown_epochs": 10}, {}, "0 are left for the cycles"),
        ("cosine", {"noise_pct": 0.5}, {}, "no noise without noise"),
        ("cosine", {"warmup_epochs": 2}, {}, "--model.warmup_epochs"),
        ("wsd", {"decay_epochs": 20}, {}, "requires 0 < decay_epochs"),
        ("cosine", {}, {"warmup_epochs": 11}, "longer than the training, which is 10 epochs"),
        ("cosine", {}, {"warmup_epochs": 1, "warmup_steps": 10}, "give one of them"),
        ("plateau", {"plateau_mode": "up"}, {}, "mode up"),
    ],
)
def test_what_would_have_no_effect_or_cannot_be_is_refused(name, own, more, message):
    with pytest.raises(InputError, match=message):
        make_schedule(options(name, own, **more), optimizer(), STEPS, EPOCHS)


def test_every_schedule_is_one_that_timm_has():
    for name in OPTIONS.keys() - {"none"}:
        assert make_schedule(options(name), optimizer(), STEPS, EPOCHS) is not None
    assert make_schedule(options("none"), optimizer(), STEPS, EPOCHS) is None


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_plateau_lowers_the_rate_when_timms_does(mode):
    own = {"patience_epochs": 1, "decay_rate": 0.5, "min_lr": 0.02}
    scores = [0.1, 0.3, 0.2, 0.3, 0.3, 0.4, 0.1, 0.2, 0.2, 0.2]
    ours, theirs = optimizer(), optimizer()
    scheduler = make_schedule(
        options("plateau", own | {"monitor": "x_loss" * (mode == "min") or "x"}), ours, STEPS, EPOCHS
    )
    timms, _ = create_scheduler_v2(
        theirs, "plateau", EPOCHS, plateau_mode=mode, warmup_epochs=1, warmup_lr=LR / 100, **own
    )
    for epoch, score in enumerate(scores):
        for step in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH):
            scheduler.step_update(step + 1)
        scheduler.judge({scheduler.monitor: torch.tensor(score)}, (epoch + 1) * PER_EPOCH)
        timms.step(epoch + 1, score)
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups])
    assert ours.param_groups[0]["lr"] < LR
    with pytest.raises(InputError, match="is not measured"):
        scheduler.judge({"mIoU": 1.0}, STEPS)


@pytest.mark.usefixtures("workplace")
def test_a_plateau_goes_on_where_it_was(monkeypatch):
    """The score never gets better: the rate falls after two validations like the first, with a resume between."""
    told = [*SMALL, "--model.schedule=plateau", "--model.warmup=0", "--trainer.max_epochs=3"]
    told.append("--model.schedule_options={patience_epochs: 1, decay_rate: 0.5, monitor: pixel_acc}")
    finish = SegmentationTask.finish
    monkeypatch.setattr(SegmentationTask, "finish", lambda *a: finish(*a) | {"pixel_acc": torch.tensor(0.5)})
    assert main(["fit", "segmentation", *told, "--out=whole"]) == 0
    assert [float(row["lr"]) for row in rows("whole")] == pytest.approx([1e-3, 1e-3, 5e-4])
    monkeypatch.delenv("BACKBONES_RUN")
    assert main(["fit", "segmentation", *told, "--trainer.max_epochs=2", "--out=broken"]) == 0
    monkeypatch.delenv("BACKBONES_RUN")
    assert main(["fit", "segmentation", *told, "--out=broken", "--ckpt_path=last"]) == 0
    assert rows("broken") == rows("whole")
    assert same(weights("whole"), weights("broken"))


@pytest.mark.usefixtures("workplace")
def test_a_schedule_that_the_training_is_too_short_for_leaves_no_folder(capsys):
    assert main(["fit", "segmentation", *SMALL, "--model.warmup_epochs=3", "--trainer.max_epochs=2", "--out=run"]) == 2
    assert "model.warmup_epochs=3.0 is longer than the training, which is 2 epochs" in capsys.readouterr().err
    assert main(["fit", "segmentation", *SMALL, "--model.schedule_options={cycle_mul: 2}", "--out=run"]) == 2
    assert "give cycle_limit" in capsys.readouterr().err
    assert not Path("run").exists()


def test_what_is_checked_draws_nothing_for_a_schedule():
    """Else the weights that a run begins with would depend on what is checked before."""
    before = torch.random.get_rng_state()
    SegmentationTask.check_schedule(SimpleNamespace(**options("cosine")), epochs=3)
    assert torch.equal(before, torch.random.get_rng_state())
