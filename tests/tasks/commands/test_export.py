"""Models become files that other runtimes run, for images of any size, and that compute what the models do."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backbones
from backbones import Backbone, BackboneSpec, InputError, MissingDependency, WeightsError, build_backbone, registry
from backbones.cli import main
from backbones.discovery import Plugin
from backbones.layers.padding import is_exporting
from backbones_tasks import build_classifier, build_detector, build_segmenter
from backbones_tasks.commands.export import load_source
from backbones_tasks.models import export as module
from backbones_tasks.models.export import ExportError, adaptive_avg_pool2d, export_model

onnx = pytest.importorskip("onnx", reason="needs the extra [export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
pytest.importorskip("onnxscript", reason="needs the extra [export]")


class Tiny(Backbone):
    """A convolution per stage: what is quick to trace, and is padded."""

    size_divisor = 32

    def __init__(self, **options):
        super().__init__(channels=(4, 6, 8, 8), **options)
        self.stem = nn.Conv2d(self.in_chans, 4, 4, stride=4)
        widths = zip((4, 4, 6, 8), (4, 6, 8, 8), (1, 2, 2, 2), strict=True)
        self.stages = nn.ModuleList(self.wanted(nn.Conv2d(i, o, s, stride=s) for i, o, s in widths))


class Stubborn(Tiny):
    """Does something for the size that it sees, as code with Python numbers does."""

    def forward_features(self, images):
        maps = super().forward_features(images)
        return [m * float(int(images.shape[-1])) for m in maps]


class Liar(Tiny):
    """Does something else while it is exported."""

    def forward_features(self, images):
        return [m * (0.9 if is_exporting() else 1.0) for m in super().forward_features(images)]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    monkeypatch.setitem(sys.modules, "tiny_models", SimpleNamespace(Tiny=Tiny, Stubborn=Stubborn, Liar=Liar))
    for name, entry in (("tiny", "Tiny"), ("stubborn", "Stubborn"), ("liar", "Liar")):
        spec = {"family": "Tiny", "channels": (4, 6, 8, 8), "strides": (4, 8, 16, 32)}
        backbones.register(BackboneSpec(name=name, entry=f"tiny_models:{entry}", **spec))


def segmenter(backbone="tiny"):
    depth = {"encoder_depth": 3} if backbone == "tiny" else {}
    model = build_segmenter("upernet", backbone=backbone, num_classes=3, decoder_channels=4, **depth)
    model.metadata["class_names"] = ["sky", "road", "tree"]
    return model


def normalised(model, images):
    config = module.inner_backbone(model).pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


# What is written


def test_a_segmenter_in_onnx_takes_any_batch_and_size(tmp_path, randomise):
    model = randomise(segmenter())
    exported = export_model(model, tmp_path / "model.onnx")
    assert [difference.images for difference in exported.differences] == [
        (1, 3, 256, 256),
        (2, 3, 333, 500),
        (1, 3, 512, 384),
    ]
    assert all(0 <= d.worst <= 1e-4 * d.largest for d in exported.differences)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape) == ("images", ["batch", 3, "height", "width"])
    assert (given.name, given.shape[:2]) == ("logits", ["batch", 3])
    for size in (exported.metadata["least_sides"], (97, 161), (301, 200)):
        images = torch.rand(3, 3, *size)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = model(normalised(model, images))
        np.testing.assert_allclose(logits, expected, atol=1e-4 * expected.abs().max().item())

    told = {prop.key: prop.value for prop in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert (told["task"], told["architecture"], told["backbone"]) == ("segmentation", "upernet", "local/tiny")
    assert json.loads(told["class_names"]) == ["sky", "road", "tree"]
    assert json.loads(told["mean"]) == pytest.approx([0.485, 0.456, 0.406])
    assert json.loads(told["strides"]) == [4, 8]
    assert (json.loads(told["inputs"]), json.loads(told["outputs"])) == (["images"], ["logits"])
    assert told["normalised"] == "inside"


def test_what_is_exported_is_the_fast_copy_compared_with_the_model_itself(tmp_path, monkeypatch):
    def faster(model):
        fast = backbones.for_inference(model)
        for part in fast.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.mul_(1.5)  # a fault of for_inference
        return fast

    model = segmenter().eval()
    program = export_model(model, tmp_path / "model.pt2", format="torch-export", size=(64, 96), fixed_size=True)
    operators = [node.target for node in torch.export.load(program.file).graph.nodes]
    assert torch.ops.aten.batch_norm.default not in operators, "norms are folded"
    monkeypatch.setattr(module, "for_inference", faster)
    with pytest.raises(module.ExportError, match="its outputs differ"):
        export_model(model, tmp_path / "wrong.pt2", format="torch-export", size=(64, 96), fixed_size=True)


def test_a_classifier_as_a_program_of_torch(tmp_path, randomise):
    model = randomise(build_classifier(backbone="tiny", num_classes=5))
    exported = export_model(model, tmp_path / "model.pt2", format="torch-export")
    files = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    images = torch.rand(4, 3, 97, 161)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(normalised(model, images)), atol=1e-4, rtol=1e-4)
    assert json.loads(files["metadata.json"]) == exported.metadata
    assert exported.metadata["task"] == "classification"
    assert exported.metadata["outputs"] == ["logits"]
    (tmp_path / "neighbour").touch()
    assert exported.file.stat().st_mode == (tmp_path / "neighbour").stat().st_mode


def test_a_backbone_has_an_output_per_map_and_may_leave_normalisation_outside(tmp_path, randomise):
    model = randomise(build_backbone("tiny", out_indices=(1, 3)))
    exported = export_model(model.train(), tmp_path / "model.onnx", normalise=False, size=(64, 96), fixed_size=True)
    assert model.training, "the model is left as it was"
    assert [difference.images[0] for difference in exported.differences] == [1, 2, 3]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 96]
    assert [(out.name, out.shape) for out in session.get_outputs()] == [
        ("map1", ["batch", 6, 8, 12]),
        ("map3", ["batch", 8, 2, 3]),
    ]
    images = torch.randn(2, 3, 64, 96)
    for ours, theirs in zip(session.run(None, {"images": images.numpy()}), model(images), strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), atol=1e-4)
    assert exported.metadata["normalised"] == "outside"
    assert "class_names" not in exported.metadata


@pytest.mark.parametrize("size", [(6, 6), (7, 13), (1, 2), (40, 5)])
@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_adaptive_pooling_as_matrices_is_torchs(size, cells):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(adaptive_avg_pool2d(x, (cells, cells)), F.adaptive_avg_pool2d(x, cells))


@pytest.mark.slow
def test_decoders_that_pad_export(tmp_path):
    model = build_segmenter("smp/unet", backbone="tiny", num_classes=2, decoder_channels=(8,) * 5)
    assert export_model(model, tmp_path / "model.onnx").differences


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_tiny_patch16", "convnext_tiny", "swin_tiny", "mobilevit_xxs"])
def test_segmenters_of_all_kinds_export(name, format, tmp_path):
    model = segmenter(name)
    assert export_model(model, tmp_path / f"model{module.SUFFIXES[format]}", format=format).differences


# What is refused


def test_a_file_that_computes_something_else_is_not_left_behind(tmp_path):
    (tmp_path / "model.pt2").write_text("what was there")
    model = build_backbone("liar", out_indices=(0,))
    with pytest.raises(ExportError, match=r"model\.pt2 was not written: for images \(1, 3, 256, 256\) .* differ by"):
        export_model(model, tmp_path / "model.pt2", format="torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "what was there"


def test_a_model_that_cannot_be_traced_for_any_size_says_what_to_do(tmp_path):
    model = build_backbone("stubborn", out_indices=(0,))
    with pytest.raises(ExportError, match=r"model\.pt2 was not written: .*--fixed-size and --size H W export it"):
        export_model(model, tmp_path / "model.pt2", format="torch-export")
    assert not list(tmp_path.iterdir())
    export_model(model, tmp_path / "model.pt2", format="torch-export", size=(64, 64), fixed_size=True)


def test_detectors_are_refused_by_name(tmp_path):
    model = build_detector("faster_rcnn", backbone="tiny", num_classes=3, fpn_channels=4, box_channels=4)
    with pytest.raises(InputError, match=r"a model for detection cannot be exported: .* export its backbone: .*save"):
        export_model(model, tmp_path / "model.onnx")
    folder = model.inner_backbone.save_pretrained(tmp_path / "backbone")  # what the message says to do
    assert module.inner_backbone(load_source(str(folder))).canonical_name == "local/tiny"


def test_plain_backbones_need_nothing_for_training():
    modules = "backbones_tasks.commands.export, backbones_tasks.models.pretrained"
    code = f"import sys; sys.modules['pytorch_lightning'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match=r"needs onnxscript; run `pip install 'dense-backbones\[export\]'`"):
        export_model(segmenter(), tmp_path / "model.onnx")


def test_a_torch_that_onnxscript_has_left_behind_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.raises(MissingDependency, match=r"ONNX needs torch 2.7, and 2.6.0\+cpu is installed; run `pip install"):
        export_model(segmenter(), tmp_path / "model.onnx")


def test_statistics_of_other_channels_are_refused(tmp_path):
    model = build_backbone("tiny", in_chans=5, out_indices=(0,))
    with pytest.raises(InputError, match=r"local/tiny takes 5 channels, and its statistics are of 3: .*--normalised"):
        export_model(model, tmp_path / "model.onnx")


# Where models come from


def test_folders_and_names_are_sources(tmp_path, randomise):
    model = randomise(segmenter())
    images = torch.rand(1, 3, 40, 50)
    for saved in (model, model.backbone):
        again = load_source(str(saved.save_pretrained(tmp_path / type(saved).__name__)))
        assert not again.training
        with torch.no_grad():
            torch.testing.assert_close(again(images), saved(images), atol=0, rtol=0)
    named = load_source("tiny", options={"out_indices": [3]})
    assert named.out_indices == (3,)
    with pytest.raises(InputError, match="has weights and options of its own"):
        load_source(str(tmp_path / "Segmenter"), options={"out_indices": [3]})
    with pytest.raises(WeightsError, match=r"gone\.ckpt: no such checkpoint"):
        load_source(str(tmp_path / "gone.ckpt"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is a run; name one of its checkpoints, such as .*best\.ckpt"):
        load_source(str(tmp_path / "run"))
    with pytest.raises(backbones.UnknownBackbone, match="did you mean"):
        load_source("tiiny")


@pytest.mark.usefixtures("workplace")
def test_the_command_exports_a_checkpoint_and_prints_the_differences(capsys):
    data = ["--data.shapes.size=32", "--data.shapes.train=8", "--data.shapes.val=2", "--data.batch_size=4"]
    trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "classification", *data, *trainer, "--backbone=tiny", "--out=run"]) == 0
    capsys.readouterr()
    assert main(["export", "run/checkpoints/best.ckpt", "--format", "torch-export"]) == 0
    out = capsys.readouterr().out
    assert "classification on local/tiny: images in [0, 1] -> logits" in out
    for shape in ("1 x 3 x 256 x 256", "2 x 3 x 333 x 500", "1 x 3 x 512 x 384"):
        assert shape in out
    assert re.search(r"run-best\.pt2: \d\.\d MB in \d+ s, for batches of any length and images of any size from", out)
    files = {"metadata.json": ""}
    torch.export.load("run-best.pt2", extra_files=files)
    told = json.loads(files["metadata.json"])
    assert len(told["class_names"]) > 1
    assert told["input"] == {"image_size": 32, "crop": 0.875}
    assert told["metrics"].keys() == {"top1", "top5"}


@pytest.mark.usefixtures("workplace")
def test_the_command_refuses_what_it_cannot_write(capsys):
    for options, message in (
        (["--out", "model.pt2"], r"a file of --format onnx ends in .onnx"),
        (["--out", "nowhere/model.onnx"], "there is no folder"),
        (["--option", "out_indices"], "write KEY=VALUE"),
    ):
        assert main(["export", "tiny", *options]) == 2
        assert message in capsys.readouterr().err
