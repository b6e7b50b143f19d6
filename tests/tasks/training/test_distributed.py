"""Several processes: one run folder, the metrics of one process, sharded training and its checkpoints, launchers."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_files
import torch
import torch.distributed as dist
from run_files import same, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from backbones import build_backbone
from backbones.cli import main
from backbones.errors import InputError, WeightsError
from backbones_tasks import build_detector, build_segmenter, files
from backbones_tasks.training import runs, sharding
from backbones_tasks.training.callbacks import AtomicCheckpointIO, SyncedNorms
from backbones_tasks.training.segmentation import SegmentationTask
from backbones_tasks.training.tasks import load_task

pytestmark = pytest.mark.usefixtures("workplace")

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
DATA = ["--data.shapes.size=32", "--data.shapes.train=10", "--data.shapes.val=5", "--data.batch_size=2"]
BRIEF = ["--backbone=edgevit_xxs", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
SMALL = [*DATA, *BRIEF]
DECODER = "--model.decoder_options={decoder_channels: 8}"
DETECTOR = (
    "--model.detector_options={fpn_channels: 16, box_channels: 16, box_batch_size_per_image: 16, mask_channels: 16}"
)
HEADS = {"det": {"task": "detection"}, "seg": {"task": "segmentation"}}
SHAPES = {name: {"batch_size": 2, "shapes": {"size": 32, "train": 10, "val": 5}} for name in HEADS}
MULTITASK = [f"--model.heads={json.dumps(HEADS)}", f"--data.heads={json.dumps(SHAPES)}"]
ONE, TWO = ["--trainer.devices=1", "--trainer.strategy=auto"], ["--trainer.devices=2"]


@pytest.fixture(autouse=True)
def started_by_nobody(monkeypatch):
    for name in (*LAUNCHED, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    if not sharding.ON_CPU:
        pytest.skip(f"torch {torch.__version__} keeps shards on GPUs alone")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def backbones(*arguments, check=True, launcher=()):
    """Run a command in a process of its own, which starts others; with a launcher, all are started by that."""
    environment = {k: v for k, v in os.environ.items() if k != runs.HANDED_DOWN} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "backbones", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def rows(run):
    return [{name: float(value or "nan") for name, value in row.items()} for row in run_files.rows(run)]


# Run folders


def test_launchers_must_be_told_a_folder_and_only_the_first_process_minds_an_old_run(monkeypatch, workplace):
    (workplace / "old").mkdir()
    (workplace / "old/config.yaml").touch()

    def started(**environment):
        for name in (*LAUNCHED, "SLURM_NTASKS", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}
    slurm = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}
    for first, other in (
        ({**torchrun, "RANK": "0", "LOCAL_RANK": "0"}, {**torchrun, "RANK": "2", "LOCAL_RANK": "0"}),
        ({**slurm, "SLURM_PROCID": "0"}, {**slurm, "SLURM_PROCID": "3"}),
    ):
        started(**first)
        with pytest.raises(InputError, match="add --out DIR"):
            runs.new_run("segmentation", None)
        with pytest.raises(InputError, match="already holds a run"):
            runs.new_run("segmentation", "old")
        started(**other)
        assert runs.new_run("segmentation", "old").name == "old"
    started(NODE_RANK="1")
    with pytest.raises(InputError, match="add --out DIR"):
        runs.new_run("segmentation", None, nodes=2)
    assert runs.new_run("segmentation", "old", nodes=2).name == "old"
    started()
    assert runs.new_run("segmentation", None).name == "segmentation-001"
    started(LOCAL_RANK="1")  # a process that Lightning starts
    assert runs.new_run("segmentation", None).name == "segmentation-001"


def test_what_all_processes_of_a_launcher_find_is_told_by_the_first(monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(InputError), runs.told_once():
            raise InputError("wrong")
        assert len(waited) == int(rank)  # until the launcher, which has seen the first one fail, ends it


# Checkpoints in shards


def sharded(mesh, *numbers):
    full = [torch.arange(float(n)).view(-1, 1) for n in numbers]
    return {
        "epoch": sum(numbers),
        "state_dict": {f"p{i}": distribute_tensor(value, mesh, [Shard(0)]) for i, value in enumerate(full)},
        "nested": [{"buffer": torch.ones(2), "tuple": (1, "a")}],
    }


def save(checkpoint, path, token):
    files.save_shards(checkpoint, path, token, 0, lambda: None)


def test_shards_are_read_as_what_was_saved(mesh, tmp_path):
    save(sharded(mesh, 3, 5), tmp_path / "x.ckpt", "a")
    read = AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
    assert read["epoch"] == 8
    assert read["nested"][0]["tuple"] == (1, "a")
    assert torch.equal(read["nested"][0]["buffer"], torch.ones(2))
    assert torch.equal(read["state_dict"]["p1"], torch.arange(5.0).view(-1, 1))


def test_a_checkpoint_in_shards_is_that_before_or_the_new_one_wherever_saving_is_killed(mesh, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(sharded(mesh, 3), path, "a")
    write, replace = torch.save, os.replace
    calls = []

    def count(function, dies_at):
        def counted(*args, **options):
            calls.append(function)
            if len(calls) == dies_at:
                raise KeyboardInterrupt
            return function(*args, **options)

        return counted

    epoch, died = 3, 0
    for dies_at in range(1, 7):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", count(write, dies_at))
            patch.setattr(os, "replace", count(replace, dies_at))
            try:
                save(sharded(mesh, epoch + 1), path, f"token{dies_at}")
                epoch += 1
            except KeyboardInterrupt:
                died += 1
        read = files.read_checkpoint(path)
        assert read["epoch"] == epoch
        assert read["state_dict"]["p0"].shape == (epoch, 1)
    assert died == 4  # two files, each written and then put in its place
    assert len(list(path.iterdir())) == 2  # nothing is left of those that were killed


def test_files_and_shards_take_each_others_place(mesh, tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    for _ in range(2):
        io.save_checkpoint({"epoch": 1}, path)
        assert files.read_checkpoint(path) == {"epoch": 1}
        save(sharded(mesh, 3), path, "a")
        assert files.read_checkpoint(path)["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir() if p.name != "store"] == ["last.ckpt"]


def test_code_in_shards_is_not_run(mesh, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    for name in ("index.pt", "a-00000.pt"):
        save(sharded(mesh, 3), tmp_path / "x.ckpt", "a")
        torch.save({"content": {}, "files": [], "shards": Evil()}, tmp_path / "x.ckpt" / name)
        with pytest.raises(WeightsError, match="cannot be read"):
            files.read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "run").exists()


# Models in shards


@pytest.mark.parametrize(
    "name",
    [
        "pvt_v2_b0",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "coatnet_nano_rw",
                "convnext_tiny",
                "edgevit_xxs",
                "efficientformer_l1",
                "maxvit_rmlp_pico_rw",
                "mobilevit_xxs",
                "mobilevitv2_050",
                "swin_tiny",
                "timm/resnet18",
                "torchvision/resnet18",
                "twins_pcpvt_small",
                "twins_svt_small",
                "vit_small_r26_s32",
                "vit_tiny_patch16",
            )
        ),
    ],
)
def test_a_backbone_in_shards_has_the_gradients_of_a_whole_one(name, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "LEAST", 100_000)
    whole = build_segmenter("upernet", backbone=name, num_classes=3, decoder_channels=16).double()
    model = copy.deepcopy(whole)
    sharding.shard(model, mesh)
    assert len(sharding._blocks(whole.backbone)[0]) > 2
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for m in (whole, model):
        torch.manual_seed(0)  # of dropout, in MaxViT's MLP of relative positions
        m(images).square().mean().backward()
    for (key, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=lambda text, key=key: f"{key}: {text}")


def test_a_detector_in_shards_has_the_losses_of_a_whole_one(mesh, monkeypatch):
    monkeypatch.setattr(sharding, "LEAST", 100_000)
    whole = build_detector("fcos", backbone="edgevit_xxs", num_classes=3, fpn_channels=64, min_size=64, max_size=64)
    model = copy.deepcopy(whole)
    sharding.shard(model, mesh)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
    images = torch.rand(1, 3, 64, 64)
    losses = [m([images[0]], targets) for m in (whole, model)]
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        assert losses[1][name].item() == pytest.approx(value.item(), rel=1e-4)
    sum(losses[1].values()).backward()


def test_a_whole_tensor_becomes_the_shard_that_a_parameter_is(mesh):
    own = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])
    value = torch.rand(4, 2)
    assert torch.equal(sharding._like(own, value).full_tensor(), value)
    assert sharding._like(own, value).placements != (Replicate(),)
    step = torch.tensor(3.0)
    assert sharding._like(own, step) is step


# Batch norms over processes


@pytest.mark.parametrize(
    "name", ["edgevit_xxs", "efficientformer_l1", "timm/tf_efficientnet_lite0", "torchvision/resnet18"]
)
def test_norms_over_processes_compute_what_the_modules_norms_do(name, randomise):
    model = randomise(build_backbone(name))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)  # and norms are folded
        kept = model.state_dict()
        model = SyncedNorms().apply(model)
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
        for a, b in zip(before, model(images), strict=True):
            torch.testing.assert_close(a, b)
        for module in model.modules():
            if isinstance(module, torch.nn.SyncBatchNorm):
                module.running_mean += 1
        assert not any(torch.allclose(a, b) for a, b in zip(before, model(images), strict=True))  # folded anew
    assert kept.keys() == model.state_dict().keys()
    again = SyncedNorms().revert(model)
    assert again is model


def test_norms_over_processes_need_gpus(capsys):
    command = ["fit", "segmentation", *SMALL, DECODER, *TWO, "--trainer.strategy=ddp", "--trainer.sync_batchnorm=true"]
    assert main(command) == 2
    assert "sync_batchnorm works on GPUs alone" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.gpu  # two of them
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["edgevit_xxs", "timm/tf_efficientnet_lite0"])
def test_norms_over_processes_see_the_batches_of_all(name, workplace):
    (workplace / "go.py").write_text(SYNCED)
    arguments = [str(workplace / "go.py"), name]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *arguments], check=True, timeout=900
    )


SYNCED = """
import sys, torch, torch.distributed as dist
from backbones import build_backbone
from backbones_tasks.training.callbacks import SyncedNorms
dist.init_process_group("nccl")
rank = dist.get_rank()
torch.cuda.set_device(rank)
torch.manual_seed(0)
images = torch.rand(4, 3, 64, 64).cuda()
plain = build_backbone(sys.argv[1]).cuda().double().train()
synced = SyncedNorms().apply(build_backbone(sys.argv[1])).cuda().double().train()
synced.load_state_dict(plain.state_dict())
whole = plain(images.double())
part = synced(images.double().chunk(2)[rank])
for a, b in zip(whole, part):
    torch.testing.assert_close(a.chunk(2)[rank], b)
