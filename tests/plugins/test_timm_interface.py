"""What code written for timm's models says to a backbone, and gets: None, sizes, intermediates, names of all times."""

import pytest
import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models._registry import _model_entrypoints, _model_to_module, _module_to_models
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from backbones import (
    Backbone,
    InputError,
    UnknownBackbone,
    backbone_info,
    build_backbone,
    for_inference,
    from_pretrained,
    list_backbones,
)
from backbones.arguments import NONE_IS_DEFAULT
from backbones.testing import smallest_of_each_family
from backbones.weights import load_weights
from backbones_timm import table
from backbones_vit.vit import VisionTransformer

FAMILIES = smallest_of_each_family(list_backbones())
ONE_OF_EACH = [*FAMILIES, "timm/test_resnet", "timm/test_vit", "torchvision/resnet18"]
NONE = dict.fromkeys(("output_stride", "drop_path_rate", "num_classes", "global_pool", "img_size", "in_chans"))


# --- None, and sizes that mean nothing --------------------------------------------------------------------------


def test_none_is_the_default_of_every_option_of_the_base_class_but_of_indices():
    options = {*Backbone.__init__.__kwdefaults__} - {"channels", "strides", "out_indices"}
    assert options == NONE_IS_DEFAULT


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_none_changes_nothing(name, on_meta):
    for features_only in (True, False):
        told = build_backbone(name, features_only=features_only, **NONE)
        plain = build_backbone(name, features_only=features_only)
        assert {k: v.shape for k, v in told.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
        assert told.build_options == plain.build_options
    assert told.global_pool == plain.global_pool


def test_none_is_the_default_where_classes_are_called_by_themselves():
    model = VisionTransformer(dim=48, heads=3, depth=1, global_pool=None, img_size=None, features_only=None)
    assert (model.global_pool, model.grid, model.features_only) == ("token", (14, 14), True)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_size_may_be_given_to_all(name, on_meta):
    for size in (96, (96, 96) if name.startswith("maxvit") else (64, 96)):
        model = build_backbone(name, img_size=size)
        assert [m.shape[1] for m in model(torch.randn(1, 3, 64, 96))] == model.out_channels
    if not name.startswith("timm/"):
        with pytest.raises(InputError, match="img_size=0 is no size; give a side in pixels"):
            build_backbone(name, img_size=0)


def test_a_size_of_the_wrong_kind_is_refused():
    for wrong in ("224", (1, 2, 3), 3.5, True):
        with pytest.raises(InputError, match=r"img_size=.* is no size"):
            build_backbone("pvt_v2_b0", img_size=wrong)


# --- intermediates ----------------------------------------------------------------------------------------------

# Ours, timm's, what both are told so that there is little to compute, and which of timm's intermediates ours are.
PAIRS = {
    "vit_tiny_patch16": ("vit_tiny_patch16_224", {"depth": 3}),
    "deit_tiny_distilled_patch16": ("deit_tiny_distilled_patch16_224", {"depth": 2}),
    "vit_small_r26_s32": ("vit_small_r26_s32_224", {"depth": 2}),
    "swin_tiny": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
    "convnext_tiny": ("convnext_tiny", {"depths": (1, 1, 1, 1)}),
    "pvt_v2_b0": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    "twins_svt_small": ("twins_svt_small", {"depths": (1, 1, 1, 1)}),
    "efficientformer_l1": ("efficientformer_l1", {"depths": (1, 1, 1, 1)}),
    "mobilevit_xxs": ("mobilevit_xxs", {}),
    "maxvit_rmlp_pico_rw": ("maxvit_rmlp_pico_rw_256", {"depths": (1, 1, 1, 1)}),
    "coatnet_nano_rw": ("coatnet_nano_rw_224", {"depths": (1, 1, 1, 1)}),
}


@pytest.fixture(scope="module")
def pair(randomise):
    made = {}

    def get(name):
        if name not in made:
            made.clear()
            timm_name, options = PAIRS[name]
            theirs = randomise(timm.create_model(timm_name, num_classes=7, **options)).eval()
            ours = build_backbone(name, features_only=False, num_classes=7, **options).eval()
            load_weights(ours, theirs.state_dict())
            made[name] = ours, theirs, torch.randn(1, *theirs.pretrained_cfg["input_size"])
        return made[name]

    return get


def close(ours, theirs):
    if theirs.ndim == 4 and ours.shape != theirs.shape:
        theirs = theirs.permute(0, 3, 1, 2)  # Swin's final features
    if theirs.ndim == 3 and ours.ndim == 4:
        theirs = theirs.mT.unflatten(2, ours.shape[2:])
    torch.testing.assert_close(ours, theirs, atol=1e-4 * max(1.0, theirs.abs().max().item()), rtol=0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_intermediates_are_timms(name, norm, pair):
    ours, theirs, images = pair(name)
    count = len(ours.blocks) if hasattr(ours, "blocks") else len(ours.stages)
    with torch.no_grad():
        final, maps = ours.forward_intermediates(images, norm=norm)
        expected_final, expected = theirs.forward_intermediates(images, indices=count, norm=norm)
        close(final, expected_final)
        if name == "mobilevit_xxs" and not norm:  # whose last is the classifier's in timm, normed or not
            maps, expected = maps[:-1], expected[:-1]
        for m, reference in zip(maps, expected, strict=True):
            close(m, reference)
        (early,) = ours.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
        close(early, theirs.forward_intermediates(images, indices=[-count], intermediates_only=True)[0])
        assert len(ours.forward_intermediates(images, indices=2, intermediates_only=True)) == 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "deit_tiny_distilled_patch16"])
