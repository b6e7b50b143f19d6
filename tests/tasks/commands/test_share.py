"""Models for tasks go into folders and onto the hub, from memory and from checkpoints, and come out as they were."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

import backbones
from backbones import InputError, MissingDependency, WeightsError, build_backbone
from backbones.cli import main
from backbones.hub import FORMAT
from backbones_tasks import (
    build_classifier,
    build_detector,
    build_multitask,
    build_segmenter,
    from_pretrained,
)
from backbones_tasks.commands.share import share
from backbones_tasks.training.tasks import load_task

SMALL = {"name": "mobilevit_xxs", "drop_path_rate": 0.1}
IMAGES = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def segmenter(backbone=SMALL, **options):
    return build_segmenter("upernet", backbone=backbone, num_classes=3, aux=True, decoder_channels=8, **options)


def detector(backbone=SMALL, **options):
    sizes = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "box_channels": 16}
    return build_detector("faster_rcnn", backbone=backbone, num_classes=3, **{**sizes, **options})


def run(model):
    torch.manual_seed(0)
    with torch.inference_mode():
        out = model.eval()(list(IMAGES) if model.task in ("detection", "multitask") else IMAGES)
    return out


def assert_same(model, other):
    torch.testing.assert_close(run(other), run(model), atol=0, rtol=0)


@pytest.fixture
def saved(tmp_path, randomise):
    """A segmenter, and the folder that it was saved in."""
    model = randomise(segmenter())
    model.metadata["class_names"] = ["sky", "road", "tree"]
    return model, model.save_pretrained(tmp_path / "mine")


def edit(folder, *keys, **fields):
    """Change fields of config.json, or of an object in it."""
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for key in keys:
        inner = inner[key]
    inner.update(fields)
    (folder / "config.json").write_text(json.dumps(config))


# Save and load


def test_a_saved_segmenter_comes_back(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = from_pretrained(folder)
    assert again.training
    assert again.metadata == {"class_names": ["sky", "road", "tree"]}
    assert again.backbone.canonical_name == "mobilevit/mobilevit_xxs"
    assert again.backbone.drop_path_rate == 0.1
    assert again.aux_head is not None
    assert_same(model, again)
    assert_same(model, from_pretrained(again.save_pretrained(folder.parent / "again")))


MODELS = {
    "a decoder of smp": lambda: build_segmenter("smp/unet", backbone=SMALL, num_classes=2, decoder_channels=(16,) * 5),
    "a published classifier": lambda: build_classifier(backbone=SMALL, num_classes=3, drop_rate=0.2),
    "a classifier by its class token": lambda: build_classifier(backbone="vit_tiny_patch16", num_classes=3, pool="avg"),
    "a classifier with a head": lambda: build_classifier(backbone=SMALL, num_classes=3, pool="max"),
    "a classifier on a module": lambda: build_classifier(backbone=build_backbone(**SMALL), num_classes=3),
    "a detector": detector,
    "a dense detector": lambda: build_detector(
        "fcos",
        backbone=build_backbone("mobilevit_xxs", out_indices=(1, 2, 3)),
        num_classes=3,
        fpn_channels=64,
        min_size=64,
    ),
    "frozen batch norms": lambda: detector(batch_norm="frozen", anchor_sizes=[(8,), (16,), (32,), (64,), (128,)]),
    "several heads": lambda: build_multitask(
        SMALL,
        {
            "seg": {"task": "segmentation", "num_classes": 2, "decoder_channels": 8},
            "kind": {"task": "classification", "num_classes": 4},
        },
    ),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_kind_of_model_comes_back(make, tmp_path, randomise):
    model = randomise(make())
    assert_same(model, from_pretrained(model.save_pretrained(tmp_path)))


def test_a_classifier_is_saved_as_it_is_now(tmp_path, randomise):
    model = build_classifier(backbone="vit_tiny_patch16", num_classes=3)
    model.backbone.reset_classifier(5, "avg")
    again = from_pretrained(randomise(model).save_pretrained(tmp_path))
    assert (again.backbone.num_classes, again.backbone.global_pool) == (5, "avg")
    assert_same(model, again)


def test_images_are_normalised_as_the_saved_model_did(tmp_path):
    backbone = build_backbone("mobilevit_xxs", pretrained_cfg={"mean": (0.1, 0.2, 0.3)})
    model = detector(backbone, image_std=(0.5, 0.6, 0.7))
    again = from_pretrained(model.save_pretrained(tmp_path))
    assert tuple(again.transform.image_mean) == again.inner_backbone.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert tuple(again.transform.image_std) == (0.5, 0.6, 0.7)


@pytest.mark.parametrize("make", [segmenter, lambda: build_classifier(backbone=SMALL, num_classes=3)])
def test_a_saved_model_is_fine_tuned_for_other_classes(make, tmp_path, randomise):
    model = randomise(make())
    model.metadata["class_names"] = ["sky", "road", "tree"]
    again = from_pretrained(model.save_pretrained(tmp_path), num_classes=7, backbone={"drop_path_rate": 0.0})
    assert run(again).shape[1] == 7
    assert again.metadata == {}
    assert again.backbone.drop_path_rate == 0
    assert {name.rsplit(".", 1)[1] for name in again.load_report.mismatched} == {"weight", "bias"}
    assert 0.9 < again.load_report.share < 1
    assert torch.equal(next(again.backbone.parameters()), next(model.backbone.parameters()))


def test_the_backbone_of_a_saved_model_serves_elsewhere(saved):
    model, folder = saved
    backbone = build_backbone("mobilevit_xxs", pretrained=folder).eval()
    for ours, theirs in zip(backbone(IMAGES), model.backbone(IMAGES), strict=True):
        assert torch.equal(ours, theirs)


def test_the_card_says_how_to_use_the_model_and_can_be_edited(saved):
    model, folder = saved
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    assert {"dense-backbones", "segmentation", "mobilevit"} <= set(card.data.tags)
    for part in (
        "# mine",
        "pip install dense-backbones\n",
        f"`mobilevit/mobilevit_xxs` of dense-backbones {backbones.__version__} |",
        "| classes | 3: sky, road, tree |",
        "| architecture | upernet |",
        "without published weights",
    ):
        assert part in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace("'mine'", repr(str(folder)))
    names = {"images": IMAGES}
    exec(code, names)
    assert names["logits"].shape == (2, 3, 50, 70)
    assert names["names"] == ["sky", "road", "tree"]

    (folder / "README.md").write_text("# All about it")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# All about it"


def test_the_card_tells_the_licence_of_the_weights_that_the_backbone_began_with(tmp_path):
    model = detector()
    told = {"tag": "cvnets_in1k", "source": "hf-hub:timm/mobilevit_xxs.cvnets_in1k", "license": "cvnets-license"}
    model.inner_backbone.pretrained_cfg.update(told)
    again = from_pretrained(model.save_pretrained(tmp_path / "a"))
    card = ModelCard.load(again.save_pretrained(tmp_path / "b") / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "cvnets-license")
    assert card.data.base_model == "timm/mobilevit_xxs.cvnets_in1k"
    assert "built on `cvnets_in1k` from timm/mobilevit_xxs.cvnets_in1k (cvnets-license)" in card.text


# What cannot be saved or loaded


def test_a_missing_plugin_names_its_distribution(saved):
    _, folder = saved
    edit(folder, "backbone", backbone="mynets/mynet_s", distribution="my-nets", distribution_version="2.1")
    with pytest.raises(MissingDependency, match=r"'mynets/mynet_s' of .*'my-nets' .*'2\.1'.* `pip install my-nets`"):
        from_pretrained(folder)


def test_a_folder_of_a_newer_version_says_to_upgrade(saved):
    _, folder = saved
    edit(folder, format=FORMAT + 1)
    with pytest.raises(WeightsError, match=rf"is of format {FORMAT + 1}, .* `pip install --upgrade dense-backbones`"):
        from_pretrained(folder)
    edit(folder, format=FORMAT, task="poetry")
    with pytest.raises(WeightsError, match=r"is a model for 'poetry', which dense-backbones .* has not"):
        from_pretrained(folder)


def test_models_and_backbones_are_not_confused(saved, tmp_path):
    with pytest.raises(InputError, match=r"holds a model for segmentation.* backbones_tasks\.from_pretrained"):
        backbones.from_pretrained(saved[1])
    folder = build_backbone("mobilevit_xxs").save_pretrained(tmp_path / "backbone")
    with pytest.raises(InputError, match=r"holds a backbone alone; load it with backbones\.from_pretrained"):
        from_pretrained(folder)


def test_damaged_folders_and_weights_of_another_model_are_refused(saved, tmp_path):
    _, folder = saved
    with pytest.raises(WeightsError, match="no such folder"):
        from_pretrained("gone/nowhere/at-all")
    other = segmenter(encoder_depth=4).save_pretrained(tmp_path / "other")
    shutil.copy(other / "model.safetensors", folder)
    with pytest.raises(WeightsError, match=r"does not hold the weights of the config\.json beside it(.|\n)*missing"):
        from_pretrained(folder)
    edit(folder, options=3)
    with pytest.raises(WeightsError, match="no 'options'"):
        from_pretrained(folder)


class Named(nn.Module):
    """A module with feature_info that nobody can build by name."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.feature_info = backbone, backbone.feature_info

    def forward(self, images):
        return self.backbone(images)


