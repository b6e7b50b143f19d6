"""Any backbone under any decoder, for any image size, ready for timm's optimizers."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from backbones import build_backbone, wrap
from backbones.errors import InputError, UnknownBackbone
from backbones_tasks import build_segmenter
from backbones_tasks.models.segmenter import ARCHITECTURES

SIZES = [(1, 1), (33, 70), (64, 64), (97, 31)]


class Tiny(nn.Module):
    """Four maps of strides 4 to 32, from four convolutions."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, k) for a, b, k in ((3, 8, 4), (8, 12, 2), (12, 16, 2), (16, 20, 2))
        )

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return maps


def tiny():
    return wrap(Tiny(), channels=(8, 12, 16, 20))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_have_the_size_of_the_image(architecture):
    model = build_segmenter(architecture, backbone=tiny(), num_classes=5).eval()
    for size in SIZES:
        with torch.no_grad():
            logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, 5, *size)
        assert logits.isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_that_is_built_learns(architecture):
    model = build_segmenter(architecture, backbone="pvt_v2_b0", num_classes=3)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", {"name": "vit_tiny_patch16", "drop_path_rate": 0.1}])
def test_backbones_by_name_and_by_options(backbone):
    model = build_segmenter("upernet", backbone=backbone, num_classes=2, decoder_channels=16).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 50, 41)).shape == (1, 2, 50, 41)


def test_a_backbone_of_timm_with_a_stride_2_map_feeds_the_first_skip():
    backbone = timm.create_model("resnet18", features_only=True)
    model = build_segmenter("smp/unet", backbone=backbone, num_classes=2).eval()
    assert model.decoder.blocks[3].conv1[0].in_channels == 64 + 64  # the map from below, and the skip
    with torch.no_grad():
        assert model(torch.randn(1, 3, 45, 64)).shape == (1, 2, 45, 64)


def test_stages_that_a_decoder_does_not_see_are_not_built():
    model = build_segmenter("smp/pspnet", backbone="pvt_v2_b0", num_classes=2)  # three halvings: strides 4 and 8
    assert model.backbone.out_indices == (0, 1)
    assert len(model.backbone.stages) == 2


def test_upernet_pads_nothing():
    seen = []
    model = build_segmenter("upernet", backbone=tiny(), num_classes=2, decoder_channels=8).eval()
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    model(torch.randn(1, 3, 45, 71))
    assert seen == [(45, 71)]


def test_smp_decoders_equal_smp_itself_where_no_padding_is_needed():
    import segmentation_models_pytorch as smp

    theirs = smp.Unet("mit_b0", encoder_weights=None, classes=4).eval()
    backbone = wrap(_MitMaps(theirs.encoder), channels=theirs.encoder.out_channels[2:])
    ours = build_segmenter("smp/unet", backbone=backbone, num_classes=4).eval()
    ours.decoder.load_state_dict(theirs.decoder.state_dict())
    ours.head.load_state_dict(theirs.segmentation_head.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


class _MitMaps(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder(images)[2:]


def test_the_aux_head_works_in_training_only():
    model = build_segmenter("upernet", backbone=tiny(), num_classes=3, aux=True, decoder_channels=8)
    logits, aux = model(torch.randn(2, 3, 40, 50))
    assert logits.shape == aux.shape == (2, 3, 40, 50)
    assert model.aux_head[0].in_channels == 16  # the stride-16 map
    assert isinstance(model.eval()(torch.randn(2, 3, 40, 50)), torch.Tensor)


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "vit_tiny_patch16"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_optimizer_groups_hold_every_parameter_once(backbone, layer_decay):
    model = build_segmenter("upernet", backbone=backbone, num_classes=2, aux=True, decoder_channels=8)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if parameter.ndim == 1 or name in model.no_weight_decay():
                assert group["weight_decay"] == 0, name
            if layer_decay and not name.startswith("backbone."):
                assert group["lr_scale"] == 1, name
    if layer_decay:
        scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        backbone_scales = [scale for name, scale in scales.items() if name.startswith("backbone.")]
        assert len(set(backbone_scales)) > 8, "layers of the backbone have rates of their own"
        assert min(backbone_scales) < 0.1


def test_layer_groups_are_those_of_the_backbone_itself():
    from timm.models import group_parameters

    backbone = build_backbone("vit_tiny_patch16")
    model = build_segmenter("upernet", backbone=backbone, num_classes=2, decoder_channels=8)
    alone = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    inside = group_parameters(model, model.group_matcher(), reverse=True)
    assert {name: inside[f"backbone.{name}"] for name in alone} == alone
    assert model.no_weight_decay() == {f"backbone.{name}" for name in backbone.no_weight_decay()}
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


class Plain(Tiny):
    """A module of somebody's own, with timm's methods, whose patterns have alternatives and suffixes."""

    feature_info = timm.models.FeatureInfo(
        [{"num_chs": c, "reduction": s, "module": ""} for c, s in ((8, 4), (12, 8), (16, 16), (20, 32))], (0, 1, 2, 3)
    )

    def group_matcher(self, coarse=False):
        return {"stem": r"^nothing|^convs\.0", "blocks": [(r"^convs\.(\d)", None), (r"^norm", (99999,))]}


def test_plain_modules_with_timms_methods_keep_their_layers():
    model = build_segmenter("smp/unet", backbone=Plain(), num_classes=2)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert [scales[f"backbone.convs.{i}.weight"] for i in range(4)] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "smp/unte"}, "did you mean 'smp/unet'"),
        ({"architecture": "smp/dpt"}, "tokens"),
        ({"architecture": "upernet", "decoder_chanels": 3}, "did you mean 'decoder_channels'"),
        ({"architecture": "smp/unet", "activation": "softmax"}, "no option 'activation'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"backbone": {"drop_path_rate": 0.1}}, 'lack "name"'),
        ({"backbone": nn.Conv2d(3, 3, 1)}, "no feature_info"),
        ({"backbone": {"name": "pvt_v2_b0", "out_indices": (1, 2, 3)}}, r"returns strides \[8, 16, 32\]"),
        ({"architecture": "smp/pspnet", "aux": True}, "stride-16 map"),
        ({"architecture": "smp/fpn", "encoder_depth": 4}, "no map for the finest"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_segmenter(**{"backbone": "pvt_v2_b0", "num_classes": 2, **options})


def test_unknown_backbones_are_refused_with_the_nearest_name():
    with pytest.raises(UnknownBackbone, match="did you mean 'pvt_v2_b"):
        build_segmenter("upernet", backbone="pvt_v2_bo", num_classes=2)


def test_building_leaves_no_trace_in_smp():
    import segmentation_models_pytorch as smp

    before = set(smp.encoders.encoders)
    build_segmenter("smp/fpn", backbone=tiny(), num_classes=2)
    assert set(smp.encoders.encoders) == before
