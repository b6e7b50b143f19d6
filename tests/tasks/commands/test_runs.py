"""Runs that end early, folders that cannot be written, are taken or are somebody else's, and what goes on with them."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from run_files import rows, weights

from backbones.cli import main
from backbones_tasks import files
from backbones_tasks.commands.share import share
from backbones_tasks.training.segmentation import SegmentationTask

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=32",
    "--data.shapes.train=4",
    "--data.shapes.val=2",
    "--data.batch_size=4",
    "--model.decoder_options={decoder_channels: 8}",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
]


def fit(*options):
    return main(["fit", "segmentation", *SMALL, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert fit("--trainer.max_epochs=1", f"--out={folder}") == 0
    os.environ.pop("BACKBONES_RUN", None)
    return folder


@pytest.fixture
def run(finished, workplace):
    """A copy of it, in the folder `run`."""
    shutil.copytree(finished, "run")
    return Path("run")


def in_second_epoch(monkeypatch, act):
    step = SegmentationTask.training_step

    def acts(self, batch, number):
        if self.current_epoch == 1:
            act()
        return step(self, batch, number)

    monkeypatch.setattr(SegmentationTask, "training_step", acts)


def test_sigterm_ends_with_143_and_says_how_to_go_on(run, monkeypatch, capsys):
    before = weights(run)
    in_second_epoch(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        fit("--out=run", "--ckpt_path=last")
    assert ended.value.code == 143
    assert "stopped; go on with: backbones fit segmentation --out run --ckpt_path last" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert all(torch.equal(before[name], state) for name, state in weights(run).items())
    assert len(rows(run)) == 1


def test_a_full_disk_is_a_sentence_and_leaves_the_checkpoint_whole(run, monkeypatch, capsys):
    before = weights(run)

    def full(content, file):
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("backbones_tasks.training.callbacks.save", full)
    assert fit("--out=run", "--ckpt_path=last") == 2
    told = capsys.readouterr()
    assert "cannot be written: no space left on device" in told.err
    assert told.err.count("\n") == 1
    assert "go on with: backbones fit segmentation --out run --ckpt_path last" in told.out
    assert all(torch.equal(before[name], state) for name, state in weights(run).items())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_deleted_run_folder_is_a_sentence_and_stays_deleted(run, monkeypatch, capsys):
    in_second_epoch(monkeypatch, lambda: shutil.rmtree("run"))
    assert fit("--out=run", "--ckpt_path=last") == 2
    told = capsys.readouterr()
    assert "the folder run is gone" in told.err
    assert told.err.count("\n") == 1
    assert not run.exists()


def test_folders_that_cannot_be_written_to_are_refused_before_training(workplace, monkeypatch, capsys):
    monkeypatch.setattr(SegmentationTask, "training_step", lambda *_: pytest.fail("it trains"))
    Path("file").write_text("")
    assert fit("--out=file/run") == 2
    assert "file/run cannot be written: not a directory" in capsys.readouterr().err

    opens = Path.open

    def read_only(path, *args, **kwargs):
        if path.parent.name == "there":
            raise OSError(errno.EROFS, "Read-only file system")
        return opens(path, *args, **kwargs)

    Path("there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", read_only)
        assert fit("--out=there") == 2
    assert "cannot be written: read-only file system" in capsys.readouterr().err


HOLDS = """
import fcntl, sys
stream = open(sys.argv[1], "a+")
fcntl.lockf(stream, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_one_training_at_a_time_writes_to_a_folder(run, capsys):
    command = [sys.executable, "-c", HOLDS, "run/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert fit("--out=run", "--ckpt_path=last") == 2
        assert "run is being trained in by another process" in capsys.readouterr().err
        other.kill()
    assert len(rows(run)) == 1
    assert fit("--out=run", "--ckpt_path=last") == 0  # nobody holds what a killed process held
    assert len(rows(run)) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--backbone=pvt_v2_b1"], "backbone was pvt/pvt_v2_b0 and would be pvt/pvt_v2_b1"),
        (["--model.decoder=smp/fpn", "--model.decoder_options=null"], "decoder was upernet and would be smp/fpn"),
        (
            ["--model.decoder_options={decoder_channels: 16}"],
            "decoder_options was {'decoder_channels': 8} and would be",
        ),
        (
            ["--data=other", "--data.classes=[cat, dog]", "--data.num_workers=0"],
            "was trained on the classes background",
        ),
    ],
)
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_model_is_told_in_a_sentence(run, capsys, command, options, told):
    for kind in ("images", "masks"):
        Path("other", kind).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB" if kind == "images" else "L", (32, 32), 1 if kind == "masks" else None).save(
                f"other/{kind}/{i}.png"
            )
    assert main([command, "segmentation", "--out=run", "--ckpt_path=last", *options]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert len(rows(run)) == 1


def test_weights_alone_are_no_training_to_go_on_with(run, capsys):
    file = run / "checkpoints/last.ckpt"
    content = torch.load(file, weights_only=True)
    torch.save({key: content[key] for key in ("state_dict", "hyper_parameters", "task")}, file)
    assert fit("--out=run", "--ckpt_path=last") == 2
    assert "holds weights alone, and no state of a training to go on with" in capsys.readouterr().err


CALLS = {"class_path": "marker.Marker", "init_args": {}}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trainer.callbacks", [CALLS]),
        ("trainer.callbacks", CALLS),
        ("trainer.logger", CALLS),
        ("trainer.plugins", [CALLS]),
        ("trainer.strategy", CALLS),
        ("trainer.strategy", "marker.Marker"),
        ("trainer.accelerator", CALLS),
        ("trainer.profiler", "marker.Marker"),
        ("trainer.default_root_dir", "/elsewhere"),
        ("trainer", "other.yaml"),
        ("data", CALLS),
        ("data.shapes", "other.yaml"),
        ("model", CALLS),
        ("model.backbone", {"name": "pvt_v2_b0", "stem": CALLS}),
        ("model.inference", "other.yaml"),
        ("callbacks", [CALLS]),
    ],
)
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_config_of_a_run_folder_names_no_code(run, capsys, command, path, value):
    Path("marker.py").write_text("open('ran', 'w').close()\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    section, _, option = path.partition(".")
    if option:
        config[section][option] = value
    else:
        config[section] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    sys.path.insert(0, os.getcwd())
    try:
        assert main([command, "segmentation", "--out=run", "--ckpt_path=last"]) == 2
    finally:
        sys.path.remove(os.getcwd())
    told = capsys.readouterr().err
    assert "run/config.yaml" in told
    assert "add --trust" in told
    assert "marker" not in sys.modules
    assert not Path("ran").exists()


def test_trust_lets_a_folder_of_ones_own_name_code(run, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "pytorch_lightning.callbacks.Timer"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["validate", "segmentation", "--out=run", "--ckpt_path=last"]) == 2
    assert "trainer.callbacks asks for the class pytorch_lightning.callbacks.Timer" in capsys.readouterr().err
    assert main(["validate", "segmentation", "--out=run", "--ckpt_path=last", "--trust"]) == 0


def test_sharing_reads_the_config_as_plain_values(run):
    Path("marker.py").write_text("open('ran', 'w').close()\n")
    (run / "config.yaml").write_text("data: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(files.BackboneError, match=r"config\.yaml is no config of options"):
        share(run / "checkpoints/last.ckpt", "out")
    assert not Path("ran").exists()