def test_tokens_are_returned_as_timms(name, pair):
    ours, theirs, images = pair(name)
    told = {"indices": [0, -1], "return_prefix_tokens": True, "norm": True, "output_fmt": "NLC"}
    with torch.no_grad():
        final, pairs = ours.forward_intermediates(images, **told)
        expected_final, expected = theirs.forward_intermediates(images, **told)
        close(final, expected_final)
        for mine, reference in zip(pairs, expected, strict=True):
            for a, b in zip(mine, reference, strict=True):
                close(a, b)
        mine, reference = (m.forward_intermediates(images, output_dict=True, **told) for m in (ours, theirs))
    assert mine.keys() == reference.keys()
    close(mine["image_features"], reference["image_features"])
    close(mine["image_intermediates_prefix"][1], reference["image_intermediates_prefix"][1])


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_tiny_patch16", "torchvision/resnet18", "twins_svt_small"])
def test_backbones_of_maps_have_intermediates_for_images_of_any_size(name):
    model = build_backbone(name).eval()
    images = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        found = model.forward_intermediates(images, indices=2, intermediates_only=True)
        if "vit" not in name:
            for m, same in zip(found, model(images)[-2:], strict=True):
                assert torch.equal(m, same)
    assert len(found) == 2
    with pytest.raises(InputError, match="was built for maps, without"):
        model.forward_intermediates(images)
    with pytest.raises(InputError, match=r"indices=\[99\] of \d+ features: feature index 99 is out of range"):
        model.forward_intermediates(images, indices=[99], intermediates_only=True)
    with pytest.raises(InputError, match="output_fmt='NHWC' is unknown"):
        model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)


def test_norms_in_the_trunk_are_in_its_intermediates():
    model = build_backbone("twins_svt_small", out_norm=True, out_indices=(1, 2), depths=(1, 1, 1, 1)).eval()
    images = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
        assert torch.equal(last, model(images)[-1])


def test_timms_models_hand_out_their_own(pair):
    model = build_backbone("timm/test_vit", features_only=False).eval()
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images, indices=[0, 1], norm=True)
        expected_final, expected = model.model.forward_intermediates(images, indices=[0, 1], norm=True)
    assert torch.equal(final, expected_final)
    assert all(map(torch.equal, maps, expected))
    with pytest.raises(InputError, match="timm/test_vit: forward_intermediates"):
        model.forward_intermediates(images, output_fmt="NHWC")