dist.destroy_process_group()
"""


# Two processes


@pytest.mark.slow  # two processes, and one after them
@pytest.mark.parametrize(
    ("task", "options", "steps"),
    [
        ("segmentation", [*DATA, DECODER, "--model.ema=0.9"], 4),
        ("classification", [*DATA, "--model.freeze_epochs=1"], 4),
        ("detection", [*DATA, "--model.detector=mask_rcnn", DETECTOR], 4),
        ("multitask", [*MULTITASK, "--data.order=mixed"], 4),
        ("multitask", [*MULTITASK, "--data.order=round_robin"], 8),
    ],
)
def test_metrics_of_two_processes_are_those_of_one_on_what_was_saved(task, options, steps, capsys):
    backbones("fit", task, *BRIEF, *options, *TWO, "--trainer.strategy=ddp", "--out=run")
    (row,) = (row for row in rows("run") if row["epoch"] == 1)
    assert row["step"] == steps  # 10 images: 5 for each, in batches of 2, of which the last is dropped
    files = {path.name for path in Path("run").iterdir()}
    assert {"config.yaml", "metrics.csv", "predictions.png", "curves.png", "checkpoints", "tensorboard"} <= files
    assert len(list(Path("run/tensorboard").glob("events*"))) == 1
    assert main(["validate", task, "--ckpt_path=run/checkpoints/last.ckpt", *ONE]) == 0
    printed = dict(re.findall(r"^  (\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert {"box_AP", "det/box_AP", "val_loss"} & printed.keys()
    for name, value in printed.items():
        assert float(value) == pytest.approx(row[name], abs=6e-5, nan_ok=True), name


BREAKS_OFF = """
import sys
from backbones.cli import main
from backbones_tasks.training.segmentation import SegmentationTask
step = SegmentationTask.training_step
def breaks_off(self, batch, batch_idx):
    if self.current_epoch == 1 and batch_idx == 1 and self.global_rank in {ranks}:
        raise RuntimeError("power cut")
    return step(self, batch, batch_idx)
