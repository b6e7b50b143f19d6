"""Each set of torchvision's weights, read from torch hub's cache, gives torchvision's logits in our own families."""

import sys
from itertools import pairwise
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import (
    ConvNeXt_Tiny_Weights,
    MaxVit,
    Swin_T_Weights,
    SwinTransformer,
    VisionTransformer,
    ViT_B_16_Weights,
    get_model,
    get_model_weights,
    get_weight,
)
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from backbones import (
    Backbone,
    BackboneSpec,
    InputError,
    WeightsError,
    backbone_info,
    build_backbone,
    from_pretrained,
    registry,
)
from backbones.discovery import Plugin
from backbones.registry import resolve
from backbones.weights import find_weights


def _vit(name, side):
    patch, dim, heads = {"b": (16, 768, 12), "l": (16, 1024, 16), "h": (14, 1280, 16)}[name[4]]
    patch = 32 if name.endswith("32") else patch
    return VisionTransformer(
        image_size=side, patch_size=patch, num_layers=1, num_heads=heads, hidden_dim=dim, mlp_dim=4 * dim
    )


def _swin(name, side):
    return SwinTransformer([4, 4], 96, [1] * 4, [3, 6, 12, 24], [7, 7])


def _convnext(name, side):
    return ConvNeXt([CNBlockConfig(a, b, 1) for a, b in pairwise((96, 192, 384, 768, None))])


def _maxvit(name, side):
    return MaxVit((side, side), 64, 7, [64, 128, 256, 512], [1] * 4, 32, 0.0)


# A block per stage of torchvision's model, and how ours is told so.
SHALLOW = {"vit": (_vit, {"depth": 1})} | {
    family: (make, {"depths": (1,) * 4})
    for family, make in (("swin", _swin), ("convnext", _convnext), ("maxvit", _maxvit))
}
EVERY = [
    member
    for name in (
        *("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "swin_t", "swin_s", "swin_b", "maxvit_t"),
        *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
    )
    for member in get_model_weights(name)
]
QUICK = [*ViT_B_16_Weights, Swin_T_Weights.DEFAULT, ConvNeXt_Tiny_Weights.DEFAULT]
QUICK.append(get_weight("MaxVit_T_Weights.IMAGENET1K_V1"))


def name_of(member):
    return type(member).__name__.removesuffix("_Weights").lower()


@pytest.fixture
def published(monkeypatch, tmp_path, randomise):
    """torchvision's model, its state where torch hub keeps what it has downloaded; there is no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)

    def publish(member, shallow=True):
        name = name_of(member)
        side = member.transforms().crop_size[0]
        make, options = SHALLOW[name.partition("_")[0]] if shallow else (None, {})
        if make:
            model = make(name, side)
        else:
            model = get_model(name, weights=None, **({"image_size": side} if name.startswith("vit") else {}))
        randomise(model)
        torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / member.url.rpartition("/")[2])
        return model.eval(), options

    return publish


def require_equal(ours, theirs, member, tolerance=1e-5):
    side = member.transforms().crop_size[0]
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        expected = theirs(images)
        assert (ours.eval()(images) - expected).abs().max() <= tolerance * expected.abs().max()
    assert repr(ours.transforms()) == repr(member.transforms())
    assert ours.transforms().antialias == member.transforms().antialias
    assert ours.pretrained_cfg["enum"] == str(member)


@pytest.mark.parametrize("member", QUICK, ids=str)
def test_logits_are_torchvisions(member, published):
    theirs, options = published(member)
    ours = build_backbone(name_of(member), weights=member, features_only=False, **options)
    assert all(prod(given) == prod(made) for given, made in ours.load_report.resized.values())  # reshaped, if at all
    assert not ours.load_report.missing
    assert not [name for name in ours.load_report.unexpected if not name.endswith("relative_position_index")]
    require_equal(ours, theirs, member)


@pytest.mark.slow
@pytest.mark.parametrize("member", EVERY, ids=str)
def test_logits_of_the_whole_model_are_torchvisions(member, published):
    theirs, _ = published(member, shallow=False)
    require_equal(build_backbone(name_of(member), weights=member, features_only=False), theirs, member, 1e-4)


E2E = ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1


@pytest.mark.parametrize("name", ["vit_b_16", "vit_base_patch16", "vit/vit_b_16", "torchvision/vit_b_16"])
@pytest.mark.parametrize("asked", [E2E, str(E2E), E2E.name])
def test_every_way_of_asking_is_the_same(name, asked):
    assert find_weights(resolve(name), asked).enum == str(E2E)


def test_what_weights_imply_is_kept(published, tmp_path):
    theirs, options = published(E2E)
    ours = build_backbone("torchvision/vit_b_16", weights=E2E, pretrained=None, features_only=False, **options)
    assert ours.build_options.items() >= {"img_size": 384, "num_classes": 1000}.items()
    ours.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    require_equal(again, theirs, E2E)
    assert again.pretrained_cfg == ours.pretrained_cfg
    assert "weights" not in again.build_options


def test_true_and_default_are_torchvisions_under_its_name(published):
    theirs, options = published(ViT_B_16_Weights.DEFAULT)
    for name, asked in (("vit_b_16", True), ("vit_b_16", "DEFAULT"), ("vit_base_patch16", "DEFAULT")):
        ours = build_backbone(name, pretrained=asked, features_only=False, **options)
        require_equal(ours, theirs, ViT_B_16_Weights.DEFAULT)
    assert backbone_info("vit_base_patch16").weights[0].layout == "timm"


def test_a_file_of_torchvisions_layout_is_preprocessed_as_torchvisions(published, tmp_path):
    _, options = published(ViT_B_16_Weights.DEFAULT)
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    model = build_backbone("vit_base_patch16", pretrained=file, **options)
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)  # timm's are 0.5
    assert "tag" not in model.pretrained_cfg


def test_two_ways_at_once_are_refused():
    with pytest.raises(InputError, match=r"pretrained=True and weights=.* both say which weights to load; give one"):
        build_backbone("vit_b_16", pretrained=True, weights=E2E)


def test_weights_of_another_model_and_unknown_ones_are_refused():
    with pytest.raises(WeightsError, match=r"vit_base_patch32: weights ViT_B_16_Weights\S+ are those of another model"):
        build_backbone("vit_b_32", weights=E2E)
    with pytest.raises(WeightsError, match=r"'IMAGENET1K_V3' is neither .*\(IMAGENET1K_V1, IMAGENET1K_SWAG_E2E_V1, "):
        build_backbone("vit_b_16", weights="IMAGENET1K_V3")


class HasWeights(Backbone):
    """An architecture whose own option is called `weights`."""

    def __init__(self, weights="own", **options):
        super().__init__(channels=(8,), strides=(4,), **options)
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.ModuleList([nn.Identity()])
        self.told = weights


def test_an_architectures_own_option_called_weights_is_left_to_it(monkeypatch):
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local"))
    monkeypatch.setitem(sys.modules, "has_weights", SimpleNamespace(HasWeights=HasWeights))
    registry.register(
        BackboneSpec(name="own", family="Own", entry="has_weights:HasWeights", channels=(8,), strides=(4,))
    )
    model = build_backbone("own", weights="theirs")
    assert model.told == model.build_options["weights"] == "theirs"
