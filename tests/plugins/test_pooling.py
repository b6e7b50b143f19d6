"""Every family pools as timm does: by averages, maxima, both, by the class token where there is one, or not at all."""

import pytest
import timm
import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from backbones import Backbone, InputError, build_backbone, for_inference, list_backbones
from backbones.layers import POOLS
from backbones.testing import smallest_of_each_family
from backbones.weights import load_weights

KINDS = [kind for kind in POOLS if kind]
# one of each family that pools maps, and of torchvision's classifiers that have layers after pooling
MAPS = [
    *(name for name in smallest_of_each_family(list_backbones()) if not name.startswith(("vit", "deit", "pvt_tiny"))),
    *("torchvision/resnet18", "torchvision/mobilenet_v3_small"),
]
SHALLOW = {"mobilevit_xxs": {"depths": (1, 1, 1)}, "mobilevitv2_050": {"depths": (1, 1, 1)}}
SHALLOW |= {name: {} for name in MAPS if name.startswith("torchvision/")}
TOKENS = ["vit_tiny_patch16", "deit_tiny_patch16", "deit3_small_patch16", "vit_small_r26_s32"]


@pytest.fixture(scope="module")
def classifier(randomise):
    built = {}

    def get(name, kind, **options):
        if (name, kind) not in built:
            built.clear()
            model = build_backbone(name, features_only=False, num_classes=7, global_pool=kind, **options)
            built[name, kind] = randomise(model).eval()
        return built[name, kind]

    return get


def last_layers(model):
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAPS)
def test_maps_are_pooled_as_by_timms_layer(name, kind, classifier):
    model = classifier(name, kind, **SHALLOW.get(name, {"depths": (1, 1, 1, 1)}))
    features = torch.randn(2, model.num_features, 3, 5)
    with torch.no_grad():
        pooled = SelectAdaptivePool2d(pool_type=kind)(features)
        pooled = model.pre_logits(pooled if name.startswith("torchvision") else pooled.flatten(1))
        seen = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(seen, pooled.flatten(1), atol=1e-5, rtol=1e-5)
        assert model.forward_head(features).shape == (2, 7)
        assert model(torch.randn(2, 3, 40, 50)).shape == (2, 7)
    assert {layer.in_features for layer in last_layers(model)} == {model.head_hidden_size} == {seen.shape[1]}


def test_norms_and_layers_after_pooling_are_as_wide_as_what_is_pooled(on_meta):
    for name in ("torchvision/convnext_tiny", "torchvision/vgg11"):
        model = build_backbone(name, features_only=False, num_classes=7, global_pool="catavgmax")
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(InputError, match="global_pool='' is unknown"):  # it reads 7 x 7 cells
        build_backbone("torchvision/vgg11", features_only=False, global_pool="")


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("kind", ["token", "both", *KINDS])
def test_tokens_are_pooled_as_maps_are(name, kind, classifier):
    model = classifier(name, kind, depth=1)
    patches = torch.randn(2, model.num_features, 3, 5)
    token = torch.randn(2, model.prefix_tokens, model.num_features)
    expected = {"token": token[:, 0], "both": torch.cat((token[:, 0], patches.mean((2, 3))), 1)}
    for each in KINDS:
        expected[each] = SelectAdaptivePool2d(pool_type=each)(patches).flatten(1)
    with torch.no_grad():
        seen = model.forward_head(torch.cat((token, patches.flatten(2).mT), 1), pre_logits=True)
        torch.testing.assert_close(seen, model.fc_norm(expected[kind]), atol=1e-5, rtol=1e-5)
    assert model.head.in_features == model.head_hidden_size == seen.shape[1]


@pytest.mark.parametrize("kind", ["token", "both", *KINDS])
def test_pvts_class_token_stands_beside_the_cells_of_its_last_map(kind, classifier):
    model = classifier("pvt_tiny", kind, depths=(1, 1, 1, 1))
    tokens = torch.randn(2, 16, model.num_features)
    cells = tokens[:, 1:].mT.unflatten(2, (3, 5))
    expected = {"token": tokens[:, 0], "both": torch.cat((tokens[:, 0], cells.mean((2, 3))), 1)}
    expected |= {each: SelectAdaptivePool2d(pool_type=each)(cells).flatten(1) for each in KINDS}
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected[kind], atol=1e-6, rtol=1e-6)
        assert model(torch.randn(2, 3, 40, 50)).shape == (2, 7)


