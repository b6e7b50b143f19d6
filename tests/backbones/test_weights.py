"""Checkpoints: whatever their wrapping they load, and what cannot load says why and changes nothing."""

import argparse
import logging
import os
import shutil
from dataclasses import replace

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from backbones import Backbone, BackboneSpec, Weights, WeightsError, build_backbone
from backbones.weights import KeyLayout, load_pretrained, load_weights, read_checkpoint


class Tiny(Backbone):
    """Two stages, a table with one row per cell of a grid, and a key layout beside its own."""

    key_layouts = (KeyLayout("published", ((r"^conv(\d)\.", r"stages.\1."), (r"^classifier\.", "head."))),)

    def __init__(self, width=8, grid=4, **options):
        super().__init__(channels=(width, 2 * width), strides=(4, 8), **options)
        self.stem = nn.Conv2d(self.in_chans, width, 4, 4)
        down = nn.Sequential(nn.Conv2d(width, 2 * width, 2, 2), nn.BatchNorm2d(2 * width))
        self.stages = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1), down])
        self.table = nn.Parameter(torch.randn(1, grid))

    def adapt_table(self, name, value, checkpoint):
        return value.expand(self.table.shape) if name == "table" and value.shape == (1, 1) else value


SPEC = BackboneSpec(
    name="tiny",
    family="Tiny",
    entry="test_weights:Tiny",
    channels=(8, 16),
    strides=(4, 8),
    weights=(
        Weights(tag="first", source="hf-hub:somebody/tiny"),
        Weights(
            tag="second",
            source="hf-hub:somebody/tiny@abc123",
            input_size=(3, 96, 96),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            interpolation="bilinear",
        ),
        Weights(tag="web", source="https://127.0.0.1:9/tiny-1234.pth"),
    ),
)


@pytest.fixture
def state(randomise):
    return randomise(Tiny(features_only=False)).state_dict()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and empty caches."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def cache(folder, repo, state, filename="model.safetensors", revision="main"):
    """Put a file where `hf download` would."""
    repo = folder / "hub" / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    path = repo / "snapshots" / commit / filename
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


def holds(model, state):
    own = model.state_dict()
    return all(torch.equal(own[key], state[key]) for key in own if key in state)


def under(prefix):
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


def noise(state):
    return {key: torch.randn(value.shape) for key, value in state.items()}


# Wrappings


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        under("module."),
        under("backbone."),
        under("model.backbone."),
        under("module._orig_mod."),
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 299},
        lambda state: {"module": state},
        lambda state: {"state_dict": under("module.")(state), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda state: {"state_dict": noise(state), "state_dict_ema": state},
        lambda state: {"model": noise(state), "model_ema": under("module.")(state)},
        lambda state: {"student": noise(state), "teacher": under("module.backbone.")(state)},
        lambda state: {"checkpoint": 1, "model": {"state_dict": state}},
        lambda state: under("backbone.")(state) | {f"head.{i}.weight": torch.ones(1) for i in range(100)},
        lambda state: {key.replace("stages.", "conv").replace("head.", "classifier."): state[key] for key in state},
    ],
)
def test_wrapped_checkpoints_load(wrap, state, tmp_path):
    torch.save(wrap(state), tmp_path / "checkpoint.pth")
    model = Tiny(features_only=False)
    report = load_weights(model, tmp_path / "checkpoint.pth")
    assert report.share == 1
    assert not report.missing
    assert holds(model, state)


def test_file_formats_load_the_same(state, tmp_path):
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.bin")
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.bin", "c.pth"):
        model = Tiny()
        load_weights(model, tmp_path / name)
        assert holds(model, state)


