"""Backbones of transformers under the contract: the same maps as AutoBackbone, on images of any size."""

import json
import math
import pickle
import subprocess
import sys

import huggingface_hub
import pytest
import torch

import backbones
from backbones import InputError, MissingDependency, UnknownBackbone, WeightsError, backbone_info, build_backbone
from backbones.testing import parametrize_backbones
from backbones_transformers import configs

_VIT = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 4, "image_size": 64}
_CONV = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
_SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
SMALL = {
    "beit": _VIT | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "bit": _CONV | {"embedding_size": 32, "num_groups": 4},
    "convnext": _CONV,
    "convnextv2": _CONV,
    "dinov2": _VIT | {"image_size": 56},
    "dinov2_with_registers": _VIT,
    "dinov3_convnext": _CONV,
    "dinov3_vit": _VIT | {"num_register_tokens": 4},
    "hgnet_v2": {"stage_out_channels": [32, 64, 96, 128], "stage_in_channels": [48, 32, 64, 96]},
    "maskformer-swin": _SWIN,
    "pixio": _VIT,
    "pvt_v2": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 2, 1]},
    "resnet": _CONV | {"embedding_size": 16},
    "rt_detr_resnet": _CONV | {"embedding_size": 16},
    "sapiens2": _VIT | {"num_key_value_heads_per_layer": [2] * 4},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "tipsv2_vision_model": _VIT | {"image_size": 56},
    "vitdet": _VIT
    | {
        "pretrain_image_size": 64,
        "window_block_indices": [0, 2],
        "window_size": 3,
        "use_relative_position_embeddings": True,
    },
}
every_type = pytest.mark.parametrize("model_type", SMALL)


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


def small(model_type, **options):
    return build_backbone(f"transformers/{model_type}", config=SMALL[model_type], **options)


@pytest.fixture
def saved(transformers, randomise, tmp_path):
    """transformers' own backbone with all of its features, and the folder that it was saved to."""

    def save(model_type):
        settings = configs.complete({"model_type": model_type} | SMALL[model_type])
        features = sorted(set(configs.levels(settings)[2]))
        config = transformers.AutoConfig.for_model(**settings, out_indices=features)
        model = randomise(transformers.AutoBackbone.from_config(config))
        model.save_pretrained(tmp_path / model_type)
        return type(model).from_pretrained(tmp_path / model_type).eval(), tmp_path / model_type

    return save


def tiny_dinov2(**options):
    pytest.importorskip("transformers")
    return small("dinov2", **options)


def tiny_convnext(**options):
    pytest.importorskip("transformers")
    return small("convnext", **options)


@parametrize_backbones([tiny_dinov2, tiny_convnext], slow_marks=pytest.mark.slow)
def test_conformance(name, check):
    check(name)


# --- names ----------------------------------------------------------------------------------------------------


def test_every_type_that_transformers_has_is_offered_or_refused(transformers):
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

    assert SMALL.keys() == configs.KINDS.keys()
    same = {"tipsv2": "tipsv2_vision_model"}  # the whole of a model, and its vision tower
    known = configs.KINDS.keys() | configs.REFUSED.keys()
    assert {same.get(name, name) for name in MODEL_FOR_BACKBONE_MAPPING_NAMES} <= known


@every_type
def test_defaults_are_those_of_the_installed_transformers(model_type, transformers):
    defaults = transformers.AutoConfig.for_model(model_type).to_dict()
    for name, value in configs.KINDS[model_type].defaults.items():
        theirs = defaults[name]
        assert (list(theirs) if isinstance(theirs, tuple) else theirs) == value, name


def test_types_are_listed_where_the_namespace_is_named():
    assert "transformers/dinov2" in backbones.list_backbones("transformers/*")
    assert not [name for name in backbones.list_backbones() if name.startswith("transformers/")]