# Ours, timm's, and what both are told so that there is little to compute.
PAIRS = {
    "vit_tiny_patch16": ("vit_tiny_patch16_224", {"depth": 1}),
    "deit_tiny_distilled_patch16": ("deit_tiny_distilled_patch16_224", {"depth": 1}),
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
    """Our classifier and timm's on the same weights, with images that both take."""
    made = {}

    def get(name, kind=None):
        if (name, kind) not in made:
            made.clear()
            timm_name, options = PAIRS[name]
            pooling = {} if kind is None else {"global_pool": kind}
            theirs = randomise(timm.create_model(timm_name, num_classes=7, **pooling, **options)).eval()
            ours = build_backbone(name, features_only=False, num_classes=7, **pooling, **options).eval()
            assert not load_weights(ours, theirs.state_dict()).missing
            made[name, kind] = ours, theirs, torch.randn(2, *theirs.pretrained_cfg["input_size"])
        return made[name, kind]

    return get


def as_ours(x, ours):
    """timm's tokens and channels-last maps as our maps are; prefix tokens are in both."""
    if x.ndim == 3 and ours.ndim == 4:
        return x.mT.unflatten(2, ours.shape[2:])
    return x.permute(0, 3, 1, 2) if x.ndim == 4 and x.shape[1] != ours.shape[1] else x


@pytest.mark.parametrize("name", PAIRS)
def test_without_pooling_and_classes_features_are_timms(name, pair):
    ours, theirs, images = pair(name)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() < 1e-4
        for model in (ours, theirs):
            model.reset_classifier(0, "")
        assert ours.global_pool == ""
        mine, reference = ours(images), theirs(images)
        if name != "deit_tiny_distilled_patch16":  # of which timm's stays the mean of both tokens
            torch.testing.assert_close(mine, as_ours(reference, mine), atol=1e-4, rtol=1e-4)
        assert mine.ndim == (3 if "deit" in name or "vit_tiny" in name else 4)
        ours.reset_classifier(5)  # a map or row of logits, whose mean over cells is not what pooling first gives
        assert ours(images).shape == ((*mine.shape[:2], 5) if mine.ndim == 3 else (2, 5, *mine.shape[2:]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("vit_tiny_patch16", kind) for kind in ("avg", "max", "avgmax")),
        *(("swin_tiny", kind) for kind in ("max", "avgmax", "catavgmax")),
        *(("convnext_tiny", kind) for kind in ("max", "avgmax")),
        *(("mobilevit_xxs", kind) for kind in ("max", "catavgmax")),
        *(("coatnet_nano_rw", kind) for kind in ("avgmax", "catavgmax")),
    ],
)
def test_logits_are_timms_where_timm_pools_so(name, kind, pair):
    ours, theirs, images = pair(name, kind)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)
    assert ours.head_hidden_size == theirs.head_hidden_size


@pytest.mark.parametrize("name", ["convnext_tiny", "mobilevit_xxs", "vit_tiny_patch16"])
def test_resetting_the_classifier_changes_its_widths_and_back(name):
    with torch.device("meta"):
        model = build_backbone(name, features_only=False)
        widths = model.head.in_features
        model.reset_classifier(5, "catavgmax")
        assert (model.head.in_features, model.head_hidden_size) == (2 * widths, 2 * widths)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
        model.reset_classifier(5, "avg")
        assert model.head.in_features == model.head_hidden_size == widths
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_published_weights_serve_wider_pooling_with_a_new_head(randomise):
    state = randomise(build_backbone("convnext_tiny", features_only=False, depths=(1, 1, 1, 1))).state_dict()
    wide = build_backbone("convnext_tiny", features_only=False, depths=(1, 1, 1, 1), global_pool="catavgmax")
    report = load_weights(wide, state)
    assert {name.partition(".")[0] for name in report.mismatched} == {"pre_logits", "head"}
    plain = build_backbone("convnext_tiny", features_only=False, depths=(1, 1, 1, 1), global_pool="max")
    assert not load_weights(plain, state).mismatched


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "catavgmax", "both"])
def test_the_norm_of_published_weights_goes_where_the_pooling_has_it(kind, randomise):
    state = randomise(build_backbone("vit_tiny_patch16", features_only=False, depth=1)).state_dict()
    model = build_backbone("vit_tiny_patch16", features_only=False, depth=1, global_pool=kind)
    report = load_weights(model, state)
    norm = model.fc_norm if kind in ("avg", "max", "avgmax") else model.norm
    assert torch.equal(norm.weight, state["norm.weight"])
    assert not [name for name in report.missing if not name.startswith("head")]


@pytest.mark.parametrize("name", ["pvt_v2_b0", "torchvision/resnet18"])
@pytest.mark.parametrize("kind", ["token", "both", "mean"])
def test_what_a_family_lacks_is_refused(name, kind):
    with pytest.raises(InputError, match=rf"global_pool='{kind}' is unknown.*; choose from 'avg', 'max', 'avgmax'"):
        build_backbone(name, features_only=False, global_pool=kind)


def test_timms_own_words_say_what_its_models_cannot():
    with pytest.raises(InputError, match=r"timm/pvt_v2_b0 cannot be built so: Only avg pooling"):
        build_backbone("timm/pvt_v2_b0", features_only=False, global_pool="max")
    model = build_backbone("timm/test_resnet", features_only=False, global_pool="catavgmax")
    assert model.global_pool == "catavgmax"
    assert model.get_classifier().in_features == model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0, "")
    assert (model.global_pool, model(torch.randn(1, 3, 64, 64)).ndim) == ("", 4)
    with pytest.raises(InputError, match="global_pool='token' is impossible"):
        model.reset_classifier(3, "token")


class OwnHead(Backbone):
    """An architecture of somebody's whose forward pools as it always has."""

    def __init__(self, **options):
        super().__init__(channels=(8,), strides=(4,), **options)
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.ModuleList([nn.Identity()])

    def forward_head(self, features, pre_logits=False):
        x = features.mean((2, 3))
        return x if pre_logits else self.head(x)


def test_a_forward_of_its_own_pools_by_what_it_says_alone():
    assert OwnHead(features_only=False, num_classes=3)(torch.randn(1, 3, 8, 8)).shape == (1, 3)
    with pytest.raises(InputError, match="global_pool='max' is unknown; choose from 'avg'"):
        OwnHead(features_only=False, global_pool="max")


def test_for_inference_pools_the_same(classifier):
    model = classifier("mobilevit_xxs", "catavgmax", depths=(1, 1, 1))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(for_inference(model)(images), model(images), atol=1e-3, rtol=1e-3)
