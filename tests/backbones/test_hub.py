"""Backbones go into folders and onto the hub, and come out as they were."""

import json
import os
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

import backbones
from backbones import (
    BackboneSpec,
    InputError,
    MissingDependency,
    UnknownBackbone,
    WeightsError,
    build_backbone,
    from_pretrained,
    registry,
)
from backbones.discovery import Plugin
from backbones.hub import FORMAT

IMAGES = torch.randn(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPTIONS = {"out_indices": (1, 3), "out_norm": True, "drop_path_rate": 0.1}


def run(model, images=IMAGES):
    with torch.inference_mode():
        out = model.eval()(images)
    return out if isinstance(out, list) else [out]


def assert_same(model, other, images=IMAGES):
    for a, b in zip(run(model, images), run(other, images), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def saved(tmp_path, randomise):
    """A backbone, and the folder that it was saved in."""
    model = randomise(build_backbone("pvt_v2_b0", **OPTIONS))
    return model, model.save_pretrained(tmp_path / "mine")


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


# Save and load


def test_a_saved_backbone_comes_back(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = from_pretrained(folder)
    assert again.training
    assert again.canonical_name == "pvt/pvt_v2_b0"
    assert again.drop_path_rate == 0.1
    assert again.build_options == {k: list(v) if isinstance(v, tuple) else v for k, v in OPTIONS.items()}
    assert_same(model, again)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077], ids=oct)
def test_saved_files_can_be_read_by_whom_the_umask_lets(umask, saved, tmp_path):
    before = os.umask(umask)
    try:
        files = list(saved[0].save_pretrained(tmp_path / "shared").iterdir())
        saved[0].save_pretrained(tmp_path / "shared")  # over what is there
    finally:
        os.umask(before)
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == dict.fromkeys(
        ("README.md", "config.json", "model.safetensors"), oct(0o666 & ~umask)
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16", {"img_size": (64, 96), "conv_stem": (24, (48, 4), (96, 2))}),
        ("deit_tiny_distilled_patch16", {"features_only": False, "num_classes": 5}),
        ("edgevit_xxs", {"out_indices": [np.int64(0), np.int64(1)], "in_chans": np.int64(3)}),
    ],
)
def test_options_of_every_kind_are_kept(name, options, tmp_path, randomise):
    model = randomise(build_backbone(name, **options))
    assert_same(model, from_pretrained(model.save_pretrained(tmp_path)))


def test_a_classifier_is_saved_as_it_is_now(tmp_path, randomise):
    model = build_backbone("vit_tiny_patch16", features_only=False)
    model.reset_classifier(7, "avg")
    randomise(model).save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert (again.num_classes, again.global_pool) == (7, "avg")
    assert_same(model, again)