def test_a_name_is_found_without_torch_or_transformers(saved):
    _, folder = saved("dinov2")
    code = (
        "import sys, backbones; info = backbones.backbone_info(sys.argv[1]);"
        "print(info.channels, info.strides, info.requires, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, f"transformers/{folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(8, 16, 32, 32) (4, 8, 16, 32) ('transformers>=5',) []\n"


def test_folders_are_named_from_the_root_or_from_here(saved, monkeypatch):
    _, folder = saved("convnext")
    monkeypatch.chdir(folder.parent.parent)
    for name in (str(folder), f"./{folder.parent.name}/convnext", f"{folder.parent.name}/convnext"):
        assert backbone_info(f"transformers/{name}").canonical_name == f"transformers/{name}"
        assert build_backbone(f"transformers/{name}", pretrained=True).out_channels == [16, 32, 48, 64]


def test_ids_of_the_hub_are_read_from_their_configuration(saved, monkeypatch):
    model, folder = saved("resnet")
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ours = build_backbone("transformers/microsoft/resnet-tiny", pretrained=True)
    assert ours.canonical_name == "transformers/microsoft/resnet-tiny"
    assert ("microsoft/resnet-tiny", "model.safetensors") in asked
    weight = "embedder.embedder.convolution.weight"
    assert torch.equal(ours.state_dict()[f"body.{weight}"], model.state_dict()[weight])


def test_offline_it_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownBackbone, match="run `hf download facebook/dinov2-small`"):
        build_backbone("transformers/facebook/dinov2-small")
    assert {p.status for p in backbones.plugins() if p.namespace == "transformers"} == {"ok"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no configuration can be read there"),
        ("{", "no configuration can be read there"),
        ('{"model_type": "bert"}', "is of model type 'bert', which is none that gives maps here: beit,"),
    ],
)
def test_a_folder_without_a_backbone_says_so(content, words, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnknownBackbone, match=words):
        build_backbone(f"transformers/{tmp_path}")


@pytest.mark.parametrize("model_type", configs.REFUSED)
def test_what_cannot_keep_the_promise_says_why(model_type, transformers, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name in (model_type, tmp_path):
        with pytest.raises(InputError, match=f"model type '{model_type}' is not offered: it|transformers"):
            build_backbone(f"transformers/{name}")


def test_other_bare_names_are_left_to_others():
    assert configs.read("resnet50") is None
    with pytest.raises(UnknownBackbone, match="there is no backbone 'no_such_model'"):
        build_backbone("no_such_model")


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("backbones.building._is_installed", lambda requirement: False)
    with pytest.raises(MissingDependency, match=r"run `pip install 'transformers>=5'`"):
        build_backbone("transformers/dinov2")


# --- maps and weights -----------------------------------------------------------------------------------------


@every_type
def test_maps_equal_those_of_autobackbone(model_type, saved, assert_equals_reference):
    theirs, folder = saved(model_type)
    plain = {"pyramid": "plain"} if configs.KINDS[model_type].plain else {}
    ours = build_backbone(f"transformers/{folder}", pretrained=True, **plain).eval()
    assert ours.load_report.share == 1.0
    assert not ours.load_report.missing
    patch = 14 if ours.strides == [14] else 32
    for height, width in [(SMALL[model_type].get("image_size", 64),) * 2, (3 * patch, 5 * patch)]:
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            for i, (m, reference) in enumerate(zip(ours(images), theirs(images).feature_maps, strict=True)):
                limit = 1e-4 * max(1.0, reference.abs().max().item())
                assert_equals_reference(f"{model_type} map {i}", m, reference, limit)


@every_type
def test_any_size(model_type, transformers):
    model = small(model_type).eval()
    for height, width in [(64, 64), (97, 161), (33, 65), (5, 70), (1, 1)]:
        with torch.no_grad():
            maps = model(torch.randn(1, 3, height, width))
        sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in (4, 8, 16, 32)]
        assert [tuple(m.shape[1:]) for m in maps] == [(c, *s) for c, s in zip(model.out_channels, sizes, strict=True)]
        assert all(m.isfinite().all() for m in maps)


@every_type
def test_gradients_reach_all_that_learns(model_type, transformers):
    model = small(model_type)
    sum(m.square().mean() for m in model(torch.randn(2, 3, 70, 90))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("model_type", ["dinov2", "beit", "swin", "pvt_v2", "convnext", "hgnet_v2"])
def test_a_part_of_the_pyramid_has_fewer_blocks_and_the_same_maps(model_type, saved):
    _, folder = saved(model_type)
    options = {"pyramid": "taps"} if configs.KINDS[model_type].plain else {}
    full = build_backbone(f"transformers/{folder}", pretrained=True, **options).eval()
    part = build_backbone(f"transformers/{folder}", pretrained=True, out_indices=(0, 1), **options).eval()
    part.load_state_dict(full.state_dict(), strict=False)  # a fresh pyramid too
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in full.parameters())
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        for a, b in zip(part(images), full(images)[:2], strict=True):
            torch.testing.assert_close(a, b)


def test_weights_serve_other_channels_and_a_classifiers_checkpoint_serves_too(transformers, tmp_path):
    config = transformers.AutoConfig.for_model("dinov2", **SMALL["dinov2"])
    classifier = transformers.AutoModelForImageClassification.from_config(config)
    classifier.save_pretrained(tmp_path)
    model = build_backbone(f"transformers/{tmp_path}", pretrained=True, in_chans=1)
    weight = classifier.state_dict()["dinov2.embeddings.patch_embeddings.projection.weight"]
    own = model.state_dict()["body.embeddings.patch_embeddings.projection.weight"]
    torch.testing.assert_close(own, weight.sum(1, keepdim=True))
    assert model.load_report.share == 1.0