def test_what_cannot_be_built_again_is_refused_and_uploads_nothing(tmp_path, fake_hub):
    foreign = segmenter(Named(build_backbone("mobilevit_xxs")))
    with pytest.raises(InputError, match=r"a Named that was not built by name .* build_backbone"):
        foreign.push_to_hub("mine")
    heads = build_detector("retinanet", backbone=SMALL, num_classes=3, head=detector().rpn)
    with pytest.raises(InputError, match=r"the model for detection was built with head, which config\.json cannot"):
        heads.push_to_hub("mine")
    unknown = segmenter()
    unknown.metadata["palette"] = torch.zeros(3)
    with pytest.raises(InputError, match="metadata of the model cannot be saved"):
        unknown.save_pretrained(tmp_path / "folder")
    assert fake_hub.made == []
    assert not (tmp_path / "folder").exists()


# The hub


def test_push_sends_the_folder(saved, fake_hub):
    model, _ = saved
    commit = model.push_to_hub("somebody/mine", private=True, commit_message="First")
    assert fake_hub.made == [("somebody/mine", True)]
    assert (commit.commit_url, commit.commit_message) == ("https://hub/somebody/mine", "First")
    there = fake_hub.root / "somebody" / "mine"
    assert "from_pretrained('somebody/mine')" in (there / "README.md").read_text()
    assert_same(model, from_pretrained(there))