# --- sizes, afterwards ------------------------------------------------------------------------------------------


def test_the_position_table_is_resized_as_timm_does(pair, tmp_path):
    _, theirs, _ = pair("vit_tiny_patch16")
    ours = build_backbone("vit_tiny_patch16", features_only=False, num_classes=7, depth=3).eval()
    load_weights(ours, theirs.state_dict())
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=3).eval()
    theirs.load_state_dict(pair("vit_tiny_patch16")[1].state_dict())
    for model in (ours, theirs):
        model.set_input_size((96, 160))
    assert ours.pos_embed.shape == theirs.pos_embed.shape
    assert ours.pos_embed.requires_grad
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        close(ours(images), theirs(images))
        close(for_inference(ours)(images), theirs(images))
    again = from_pretrained(ours.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.pos_embed, ours.pos_embed)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_another_size(name):
    model = build_backbone(name).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(images)
        model.set_input_size(img_size=224)
        for a, b in zip(model(images), before, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(InputError, match="patch_size cannot change once it is built; build it with that"):
        model.set_input_size(patch_size=3)
    with pytest.raises(InputError, match="is no size"):
        model.set_input_size(-1)


def test_timms_models_take_another_size_where_timm_can():
    model = build_backbone("timm/test_vit", depth=1)
    model.set_input_size((64, 96))
    assert model.model.patch_embed.grid_size == (4, 6)
    build_backbone("timm/test_resnet").set_input_size(96)
    with pytest.raises(InputError, match="timm/test_vit: set_input_size"):
        model.set_input_size(window_size=3)


# --- widths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_widths_before_the_last_layer_are_timms(name, on_meta):
    timm_name, options = PAIRS[name]
    ours = build_backbone(name, features_only=False, **options)
    theirs = timm.create_model(timm_name, **options)
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert ours.num_features == theirs.num_features


@pytest.mark.parametrize("name", ["convnext_tiny", "maxvit_rmlp_pico_rw", "coatnet_nano_rw"])
def test_a_hidden_layer_before_the_last_is_timms(name, randomise):
    timm_name, options = PAIRS[name]
    options = {**options, "head_hidden_size": 24, "num_classes": 7}
    theirs = randomise(timm.create_model(timm_name, **options)).eval()
    ours = build_backbone(name, features_only=False, **options).eval()
    report = load_weights(ours, theirs.state_dict())
    assert not {**report.missing, **report.mismatched, **report.unexpected}
    images = torch.randn(1, *theirs.pretrained_cfg["input_size"])
    with torch.no_grad():
        close(ours(images), theirs(images))
    assert ours.head_hidden_size == theirs.head_hidden_size == ours.head.in_features == 24


def test_a_hidden_layer_is_new_to_published_weights():
    published = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1)).state_dict()
    model = build_backbone("convnext_tiny", features_only=False, depths=(1, 1, 1, 1), head_hidden_size=24)
    report = load_weights(model, published)
    assert set(report.missing) == {"pre_logits.fc.weight", "pre_logits.fc.bias"}
    assert torch.equal(model.pre_logits.norm.weight, published["head.norm.weight"])


def test_parts_of_maxvit_follow_the_size_as_in_timm(randomise):
    theirs = randomise(timm.create_model("maxvit_rmlp_pico_rw_256", img_size=128, depths=(1, 1, 1, 1))).eval()
    ours = build_backbone("maxvit_rmlp_pico_rw", img_size=128, depths=(1, 1, 1, 1), features_only=False).eval()
    load_weights(ours, theirs.state_dict())
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        close(ours(images), theirs(images))
    with pytest.raises(InputError, match=r"img_size=\(64, 96\): parts of the map are square"):
        build_backbone("maxvit_tiny", img_size=(64, 96))


# --- names ------------------------------------------------------------------------------------------------------


def test_former_names_are_those_of_the_installed_timm():
    from backbones_timm.measure import former

    assert {name: ".".join(filter(None, now)) for name, now in table.former().items()} == former()


