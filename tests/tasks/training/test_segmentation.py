"""Options of the segmentation task, from the command line to checkpoints."""

import os

import pytest
import torch

from backbones.cli import main
from backbones_tasks.commands.command_line import CommandLine
from backbones_tasks.training.tasks import load_task

pytestmark = pytest.mark.usefixtures("workplace")

SMALL = [
    "--data.shapes.size=48",
    "--data.shapes.train=8",
    "--data.shapes.val=4",
    "--data.batch_size=4",
    "--model.decoder_options={decoder_channels: 8}",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with a loss of two terms, balanced classes, and windows in validation."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    loss = ["--model.loss=ohem+0.5*dice", "--model.loss_options={ohem: {thresh: 0.9}}", "--model.ema=0.9"]
    options = ["--model.class_weights=balanced", "--model.inference.window=32", "--model.inference.flip=true"]
    assert main(["fit", "segmentation", *SMALL, *loss, *options, "--out", str(folder)]) == 0
    os.environ.pop("BACKBONES_RUN", None)
    return folder


def measured(capsys, *options):
    assert main(["validate", "segmentation", *map(str, options)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {name: float(value) for name, value in map(str.split, lines) if name in ("val_loss", "mIoU")}


def test_a_checkpoint_says_how_it_was_trained_and_how_it_labels(trained):
    task = load_task(trained / "checkpoints" / "last.ckpt", "segmentation")
    weights = task.hparams["class_weights"]
    assert len(weights) == 5
    assert all(isinstance(weight, float) for weight in weights)
    assert min(weights) < 0.5 < 2 < max(weights)
    assert (task.inference.window, task.inference.flip) == (32, True)
    masks = torch.randint(0, 5, (1, 32, 32))
    twice = task.loss.terms[1][1](torch.zeros(1, 5, 32, 32), masks)
    total = task.loss(torch.zeros(1, 5, 32, 32), masks)
    hard = task.loss.terms[0][1]
    assert hard.thresh == 0.9
    assert hard.class_weights.tolist() == pytest.approx(weights)
    torch.testing.assert_close(total, hard(torch.zeros(1, 5, 32, 32), masks) + 0.5 * twice)


def test_validation_averages_as_it_is_told(trained, capsys):
    options = ["--ckpt_path", "last", "--out", trained]
    as_trained = measured(capsys, *options)
    with (trained / "metrics.csv").open() as file:
        names, values = (line.strip().split(",") for line in file)
    assert as_trained["val_loss"] == pytest.approx(float(values[names.index("val_loss")]), rel=1e-3)
    plain = measured(capsys, *options, "--model.inference.window=null", "--model.inference.flip=false")
    scaled = measured(capsys, *options, "--model.inference.scales=[0.5, 1, 1.5]")
    assert len({round(scores["val_loss"], 4) for scores in (as_trained, plain, scaled)}) == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.loss=ce+dise", "did you mean 'dice'?"),
        ("--model.loss_options={ohem: {}}", "given for ohem, but the loss is 'ce'"),
        ("--model.class_weights=ballanced", "model.class_weights"),
        ("--model.inference.window=8", "window=8 must be at least 32"),
        ("--model.inference.scales=[0]", "must be over 0"),
        ("--model.inference.flipp=true", "did you mean 'model.inference.flip'?"),
        ("--data.layout=coco", "data.layout"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_loaded(argument, message, capsys, monkeypatch, workplace):
    monkeypatch.setattr(CommandLine, "instantiate_classes", lambda self: pytest.fail("something was built"))
    assert main(["fit", "segmentation", argument]) == 2
    assert message in capsys.readouterr().err
    assert not list(workplace.iterdir())


@pytest.mark.parametrize(
    ("option", "message"), [(["--scales", "0"], "must be over 0"), (["--overlap", "1"], "under 1")]
)
def test_wrong_options_of_prediction_are_refused(trained, option, message, capsys, workplace):
    from PIL import Image

    Image.new("RGB", (40, 40)).save("a.png")
    arguments = ["--ckpt", str(trained / "checkpoints/last.ckpt"), "--images", "a.png", "--out", "out"]
    try:
        code = main(["predict", "segmentation", *arguments, *option])
    except SystemExit as refused:  # argparse's way
        code = refused.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "out").exists()