def test_other_options_are_taken_where_the_weights_allow(saved, tmp_path, randomise):
    model, folder = saved
    coarse = from_pretrained(folder, out_indices=(3,), drop_path_rate=0.0, checkpointing=True)
    assert torch.equal(run(coarse)[0], run(model)[1])
    assert coarse.drop_path_rate == 0.0

    grey, mean = from_pretrained(folder, in_chans=1), IMAGES.mean(1, keepdim=True)
    for a, b in zip(run(grey, mean), run(model, mean.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    classifier = randomise(build_backbone("pvt_v2_b0", features_only=False, num_classes=5))
    classifier.save_pretrained(tmp_path / "classifier")
    features = from_pretrained(tmp_path / "classifier", features_only=True, num_classes=1000)
    assert torch.equal(classifier.norm(run(features)[3]), classifier.forward_features(IMAGES))
    ten = from_pretrained(tmp_path / "classifier", num_classes=10)
    assert ten.load_report.mismatched.keys() == {"head.weight", "head.bias"}

    with pytest.raises(WeightsError, match="does not fit pvt/pvt_v2_b0"):
        from_pretrained(folder, depths=(9, 9, 9, 9))
    with pytest.raises(InputError, match=r"leave pretrained=True out"):
        from_pretrained(folder, pretrained=True)


def test_a_folder_serves_as_pretrained_too(saved):
    model, folder = saved
    again = build_backbone("pvt_v2_b0", **OPTIONS, pretrained=folder)
    assert_same(model, again)


def test_preprocessing_and_origin_are_kept(tmp_path, monkeypatch, randomise):
    reference = randomise(timm.create_model("pvt_v2_b0"))
    torch.save(reference.state_dict(), tmp_path / "pvt.pth")
    monkeypatch.setattr("backbones.weights.published._fetch", lambda row, name: tmp_path / "pvt.pth")
    model = build_backbone("pvt_v2_b0", pretrained=True)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)  # fine-tuned with another
    again = from_pretrained(model.save_pretrained(tmp_path / "a"), out_indices=(3,))
    assert again.pretrained_cfg == model.pretrained_cfg
    card = ModelCard.load(again.save_pretrained(tmp_path / "b") / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "timm/pvt_v2_b0.in1k"
    assert "built on `in1k` from timm/pvt_v2_b0.in1k (Apache-2.0)" in card.text
    assert "(0.1, 0.2, 0.3)" in card.text


def test_the_card_says_how_to_use_the_model_and_can_be_edited(saved):
    model, folder = saved
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "dense-backbones"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert {"backbone", "pvtv2"} <= set(card.data.tags)
    for part in ("# mine", "pip install dense-backbones\n", "| 1 | 8 | 64 |", "| 3 | 32 | 256 |", "without published"):
        assert part in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace("'mine'", repr(str(folder)))
    names = {"images": IMAGES}
    exec(code, names)
    assert [m.shape for m in names["maps"]] == [m.shape for m in run(model)]

    (folder / "README.md").write_text("# All about it")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# All about it"


def test_the_card_of_a_classifier_runs_and_states_a_licence_of_its_own(tmp_path):
    model = build_backbone("mobilevitv2_050", features_only=False, num_classes=3)
    model.pretrained_cfg.update(tag="cvnets_in1k", source="https://example.org/a.pt", license="cvnets-license")
    folder = model.save_pretrained(tmp_path / "it")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "cvnets-license")
    assert card.data.pipeline_tag == "image-classification"
    names = {"images": IMAGES}
    exec(card.text.split("```python\n")[1].split("```")[0].replace("'it'", repr(str(folder))), names)
    assert names["logits"].shape == (2, 3)


def test_the_card_claims_no_weights_that_were_not_loaded(tmp_path):
    model = build_backbone("timm/resnet18", out_indices=(0,))
    model.pretrained_cfg.update(tag="a1_in1k", license="apache-2.0")  # timm tells of weights whether loaded or not
    card = ModelCard.load(model.save_pretrained(tmp_path) / "README.md")
    assert "built without published weights" in card.text
    assert card.data.license is None
    assert card.data.base_model is None
    assert_same(model, from_pretrained(tmp_path))


# What cannot be saved or loaded


class Custom(backbones.Backbone):
    size_divisor = 4

    def __init__(self, activation=nn.ReLU, **options):
        super().__init__(channels=(4,), strides=(4,), **options)
        self.stem = nn.Conv2d(self.in_chans, 4, 4, 4)
        self.stages = nn.ModuleList([activation()])


@pytest.fixture
def custom(monkeypatch):
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    monkeypatch.setitem(sys.modules, "custom_models", SimpleNamespace(Custom=Custom))
    spec = BackboneSpec(name="custom", family="Custom", entry="custom_models:Custom", channels=(4,), strides=(4,))
    return backbones.register(spec)


def test_an_option_that_json_cannot_hold_is_named_when_saving(custom, tmp_path):
    model = build_backbone(custom, activation=nn.Tanh, drop_path_rate=0.1)
    with pytest.raises(InputError, match=r"local/custom was built with activation, which config\.json cannot hold"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_preprocessing_that_json_cannot_hold_is_named_when_saving(tmp_path):
    model = build_backbone("edgevit_xxs", out_indices=(0,))
    model.pretrained_cfg["mean"] = torch.zeros(3)
    with pytest.raises(InputError, match="pretrained_cfg cannot be saved, JSON holds no Tensor"):
        model.save_pretrained(tmp_path)


def test_registered_backbones_are_saved_and_need_to_be_registered_again(custom, tmp_path, monkeypatch):
    model = build_backbone(custom)
    model.save_pretrained(tmp_path)
    assert_same(model, from_pretrained(tmp_path))
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    with pytest.raises(
        UnknownBackbone, match=r"'local/custom', which was registered by hand; call backbones\.register"
    ):
        from_pretrained(tmp_path)


def test_a_model_that_has_no_name_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a Custom that was not built by name .* build_backbone"):
        Custom().save_pretrained(tmp_path)


def test_a_missing_plugin_names_its_distribution(saved):
    _, folder = saved
    edit(folder, backbone="mynets/mynet_s", distribution="my-nets", distribution_version="2.1")
    with pytest.raises(MissingDependency, match=r"'mynets/mynet_s' of .*'my-nets' .*'2\.1'.* `pip install my-nets`"):
        from_pretrained(folder)
    edit(folder, distribution="my-nets; rm -rf ~")
    with pytest.raises(WeightsError, match="is no name of a distribution"):
        from_pretrained(folder)
    edit(folder, distribution="dense-backbones", backbone="pvt/pvt_v2_b9")
    with pytest.raises(UnknownBackbone, match="did you mean"):
        from_pretrained(folder)


def test_foreign_and_damaged_folders_are_errors_that_name_them(saved, tmp_path):
    _, folder = saved
    with pytest.raises(WeightsError, match=r"gone/nowhere/at-all: no such folder"):
        from_pretrained("gone/nowhere/at-all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty: expected a config\.json that save_pretrained wrote, and there is"):
        from_pretrained(tmp_path / "empty")
    whole = (folder / "config.json").read_text()
    for content, message in [
        (whole[:50], "no JSON"),
        ("[]", "no JSON object"),
        (json.dumps({"model_type": "resnet", "architectures": ["ResNet"]}), "no 'backbone'"),
        (whole.replace('"options": {', '"options": 3, "_": {'), "no 'options'"),
    ]:
        (folder / "config.json").write_text(content)
        with pytest.raises(WeightsError, match=f"mine: expected a config.json .*{message}"):
            from_pretrained(folder)
    (folder / "config.json").write_text(whole)

    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for part in (content[: len(content) // 2], content[:4], b""):
        weights.write_bytes(part)
        with pytest.raises(WeightsError, match=r"model\.safetensors .* cannot be read as a checkpoint"):
            from_pretrained(folder)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors: no such file"):
        from_pretrained(folder)


def test_a_folder_of_a_newer_version_says_to_upgrade(saved):
    _, folder = saved
    edit(folder, format=FORMAT + 1)
    with pytest.raises(WeightsError, match=rf"is of format {FORMAT + 1}, .* `pip install --upgrade dense-backbones`"):
        from_pretrained(folder)
    edit(folder, format=None)  # folders of the first version state none
    from_pretrained(folder)


def test_a_model_for_a_task_is_no_backbone(saved):
    _, folder = saved
    edit(folder, task="segmentation")
    with pytest.raises(InputError, match=r"holds a model for segmentation.* backbones_tasks\.from_pretrained"):
        from_pretrained(folder)


def test_weights_of_another_model_are_refused(saved, tmp_path):
    _, folder = saved
    build_backbone("pvt_v2_b0").save_pretrained(tmp_path / "whole")  # lacks the norms of the maps
    shutil.copy(tmp_path / "whole" / "model.safetensors", folder)
    with pytest.raises(WeightsError, match=r"does not hold the weights of the config\.json beside it(.|\n)*missing 4"):
        from_pretrained(folder)


def test_a_pickle_is_never_read(saved):
    _, folder = saved
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no such file"):
        from_pretrained(folder)


# The hub


def test_push_sends_the_folder_and_keeps_a_card_that_is_there(saved, fake_hub):
    model, folder = saved
    commit = model.push_to_hub("mine", private=True, commit_message="First", create_pr=True)
    assert fake_hub.made == [("somebody/mine", True)]
    assert (commit.commit_url, commit.commit_message, commit.create_pr) == ("https://hub/somebody/mine", "First", True)
    there = fake_hub.root / "somebody" / "mine"
    for name in ("config.json", "model.safetensors"):
        assert (there / name).read_bytes() == (folder / name).read_bytes()
    assert "from_pretrained('somebody/mine')" in (there / "README.md").read_text()
    assert_same(model, from_pretrained(there))

    (there / "README.md").write_text("# Edited on the hub")
    model.push_to_hub("somebody/mine")
    assert (there / "README.md").read_text() == "# Edited on the hub"


def test_what_cannot_be_saved_makes_no_repository(fake_hub):
    with pytest.raises(InputError, match="not built by name"):
        Custom().push_to_hub("mine")
    assert fake_hub.made == []


@pytest.fixture
def cached(saved, tmp_path, monkeypatch):
    """A hub cache that holds the saved backbone as `somebody/mine`, and no network."""
    cache = tmp_path / "cache"
    repo = cache / "models--somebody--mine"
    shutil.copytree(saved[1], repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repo


def test_a_repository_in_the_local_cache_serves_offline(saved, cached):
    assert_same(saved[0], from_pretrained("somebody/mine"))
    assert_same(saved[0], from_pretrained("somebody/mine", revision=COMMIT))


def test_offline_without_a_cache_says_what_to_do(cached):
    message = (
        r"somebody/else: no such folder, .* not in the local cache .* `hf download somebody/else --local-dir FOLDER`"
    )
    with pytest.raises(WeightsError, match=message):
        from_pretrained("somebody/else")
    (cached / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="not in the local cache"):
        from_pretrained("somebody/mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 100_000_000}, r"100000000 in config\.json is no size"),
        ({"in_chans": 9_999}, r"does not hold the weights of the config\.json beside it"),
        ({"dims": [1_000_000] * 4}, r"describes a model of over [\d,]+ parameters, and its weights are 3,"),
        ({"depths": [1_000_000, 2, 2, 2]}, r"describes a model of over [\d,]+ parameters, and its weights are 3,"),
        ({"depths": [2, 2, 2, 1]}, r"does not fit|does not hold the weights"),
        ({"num_classes": 10**12, "features_only": False}, r"1000000000000 in config\.json is no size"),
    ],
)
def test_a_config_that_asks_for_what_its_weights_are_not_is_refused_before_memory_is_taken(options, message, tmp_path):
    build_backbone("pvt_v2_b0").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"] |= options
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_path": "x.pth"},
        {"pretrained_cfg_overlay": {"file": "x.pth"}},
        {"cache_dir": "x"},
        {"weights_file": "x"},
    ],
)
def test_a_config_makes_timm_read_no_file(options, tmp_path):
    build_backbone("timm/test_resnet").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"] |= options
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"does not take {next(iter(options))}, by which timm reads files"):
        from_pretrained(tmp_path)


def test_options_that_leave_weights_unused_are_refused(tmp_path):
    build_backbone("pvt_v2_b0", out_norm=True).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"8 norms of the maps .* would be ignored: build with out_norm=True"):
        from_pretrained(tmp_path, out_norm=False)


def test_threads_may_build_the_first_models_of_a_process():
    code = (
        "import threading, backbones\n"
        "failed = []\n"
        "def build(name):\n"
        "    try:\n"
        "        backbones.build_backbone(name)\n"
        "    except BaseException as error:\n"
        "        failed.append(error)\n"
        "names = ('pvt_v2_b0', 'vit_tiny_patch16', 'timm/test_resnet', 'efficientformer_l1')\n"
        "threads = [threading.Thread(target=build, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "assert not failed, failed\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