SegmentationTask.training_step = breaks_off
sys.exit(main())
"""


@pytest.mark.slow  # three times two processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_processes_goes_on_exactly_and_is_measured_by_one(strategy, workplace, capsys):
    name = "--backbone={name: edgevit_xxs, drop_path_rate: 0.2}"
    options = [*SMALL, name, DECODER, "--model.ema=0.9", "--model.layer_decay=0.9", *TWO]
    options += ["--data.shapes.train=8", f"--trainer.strategy={strategy}"]
    backbones("fit", "segmentation", *options, "--out=whole")
    (workplace / "go.py").write_text(BREAKS_OFF.format(ranks={0, 1}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "go.py", "fit", "segmentation", *options, "--out=broken"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode
    assert "power cut" in result.stderr
    assert len(rows("broken")) == 1
    backbones("fit", "segmentation", "--out=broken", "--ckpt_path=last")
    assert rows("whole") == rows("broken")
    assert same(weights("whole"), weights("broken"))
    assert files.is_sharded(Path("whole/checkpoints/last.ckpt")) == (strategy == "fsdp")
    assert main(["validate", "segmentation", "--ckpt_path=last", "--out=whole", *ONE]) == 0
    printed = dict(re.findall(r"^  (\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert float(printed["val_loss"]) == pytest.approx(rows("whole")[-1]["val_loss"], abs=1e-4)


@pytest.mark.slow  # five trainings
def test_a_run_in_shards_goes_on_exactly_and_elsewhere(workplace, monkeypatch, capsys):
    name = "--backbone={name: edgevit_xxs, drop_path_rate: 0.2}"
    options = [*SMALL, name, DECODER, "--model.ema=0.9", "--model.layer_decay=0.9", "--data.shapes.train=6"]
    shards = ["--trainer.devices=1", "--trainer.strategy=fsdp"]
    monkeypatch.setattr(sharding, "LEAST", 100_000)

    def run(*arguments):
        monkeypatch.delenv(runs.HANDED_DOWN, raising=False)
        try:
            assert main([*arguments]) == 0
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    run("fit", "segmentation", *options, *shards, "--out=whole")
    with monkeypatch.context() as patch:
        step = SegmentationTask.training_step

        def breaks_off(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 1:
                raise RuntimeError("power cut")
            return step(self, batch, batch_idx)

        patch.setattr(SegmentationTask, "training_step", breaks_off)
        with pytest.raises(RuntimeError, match="power cut"):
            run("fit", "segmentation", *options, *shards, "--out=broken")
    run("fit", "segmentation", "--out=broken", "--ckpt_path=last")
    assert rows("whole") == rows("broken")
    assert same(weights("whole"), weights("broken"))
    assert files.is_sharded(Path("whole/checkpoints/last.ckpt"))
    # without shards, the same training
    run("fit", "segmentation", *options, *ONE, "--out=plain")
    for ours, theirs in zip(rows("whole"), rows("plain"), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)
    # what is averaged, and in shards, is measured without them as it was, and labels images
    capsys.readouterr()
    run("validate", "segmentation", "--ckpt_path=last", "--out=whole", *ONE)
    printed = dict(re.findall(r"^  (\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert float(printed["val_loss"]) == pytest.approx(rows("whole")[-1]["val_loss"], abs=1e-4)
    assert same(load_task(Path("whole/checkpoints/last.ckpt"), "segmentation").state_dict(), weights("whole"))
    # a training without shards goes on with them, and the other way round
    run("fit", "segmentation", "--ckpt_path=last", "--out=whole", *ONE, "--trainer.max_epochs=3")
    assert not files.is_sharded(Path("whole/checkpoints/last.ckpt"))
    run("fit", "segmentation", "--ckpt_path=last", "--out=whole", *shards, "--trainer.max_epochs=4")
    assert files.is_sharded(Path("whole/checkpoints/last.ckpt"))
    assert [row["epoch"] for row in rows("whole")] == [0, 1, 2, 3]


@pytest.mark.slow  # two processes
def test_one_process_that_fails_ends_the_other(workplace):
    (workplace / "go.py").write_text(BREAKS_OFF.format(ranks={1}))
    options = [*SMALL, DECODER, *TWO, "--trainer.strategy=ddp", "--out=run"]
    command = [sys.executable, "go.py", "fit", "segmentation", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode
    assert "power cut" in result.stderr


@pytest.mark.slow  # two processes
def test_slurm_starts_the_processes(workplace):
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "4321", "SLURM_NODELIST": "127.0.0.1"}
    command = [sys.executable, "-m", "backbones", "fit", "segmentation", *SMALL, DECODER, *TWO, "--out=run"]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **slurm, "OMP_NUM_THREADS": "1", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        )
        for rank in "01"
    ]
    assert [process.wait(900) for process in started] == [0, 0]
    assert [row["step"] for row in rows("run")] == [2, 4]


@pytest.mark.slow  # a launcher and two processes, twice
def test_torchrun_starts_the_processes():
    torchrun = ("torch.distributed.run", "--nproc_per_node=2", "--master_port=29511", "-m")
    command = ["fit", "segmentation", *SMALL, DECODER, *TWO, "--trainer.strategy=ddp"]
    backbones(*command, "--out=run", launcher=torchrun)
    assert [row["step"] for row in rows("run")] == [2, 4]
    refused = backbones(*command, "--out=run", "--backbone=pvt_v2_b9", check=False, launcher=torchrun)
    assert refused.returncode
    assert refused.stderr.count("did you mean 'pvt_v2_b") == 1