def test_half_precision_checkpoints_load_in_the_precision_of_the_model(state):
    model = Tiny(in_chans=4, features_only=False)
    load_weights(model, {key: value.half() for key, value in state.items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.head.weight, state["head.weight"], atol=1e-3, rtol=1e-3)


# The report


def test_names_that_a_layout_turns_into_nothing_are_left_out(state):
    layout = KeyLayout("published", ((r".*_index$", ""), (r"^conv(\d)\.", r"stages.\1.")))
    published = {"conv0.bias": state["stages.0.bias"], "table_index": torch.arange(4)}
    assert layout.convert(published) == {"stages.0.bias": state["stages.0.bias"]}


def test_report_says_what_became_of_each_tensor(state, caplog):
    state["table"] = state["table"][:, :1]
    del state["stages.0.bias"]
    del state["stages.1.1.num_batches_tracked"]  # which old checkpoints lack, and nobody misses
    state["stages.0.extra"] = torch.ones(2, 3)
    checkpoint = under("backbone.")(state) | {"neck.weight": torch.ones(5)}
    model = Tiny(in_chans=4, features_only=False, num_classes=7)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, "backbones"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("backbones.weights.fitting.MINIMUM_SHARE", 0.8)
        report = load_weights(model, checkpoint, strict=False)
    assert model.load_report is report
    assert (report.source, report.layout, report.prefix) == ("state dict", "own", "backbone.")
    assert report.resized == {"stem.weight": ((8, 3, 4, 4), (8, 4, 4, 4)), "table": ((1, 1), (1, 4))}
    assert report.mismatched == {"head.weight": ((1000, 16), (7, 16)), "head.bias": ((1000,), (7,))}
    assert report.missing == {"stages.0.bias": (8,)}
    assert report.unexpected == {"stages.0.extra": (2, 3), "neck.weight": (5,)}
    assert report.loaded.keys() == state.keys() - report.mismatched.keys() - report.unexpected.keys()
    assert report.share == pytest.approx(8 / 9)
    assert report.loaded["stem.weight"] == (8, 4, 4, 4)
    for line in (
        "state dict: 88.9% of the backbone's parameters loaded, own layout under 'backbone.'",
        "  resized 2\n    stem.weight 8x3x4x4 -> 8x4x4x4\n",
        "  mismatched 2\n    head.bias 1000 -> 7\n    head.weight 1000x16 -> 7x16\n",
        "  missing 1\n    stages.0.bias 8\n",
        "    stages.0.extra 2x3",
    ):
        assert all(part in str(report) for part in line.split("\n"))
    assert caplog.records[-1].levelno == logging.WARNING  # something is missing that should not be
    kept = {key: model.state_dict()[key] for key in (*report.mismatched, *report.missing)}
    assert all(torch.equal(value, own[key]) for key, value in kept.items())


def test_head_for_other_classes_stays_fresh_without_a_warning(state, caplog):
    model = Tiny(features_only=False, num_classes=7)
    fresh = model.head.weight.clone()
    with caplog.at_level(logging.INFO, "backbones"):
        report = load_weights(model, state)
    assert report.mismatched.keys() == {"head.weight", "head.bias"}
    assert report.share == 1
    assert torch.equal(model.head.weight, fresh)
    assert caplog.records[-1].levelno == logging.INFO


def test_long_lists_in_a_report_are_cut(state):
    report = load_weights(Tiny(), state | {f"decoder.{i}": torch.ones(1) for i in range(50)})
    assert "... and 32 more" in str(report)  # 50 and the head's 2
    assert len(report.unexpected) == 52


@pytest.mark.parametrize("mode", ["tensors", "parameters"])
def test_under_nine_tenths_is_an_error(mode, randomise):
    model = build_backbone("pvt_v2_b0")
    state = randomise(build_backbone("pvt_v2_b0")).state_dict()
    sizes = sorted(state, key=lambda key: state[key].numel(), reverse=mode == "parameters")
    total = sum(value.numel() for value in state.values()) if mode == "parameters" else len(state)
    dropped, share = [], 0.0
    while share <= 0.1:  # many small ones, or few large ones
        dropped.append(sizes[len(dropped)])
        share += (state[dropped[-1]].numel() if mode == "parameters" else 1) / total
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"(?s)does not fit pvt/pvt_v2_b0.*\n.*: {1 - share:.1%}"):
        load_weights(model, {key: value for key, value in state.items() if key not in dropped})
    assert holds(model, before)
    assert not hasattr(model, "load_report")
    most = {key: value for key, value in state.items() if key not in dropped[1:-1]}
    load_weights(model, most, strict=False)
    if most.keys() != state.keys():
        with pytest.raises(WeightsError, match=r"stay as they are, because the checkpoint lacks them"):
            load_weights(model, most)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("pvt_v2_b0", "pvt_v2_b1"),
        ("vit_tiny_patch16", "vit_small_patch16"),
        ("vit_small_patch16", "deit3_small_patch16"),
        ("pvt_v2_b0", "vit_tiny_patch16"),
    ],
)
def test_checkpoint_of_another_variant_is_refused_and_changes_nothing(name, other, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(build_backbone(name).state_dict(), path)
    model = build_backbone(other)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=f"does not fit .*{other}") as caught:
        load_weights(model, path)
    for part in (str(path), "Check that it is of this variant", "of the backbone's parameters loaded", "missing"):
        assert part in str(caught.value)
    assert holds(model, before)