def test_weights_of_another_model_are_an_error(saved):
    _, folder = saved("resnet")
    with pytest.raises(WeightsError, match="does not fit"):
        small("convnext", pretrained=folder / "model.safetensors")


def test_our_own_checkpoints_load_again(transformers, tmp_path):
    model = small("dinov2", out_indices=(1, 2)).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    again = small("dinov2", out_indices=(1, 2), pretrained=tmp_path / "own.pth").eval()
    images = torch.randn(1, 3, 50, 60)
    with torch.no_grad():
        for a, b in zip(model(images), again(images), strict=True):
            assert torch.equal(a, b)
    assert not again.load_report.missing


# --- options --------------------------------------------------------------------------------------------------


def test_config_takes_settings_or_a_configuration(transformers):
    config = transformers.AutoConfig.for_model("dinov2", **SMALL["dinov2"])
    for given in (SMALL["dinov2"], config):
        assert build_backbone("transformers/dinov2", config=given).out_channels == [8, 16, 32, 32]
    with pytest.raises(InputError, match="config= is of type 'dinov2', and 'swin' of 'swin'"):
        build_backbone("transformers/swin", config=config)


def test_pyramids_of_plain_transformers(transformers):
    taps = small("dinov2", pyramid="taps")
    assert (taps.out_channels, taps.strides, taps.features) == ([32] * 4, [4, 8, 16, 32], (1, 2, 3, 4))
    plain = small("dinov2", pyramid="plain")
    assert (plain.out_channels, plain.strides) == ([32], [14])
    with pytest.raises(InputError, match="pyramid='fpn' is unknown; choose from 'simple', 'taps', 'plain'"):
        small("dinov2", pyramid="fpn")
    with pytest.raises(InputError, match=r"taps=.* must be four ascending blocks from 1 to 4"):
        small("dinov2", taps=(1, 2, 3, 9))
    with pytest.raises(InputError, match="Swin has a pyramid of its own"):
        small("swin", pyramid="taps")


def test_what_transformers_lacks_is_refused(transformers):
    with pytest.raises(InputError, match="features_only=False is not offered"):
        small("convnext", features_only=False)
    with pytest.raises(InputError, match="resnet has no drop path"):
        small("resnet", drop_path_rate=0.1)


@pytest.mark.parametrize("model_type", ["dinov3_vit", "swin", "pvt_v2", "resnet", "dinov3_convnext", "swinv2"])
def test_freezing_and_lr_decay_go_by_stages(model_type, transformers):
    model = small(model_type, frozen_stages=1)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert frozen
    assert trainable
    model = small(model_type)
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    lowest = {name for name, scale in by_name.items() if scale == min(by_name.values())}
    stem = {id(p) for part in model.freezable()[0] for p in part.parameters()}
    assert lowest == {name for name, p in model.named_parameters() if id(p) in stem}
    assert len(set(by_name.values())) > 4


@pytest.mark.parametrize("model_type", ["beit", "swin", "maskformer-swin"])
def test_pickled_models_gather_their_features_again(model_type, transformers):
    model = small(model_type).eval()
    images = torch.randn(1, 3, 64, 64)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for a, b in zip(model(images), again(images), strict=True):
            assert torch.equal(a, b)
        assert len(model(images)) == 4  # the original has kept its hooks


@pytest.mark.parametrize(
    "model_types",
    [
        pytest.param(("dinov2", "convnextv2", "dinov3_vit")),
        pytest.param(tuple(set(SMALL) - {"dinov2", "convnextv2", "dinov3_vit"}), marks=pytest.mark.slow),
    ],
)
def test_pickled_models_run_in_another_process(model_types, transformers, tmp_path):
    images = torch.randn(1, 3, 64, 64)
    content = {}
    for model_type in model_types:
        model = small(model_type).eval()
        with torch.no_grad():
            content[model_type] = pickle.dumps(model), [m.clone() for m in model(images)]
    (tmp_path / "models.pkl").write_bytes(pickle.dumps((images, content)))
    code = (
        "import pickle, sys, torch\n"
        "images, content = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad():\n"
        "    for name, (model, maps) in content.items():\n"
        "        again = pickle.loads(model)(images)\n"
        "        assert len(again) == len(maps), name\n"
        "        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, maps)), name\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "models.pkl")], check=True, timeout=300)


def test_settings_that_name_code_are_refused(transformers):
    with pytest.raises(InputError, match="attn_implementation='somebody/kernel' names code to be loaded"):
        build_backbone("transformers/dinov2", config={"attn_implementation": "somebody/kernel"})