def test_the_local_cache_serves_offline_and_a_miss_says_what_to_do(saved, tmp_path, monkeypatch):
    model, folder = saved
    repo = tmp_path / "cache" / "models--somebody--mine"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(model, from_pretrained("somebody/mine"))
    with pytest.raises(WeightsError, match=r"somebody/else: no such folder, .* `hf download somebody/else --local-dir"):
        from_pretrained("somebody/else")


# From a checkpoint


RUN = ["--data.shapes.size=32", "--data.shapes.train=8", "--data.shapes.val=2", "--data.batch_size=4"]
RUN += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--out=run"]
CKPT = "run/checkpoints/best.ckpt"


def fit(task, *options):
    assert main(["fit", task, *RUN, *options]) == 0


@pytest.mark.usefixtures("workplace")
def test_a_checkpoint_is_shared_by_one_command(capsys):
    fit("segmentation", "--backbone=mobilevit_xxs", "--model.decoder_options={decoder_channels: 8}")
    assert main(["share", CKPT, "--out", "shared/mine"]) == 0
    assert "segmentation on mobilevit/mobilevit_xxs: mIoU 0." in capsys.readouterr().out
    task, model = load_task(Path(CKPT), "segmentation"), from_pretrained("shared/mine").eval()
    with torch.inference_mode():
        assert torch.equal(model(task.normalise(IMAGES)), task(IMAGES))
    told = model.metadata
    assert told["class_names"] == task.class_names
    assert told["metrics"].keys() == {"mIoU", "pixel_acc"}
    card = ModelCard.load("shared/mine/README.md")
    assert "| data | coloured shapes, drawn on the fly |" in card.text
    assert "| training | 1 epoch, adamw, learning rate 0.001 |" in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == told["metrics"]


@pytest.mark.usefixtures("workplace")
def test_a_checkpoint_keeps_the_statistics_of_the_weights_that_it_began_with(tmp_path, monkeypatch):
    began = build_backbone("vit_tiny_patch16").save_pretrained(tmp_path / "began") / "model.safetensors"
    monkeypatch.setattr("backbones.weights.published._fetch", lambda row, name: began)
    fit("detection", "--backbone={name: vit_tiny_patch16, pretrained: true}", "--trainer.limit_train_batches=1")
    model = share(CKPT, "shared")
    row = backbones.backbone_info("vit_tiny_patch16").weights[0]
    assert tuple(row.mean) != (0.485, 0.456, 0.406), "this test needs weights with statistics of their own"
    assert tuple(model.transform.image_mean) == tuple(row.mean)
    assert tuple(from_pretrained("shared").transform.image_mean) == tuple(row.mean)
    assert f"built on `{row.tag}`" in (tmp_path / "shared" / "README.md").read_text()


@pytest.mark.usefixtures("workplace")
def test_share_refuses_what_it_cannot_do(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(WeightsError, match=r"a\.ckpt is no checkpoint of `backbones fit`"):
        share("a.ckpt", "out")
    with pytest.raises(WeightsError, match=r"b\.ckpt: no such checkpoint"):
        share("b.ckpt", "out")
    with pytest.raises(InputError, match="say where to"):
        share("a.ckpt")
    assert not (tmp_path / "out").exists()