def test_checkpoint_of_a_close_relative_loads_only_when_asked_to_and_with_a_warning(caplog):
    state = build_backbone("pvt_v2_b2").state_dict()
    model = build_backbone("pvt_v2_b2_li")
    with pytest.raises(WeightsError, match=r"attn\.sr\.weight is 64x64x8x8, and the model's 64x64x1x1"):
        load_weights(model, state)
    report = load_weights(model, state, strict=False)
    assert report.mismatched["stages.0.blocks.0.attn.sr.weight"] == ((64, 64, 8, 8), (64, 64, 1, 1))
    assert "stages.3.blocks.0.attn.sr.weight" in report.missing
    assert caplog.records[-1].levelno == logging.WARNING
    assert "stages.0.blocks.0.attn.sr.weight 64x64x8x8 -> 64x64x1x1" in caplog.text


# Files that are none


class Runs:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickled_code_is_refused_and_not_run(state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": state, "extra": Runs(tmp_path / "ran")}, path)
    with pytest.raises(WeightsError, match=rf"checkpoint\.pth \(.* bytes\) .*it holds a {os.name}\.mkdir.*torch\.save"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    ("extra", "named"), [({"best": np.float64(0.5)}, "numpy"), ({"model": nn.Linear(2, 2)}, "Linear")]
)
def test_what_is_no_plain_data_is_named(extra, named, state, tmp_path):
    torch.save({"state_dict": state, **extra}, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match=rf"holds a \S*{named}"):
        read_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_file_is_an_error_that_names_it(suffix, share, state, tmp_path):
    path = tmp_path / f"checkpoint.{suffix}"
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    model = build_backbone("pvt_v2_b0")
    with pytest.raises(WeightsError, match=rf"checkpoint\.{suffix} \([\d,]+ bytes\) cannot be read.*download it again"):
        load_weights(model, path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin"])
@pytest.mark.parametrize("content", [b"hello world\n", b"<!DOCTYPE html><html>404</html>", b"\x89PNG\r\n\x1a\n" * 50])
def test_foreign_file_is_an_error_that_gives_no_dangerous_advice(suffix, content, tmp_path):
    path = tmp_path / f"checkpoint.{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint") as caught:
        build_backbone("pvt_v2_b0", pretrained=path)
    assert "weights_only" not in str(caught.value)


def test_file_without_a_state_dict_is_an_error(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for content, message in [
        ([1, 2], "checkpoint.pth holds a list; expected a state dict"),
        ({"epoch": 3, "args": {"lr": 1}}, "checkpoint.pth holds no tensors .* its keys: epoch, args"),
        ({}, "checkpoint.pth holds no tensors .* its keys: none"),
    ]:
        torch.save(content, path)
        with pytest.raises(WeightsError, match=message):
            load_weights(Tiny(), path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.pth: no such file"):
        load_weights(Tiny(), tmp_path / "gone.pth")
    with pytest.raises(WeightsError, match=r"gone\.pth' is neither a file nor one of its weights \(in1k\)"):
        build_backbone("pvt_v2_b0", pretrained=tmp_path / "gone.pth")


# Published weights


@pytest.mark.parametrize("pretrained", ["imagenet", "/", "in1k_384"])
def test_unknown_tag_lists_the_known_ones(pretrained):
    with pytest.raises(WeightsError, match=rf"pretrained='{pretrained}' is neither a file nor .*\(in1k\)"):
        build_backbone("pvt_v2_b0", pretrained=pretrained)


def test_backbone_without_published_weights_says_so():
    spec = BackboneSpec(name="bare", family="Tiny", entry="test_weights:Tiny", channels=(8, 16), strides=(4, 8))
    with pytest.raises(WeightsError, match="bare has no published weights; pass pretrained=PATH"):
        load_pretrained(Tiny(), spec, True)


@pytest.mark.parametrize("pretrained", [True, "in1k", "DEFAULT"])
def test_offline_without_a_cache_says_what_to_download_and_where_to_put_it(pretrained, offline):
    with pytest.raises(WeightsError, match="not in the local cache") as caught:
        build_backbone("pvt_v2_b0", pretrained=pretrained)
    for part in ("pvt_v2_b0", "'in1k'", "`hf download timm/pvt_v2_b0.in1k`", "pretrained=PATH", "HF_HOME"):
        assert part in str(caught.value)


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("pretrained", [True, "in1k"])
def test_local_cache_of_the_hub_serves_offline(pretrained, filename, offline, randomise):
    reference = randomise(timm.create_model("pvt_v2_b0"))
    cache(offline, "timm/pvt_v2_b0.in1k", reference.state_dict(), filename)
    model = build_backbone("pvt_v2_b0", pretrained=pretrained, out_indices=(0, 3)).eval()
    assert model.load_report.layout == "timm"
    assert model.load_report.source.endswith(filename)
    assert model.pretrained_cfg["tag"] == "in1k"
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = reference.forward_intermediates(images, indices=(0, 3), intermediates_only=True)
        for ours, theirs in zip(model(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_tag_and_revision_choose_the_weights_and_their_preprocessing(offline, state):
    cache(offline, "somebody/tiny", state, revision="abc123")
    model = Tiny(features_only=False)
    with pytest.raises(WeightsError, match="'first' are not in the local cache"):
        load_pretrained(model, SPEC, True)
    load_pretrained(model, SPEC, "second")
    assert holds(model, state)
    expected = {"tag": "second", "input_size": (3, 96, 96), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    assert expected.items() <= model.pretrained_cfg.items()
    assert model.pretrained_cfg["interpolation"] == "bilinear"


def test_a_source_on_the_hub_may_name_its_file(offline, state):
    spec = replace(SPEC, weights=(Weights(tag="odd", source="hf-hub:somebody/odd/model_ema.bin"),))
    model = Tiny(features_only=False)
    with pytest.raises(WeightsError, match="hf download somebody/odd`"):
        load_pretrained(model, spec, True)
    cache(offline, "somebody/odd", state, filename="model_ema.bin")
    load_pretrained(model, spec, True)
    assert holds(model, state)


def test_parts_that_are_new_may_stand_within_others(state):
    class Nested(Tiny):
        new_parts = ("stages.1", "head", "out_norms")

    report = load_weights(Nested(), {key: value for key, value in state.items() if not key.startswith("stages.1.")})
    assert report.share == 1
    with pytest.raises(WeightsError, match="does not fit"):
        load_weights(Nested(), {key: value for key, value in state.items() if not key.startswith("stages.0.")})


def test_web_source_is_served_from_the_cache_of_torch_hub(offline, state):
    model = Tiny(features_only=False)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE") as caught:
        load_pretrained(model, SPEC, "web")
    place = offline / "torch" / "hub" / "checkpoints" / "tiny-1234.pth"
    assert f"Download https://127.0.0.1:9/tiny-1234.pth elsewhere and put it at {place}" in str(caught.value)
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, place)
    load_pretrained(model, SPEC, "web")
    assert holds(model, state)


def test_web_source_is_downloaded_once(offline, state, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(WeightsError, match=r"could not be downloaded .*refused"):  # nobody listens at that port
        load_pretrained(Tiny(), SPEC, "web")
    place = offline / "torch" / "hub" / "checkpoints" / "tiny-1234.pth"
    assert not list(place.parent.iterdir())
    torch.save(state, offline / "remote.pth")
    fetched = []

    def download(url, path, hash_prefix):
        fetched.append(url)
        shutil.copy(offline / "remote.pth", path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        model = Tiny()
        load_pretrained(model, SPEC, "web")
        assert holds(model, state)
    assert fetched == ["https://127.0.0.1:9/tiny-1234.pth"]


# Odd channels


def test_checkpoint_with_other_than_three_channels_is_not_adapted(state):
    state["stem.weight"] = torch.randn(8, 5, 4, 4)
    model = Tiny(in_chans=4)
    fresh = model.stem.weight.clone()
    with pytest.raises(WeightsError, match=r"stem\.weight 8x5x4x4 -> 8x4x4x4"):
        load_weights(model, state)
    assert torch.equal(model.stem.weight, fresh)


@pytest.mark.parametrize("in_chans", [1, 6])
def test_first_convolution_keeps_its_answer_to_grey_images(in_chans, state):
    model, rgb = Tiny(in_chans=in_chans), Tiny()
    load_weights(model, state)
    load_weights(rgb, state)
    grey = torch.rand(1, 1, 32, 32)
    ours, theirs = model.stem(grey.expand(-1, in_chans, -1, -1)), rgb.stem(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# Judged before anything is written


def unchanged(model, before):
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.index_fill(0, torch.tensor(0), float("nan")),
            r"16 of the 256 numbers of head\.weight are NaN",
        ),
        (lambda v: (v.double() * 1e300).index_fill(0, torch.tensor(0), 1e300), r"of head\.weight are NaN or infinite"),
        (lambda v: v.to(torch.int8), r"head\.weight is int8, which are no weights"),
        (lambda v: v.bool(), r"head\.weight is bool, which are no weights"),
        (lambda v: v.to(torch.complex64), r"head\.weight is complex64, which are no weights"),
        (lambda v: v.to_sparse(), r"head\.weight is a sparse_coo tensor; save it as a dense tensor"),
        (lambda v: v.to("meta"), r"head\.weight is on the meta device and holds no numbers"),
    ],
)
def test_what_is_no_weight_is_named_and_nothing_is_changed(change, message, state):
    model = Tiny(features_only=False, num_classes=16)
    state = {**state, "head.weight": torch.ones(16, 16), "head.bias": torch.ones(16)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"state dict: .*{message}"):
        load_weights(model, {**state, "head.weight": change(state["head.weight"])})
    assert unchanged(model, before)
    load_weights(model, state)
    assert not unchanged(model, before)


def test_a_model_on_the_meta_device_is_named(state):
    with torch.device("meta"):
        model = Tiny()
    with pytest.raises(WeightsError, match="Tiny is on the meta device and holds nothing"):
        load_weights(model, state)


@pytest.mark.parametrize("pretrained", ["", {}, 3, []])
def test_pretrained_that_names_nothing_is_an_error(pretrained):
    with pytest.raises(WeightsError, match=r"pvt_v2_b0: pretrained=.* names no weights"):
        build_backbone("pvt_v2_b0", pretrained=pretrained)


def test_names_that_are_no_strings_are_an_error(state):
    with pytest.raises(WeightsError, match="names of tensors are strings, and it has 0, 1, 2, 3"):
        load_weights(Tiny(), dict(enumerate(state.values())))


def test_of_two_sets_of_weights_that_fit_the_user_chooses(state):
    with pytest.raises(WeightsError, match="holds two sets of weights that fit, 'one' and 'other'"):
        load_weights(Tiny(), {"one": state, "other": noise(state)})
    with pytest.raises(WeightsError, match=r"several sets of weights that fit, under 'left\.', 'right\.'"):
        load_weights(Tiny(), under("left.")(state) | under("right.")(noise(state)))


@pytest.mark.parametrize(
    "container", ["ema", "net", "params", "params_ema", "student", "backbone", "encoder", "weights"]
)
def test_containers_of_any_name_are_opened(container, state):
    content = {container: state, "optimizer": {"exp_avg": noise(state)}, "state_dict_ema": {}}
    content["model"] = content  # an endless way down
    model = Tiny(features_only=False)
    load_weights(model, content)
    assert holds(model, state)


def test_a_pruned_pyramid_is_told_from_a_deeper_variant():
    whole = build_backbone("pvt_v2_b0", features_only=False).state_dict()
    assert load_weights(build_backbone("pvt_v2_b0", out_indices=(0, 1)), whole).share == 1
    deeper = build_backbone("pvt_v2_b0", depths=[2, 2, 4, 2]).state_dict()
    for out_indices in (None, (0, 1)):
        with pytest.raises(WeightsError, match=r"40 tensors of stages\.2\.blocks 2 to 3 would be ignored: .* a deeper"):
            load_weights(build_backbone("pvt_v2_b0", out_indices=out_indices), deeper)
    shallower = build_backbone("pvt_v2_b0", depths=[2, 2, 1, 2]).state_dict()
    with pytest.raises(WeightsError, match=r"20 tensors of stages\.2\.blocks 1 would stay as they are, .* a shallower"):
        load_weights(build_backbone("pvt_v2_b0"), shallower)