@pytest.mark.parametrize(
    ("name", "now", "tag", "classes"),
    [
        ("vit_base_patch16_224_in21k", "vit_base_patch16_224", "augreg_in21k", 21843),
        ("convnext_tiny_in22ft1k", "convnext_tiny", "fb_in22k_ft_in1k", 1000),
        ("efficientnet_b2a", "efficientnet_b2", None, 1000),
    ],
)
def test_names_that_timm_has_given_up_mean_what_they_mean_there(name, now, tag, classes, on_meta):
    for asked in (f"timm/{name}", name):
        info = backbone_info(asked)
        assert info.canonical_name == f"timm/{now}"
        assert tag in (None, info.weights[0].tag)
        assert name in info.aliases
    model = build_backbone(f"timm/{name}", features_only=False)
    assert model.num_classes == classes
    assert backbone_info(f"timm/{now}").weights[0].tag == timm.get_pretrained_cfg(now).tag


@pytest.fixture
def registered():
    """Registers models with timm, and takes them away again."""
    names = []

    def register(function):
        names.append(function.__name__)
        return register_model(function)

    yield register
    for name in names:
        _model_entrypoints.pop(name)
        _module_to_models[_model_to_module.pop(name)].discard(name)


def test_a_model_that_the_user_registered_with_timm_is_found(registered, tmp_path):
    assert "timm/my_tiny_resnet" not in list_backbones("timm/*")
    with pytest.raises(UnknownBackbone):
        backbone_info("timm/my_tiny_resnet")

    def my_tiny_resnet(pretrained=False, **options):
        arguments = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
        return build_model_with_cfg(ResNet, "my_tiny_resnet", pretrained, **(arguments | options))

    __all__.append("my_tiny_resnet")
    registered(my_tiny_resnet)
    info = backbone_info("timm/my_tiny_resnet")
    assert (info.channels, info.strides) == ((8, 16, 24, 32), (4, 8, 16, 32))
    model = build_backbone("my_tiny_resnet", out_indices=(1, 3)).eval()
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 50, 70))] == [(1, 16, 7, 9), (1, 32, 2, 3)]
    assert build_backbone("timm/my_tiny_resnet", features_only=False, num_classes=3).get_classifier().out_features == 3
    again = from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert again.canonical_name == "timm/my_tiny_resnet"


def test_a_users_model_of_timms_name_is_the_users(registered):
    theirs = _model_entrypoints["test_resnet"]

    def test_resnet(pretrained=False, **options):
        arguments = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
        return build_model_with_cfg(ResNet, "test_resnet", pretrained, **(arguments | options))

    __all__.append("test_resnet")
    try:
        with pytest.warns(UserWarning, match="Overwriting"):
            register_model(test_resnet)
        assert build_backbone("timm/test_resnet").out_channels == [8, 16, 24, 32]
    finally:
        register_model(theirs)
    assert build_backbone("timm/test_resnet").out_channels == list(backbone_info("timm/test_resnet").channels)


def test_a_registered_module_without_maps_says_why(registered):
    def my_plain_module(pretrained=False, **options):
        return nn.Sequential(nn.Flatten(), nn.Linear(3, 3))

    __all__.append("my_plain_module")
    registered(my_plain_module)
    with pytest.raises(InputError, match="timm/my_plain_module cannot be a backbone: it has no feature_info and no"):
        build_backbone("timm/my_plain_module")


__all__ = ["registered"]  # timm puts the names of registered models there


@pytest.mark.parametrize("pyramid", ["simple", "taps", "plain"])
def test_one_block_is_enough_for_any_pyramid(pyramid):
    for name in ("vit_tiny_patch16", "timm/vit_tiny_patch16_224", "vit_small_r26_s32"):
        model = build_backbone(name, depth=1, pyramid=pyramid, frozen_stages=1).eval()
        maps = model(torch.randn(1, 3, 50, 70))
        assert [m.shape[1] for m in maps] == model.out_channels
