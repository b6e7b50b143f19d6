"""torchvision's models under the contract: the same maps and logits as torchvision, on images of any size."""

import math

import pytest
import torch
import torchvision.models
from timm.layers import DropPath
from torch import nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, get_model, get_model_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork

from backbones import InputError, WeightsError, backbone_info, build_backbone, list_backbones
from backbones.registry import resolve
from backbones.testing import parametrize_backbones
from backbones.weights import find_weights
from backbones_torchvision.table import ELSEWHERE, MODELS, REFUSED

# One of each family, with the nodes of torchvision's graph at strides 4, 8, 16 and 32.
NODES = {
    "resnet18": ("layer1", "layer2", "layer3", "layer4"),
    "resnext50_32x4d": ("layer1", "layer2", "layer3", "layer4"),
    "regnet_y_400mf": tuple(f"trunk_output.block{n}" for n in (1, 2, 3, 4)),
    "efficientnet_b0": ("features.2", "features.3", "features.5", "features.7"),
    "efficientnet_v2_s": ("features.2", "features.3", "features.5", "features.6"),
    "mobilenet_v2": ("features.3", "features.6", "features.13", "features.17"),
    "mobilenet_v3_small": ("features.1", "features.3", "features.8", "features.12"),
    "mobilenet_v3_large": ("features.3", "features.6", "features.12", "features.16"),
    "mnasnet0_5": ("layers.8", "layers.9", "layers.11", "layers.13"),
    "shufflenet_v2_x0_5": ("maxpool", "stage2", "stage3", "stage4"),
    "densenet121": ("features.denseblock1", "features.denseblock2", "features.denseblock3", "relu"),
    "convnext_tiny": ("features.1", "features.3", "features.5", "features.7"),
    "swin_t": ("features.1", "features.3", "features.5", "features.7"),
    "swin_v2_t": ("features.1", "features.3", "features.5", "features.7"),
    "vgg11_bn": ("features.13", "features.20", "features.27", "features.28"),
    "googlenet": ("conv3", "inception3b", "inception4e", "inception5b"),
}
# The rest cut sides off where 2 does not divide them.
NATIVE = {name for name in NODES if not name.startswith(("convnext", "densenet", "googlenet", "swin", "vgg"))}
QUICK = {"resnet18", "regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5"}
ONE_OF_EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NODES]
# What torchvision and our own plugins both have.
OURS = [
    *("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14", "swin_t", "swin_s", "swin_b", "maxvit_t"),
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
]
IN_DETAIL = ["torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/efficientnet_b0"]


@pytest.fixture(scope="module")
def original(randomise):
    """torchvision's own model with weights that hide no mistake, in eval mode."""
    cache = {}

    def get(name):
        if name not in cache:
            cache.clear()
            arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
            cache[name] = randomise(get_model(name, weights=None, **arguments))
        return cache[name]

    return get


def loaded(name, original, tmp_path, **options):
    """Ours, with torchvision's state read from a file of torchvision's keys."""
    torch.save(original(name).state_dict(), tmp_path / "torchvision.pth")
    return build_backbone(f"torchvision/{name}", pretrained=tmp_path / "torchvision.pth", **options).eval()


POOLS = {"global_pools": "claims max, and pools by the mean: found by a new check, to be mended"}


@parametrize_backbones(
    IN_DETAIL,
    expected_failures={f"torchvision/{name}": POOLS for name in ("mobilenet_v3_small", "efficientnet_b0")},
    slow_marks=pytest.mark.slow,
)
def test_conformance(name, check):
    check(name)


# --- names ----------------------------------------------------------------------------------------------------


def test_nothing_is_listed_until_the_namespace_is_named():
    assert not [name for name in list_backbones() if name.startswith("torchvision/")]
    assert "torchvision/resnet50" in list_backbones("torchvision/*")
    assert (
        len(list_backbones("torchvision/*"))
        == len(list_backbones(plugin="torchvision"))
        == len(MODELS) + len(ELSEWHERE)
    )


def test_every_classification_model_of_torchvision_is_offered_or_refused():
    ours = MODELS.keys() | REFUSED.keys() | ELSEWHERE.keys()
    assert set(torchvision.models.list_models(torchvision.models)) <= ours


def costs_seconds(name):
    """Whether a model is initialised even on the meta device: RegNets compute with tensors while being built."""
    return name.startswith("regnet") and MODELS[name].params > 10


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if costs_seconds(name) else ()) for name in MODELS]
)
def test_channels_strides_and_parameters_are_those_of_the_installed_torchvision(name, count):
    info = backbone_info(f"torchvision/{name}")
    with torch.device("meta"):
        model = build_backbone(f"torchvision/{name}").eval()
        maps = model(torch.randn(1, 3, 64, 96))
        classifier = build_backbone(f"torchvision/{name}", features_only=False)
    assert [m.shape[1] for m in maps] == list(info.channels)
    assert [tuple(m.shape[2:]) for m in maps] == [(64 // s, 96 // s) for s in info.strides]
    assert round(count(classifier) / 1e6, 2) == info.params


@pytest.mark.parametrize("name", [*(f"torchvision/{name}" for name in (*MODELS, *ELSEWHERE)), *OURS])
def test_weights_are_those_of_the_installed_torchvision(name):
    rows = [row for row in backbone_info(name).weights if row.enum]
    enum = get_model_weights(name.rpartition("/")[2])
    assert {row.enum for row in rows} == {str(member) for member in enum}
    assert rows[0].tag == enum.DEFAULT.name
    for row in rows:
        published = enum[row.tag]
        transform = published.transforms()
        assert row.source == published.url
        assert row.input_size == (3, *transform.crop_size * 2)
        assert row.interpolation == transform.interpolation.value
        metrics = published.meta["_metrics"]["ImageNet-1K"]
        known = not math.isnan(metrics["acc@1"])
        assert row.metrics == ({"imagenet_top1": metrics["acc@1"], "imagenet_top5": metrics["acc@5"]} if known else {})
        assert row.classes == len(published.meta["categories"] or ())
        assert row.recipe == published.meta["recipe"]
        if known:
            assert row.categories == tuple(published.meta["categories"])
        if name != "torchvision/googlenet":  # whose builder converts images for 0.5 inside of the model
            assert row.mean + row.std == pytest.approx((*transform.mean, *transform.std))


@pytest.mark.parametrize("name", [*OURS, "torchvision/vit_b_16", "torchvision/maxvit_t"])
def test_under_torchvisions_name_torchvisions_weights_are_the_first(name):
    first, *_ = rows = backbone_info(name).weights
    if name.startswith("convnext"):  # timm's name, too, and ours
        first = next(row for row in rows if row.enum)
    else:
        assert find_weights(resolve(name), True) == first
    assert first.enum == str(get_model_weights(name.rpartition("/")[2]).DEFAULT)
    assert find_weights(resolve(name), "DEFAULT") == first


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_keep_the_promise_says_why(name):
    with pytest.raises(InputError, match=f"torchvision's {name} is not offered: its"):
        build_backbone(f"torchvision/{name}", out_indices=(0,))
    assert f"torchvision/{name}" not in list_backbones("torchvision/*")


# --- parity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_maps_equal_those_of_torchvision(name, original, tmp_path, assert_equals_reference):
    ours = loaded(name, original, tmp_path)
    assert ours.load_report.share == 1.0
    assert not ours.load_report.missing
    theirs = create_feature_extractor(original(name), {node: str(i) for i, node in enumerate(NODES[name])}).eval()
    size = (250, 333) if name in NATIVE else (100, 132) if name.startswith("swin") else (64, 96)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        for i, (m, reference) in enumerate(zip(ours(images), theirs(images).values(), strict=True)):
            reference = reference.permute(0, 3, 1, 2) if name.startswith("swin") else reference
            assert_equals_reference(f"{name} map {i}", m, reference, 1e-4 * max(1.0, reference.abs().max().item()))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_logits_equal_those_of_torchvision(name, original, tmp_path, assert_equals_reference):
    ours = loaded(name, original, tmp_path, features_only=False)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        reference = original(name)(images)
        assert_equals_reference(name, ours(images), reference, 1e-4 * max(1.0, reference.abs().max().item()))


@pytest.mark.parametrize(("name", "size"), [("convnext_tiny", (97, 130)), ("swin_t", (230, 261))])
def test_on_sizes_that_torchvision_floors_maps_equal_those_of_our_own_family(name, size, original, tmp_path):
    theirs = loaded(name, original, tmp_path)
    ours = build_backbone(name, pretrained=tmp_path / "torchvision.pth").eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        for a, b in zip(theirs(images), ours(images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_resnets_equal_those_of_torchvision(output_stride, original, tmp_path, assert_equals_reference):
    ours = loaded("resnet50", original, tmp_path, output_stride=output_stride)
    assert ours.strides == [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    theirs = get_model("resnet50", replace_stride_with_dilation=[False, output_stride == 8, True]).eval()
    theirs.load_state_dict(original("resnet50").state_dict())
    theirs = create_feature_extractor(theirs, list(NODES["resnet18"]))
    images = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        for m, reference in zip(ours(images), theirs(images).values(), strict=True):
            assert_equals_reference(f"/{output_stride}", m, reference, 1e-4 * max(1.0, reference.abs().max().item()))


def test_mobilenet_v3_dilates_as_in_torchvisions_segmenters(original, tmp_path, assert_equals_reference):
    ours = loaded("mobilenet_v3_small", original, tmp_path, output_stride=16)
    theirs = get_model("mobilenet_v3_small", dilated=True).eval()
    theirs.load_state_dict(original("mobilenet_v3_small").state_dict())
    images = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        assert_equals_reference("last map", ours(images)[-1], theirs.features(images))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_any_size(name):
    model = build_backbone(f"torchvision/{name}").eval()
    for height, width in [(97, 161), (33, 65), (5, 70), (1, 1)]:
        with torch.no_grad():
            maps = model(torch.randn(1, 3, height, width))
        assert [m.shape[2:] for m in maps] == [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]


# --- weights --------------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch, tmp_path, original):
    """What would be fetched is written from torchvision's own models instead."""
    fetched = []

    def download(url, path, hash_prefix):
        assert hash_prefix == url.rpartition("-")[2].removesuffix(".pth")
        fetched.append(url.rpartition("/")[2])
        torch.save(original(fetched[-1].partition("-")[0]).state_dict(), path)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return fetched


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({"pretrained": True}, "resnet50-11ad3fa6.pth"),
        ({"pretrained": "DEFAULT"}, "resnet50-11ad3fa6.pth"),
        ({"pretrained": "IMAGENET1K_V1"}, "resnet50-0676ba61.pth"),
        ({"weights": ResNet50_Weights.IMAGENET1K_V1}, "resnet50-0676ba61.pth"),
        ({"weights": "ResNet50_Weights.IMAGENET1K_V1"}, "resnet50-0676ba61.pth"),
        ({"weights": "IMAGENET1K_V2"}, "resnet50-11ad3fa6.pth"),
        ({"weights": ResNet50_Weights.DEFAULT}, "resnet50-11ad3fa6.pth"),
        ({"weights": "DEFAULT"}, "resnet50-11ad3fa6.pth"),
    ],
)
def test_weights_are_asked_for_as_in_torchvision(options, file, downloads, original):
    model = build_backbone("torchvision/resnet50", out_indices=(0,), **options)
    assert downloads == [file]
    assert model.load_report.share == 1.0
    assert torch.equal(model.stem[0].weight, original("resnet50").conv1.weight)
    assert model.pretrained_cfg["tag"] == ("IMAGENET1K_V1" if "0676" in file else "IMAGENET1K_V2")
    assert (model.build_options, model.unsaved_options) == ({"out_indices": [0]}, [])  # for save_pretrained


def test_weights_of_another_model_are_refused():
    with pytest.raises(WeightsError, match=r"resnet50: weights ResNet18_Weights\.IMAGENET1K_V1 are those of another"):
        build_backbone("torchvision/resnet50", weights=ResNet18_Weights.IMAGENET1K_V1)


def test_without_a_network_it_says_what_to_download_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"Download https://download.pytorch.org/models/resnet18-f37072fd.pth else"):
        build_backbone("torchvision/resnet18", weights="DEFAULT")


def test_published_densenets_have_older_keys(original, tmp_path):
    state = original("densenet121").state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    report = build_backbone("torchvision/densenet121", features_only=False, pretrained=tmp_path / "old.pth").load_report
    assert not report.missing
    assert not report.unexpected


def test_weights_for_rgb_serve_other_channels(original, tmp_path):
    model = loaded("resnet18", original, tmp_path, in_chans=1)
    weight = original("resnet18").conv1.weight
    torch.testing.assert_close(model.stem[0].weight, weight.sum(1, keepdim=True))


# --- fine-tuning ----------------------------------------------------------------------------------------------


def test_freezing_goes_by_torchvisions_layers():
    model = build_backbone("torchvision/resnet18", frozen_stages=1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trainable} == {"1", "2", "3"}
    assert not model.stem[1].training  # BatchNorm of the stem


@pytest.mark.parametrize(
    "name", ["resnet18", "resnext50_32x4d", "regnet_y_400mf", "mobilenet_v2", "mnasnet0_5", "swin_t"]
)
def test_drop_path_drops_residual_branches(name):
    """A block whose branches are all but surely dropped hands on what it is given; in eval mode it does not."""
    model = build_backbone(f"torchvision/{name}", drop_path_rate=0.9999)
    block = [b for b in model.stages[-1] if any(isinstance(m, DropPath) for m in b.modules())][-1]
    given = []
    block.register_forward_pre_hook(lambda _, args: given.append(args[0].detach().abs()))
    model(torch.randn(2, 3, 64, 64))
    x = given[0]  # positive, so that a last ReLU changes nothing
    torch.testing.assert_close(block(x), x)
    assert not torch.allclose(block.eval()(x), x)


def test_without_residual_branches_drop_path_is_refused():
    with pytest.raises(InputError, match="vgg11 has no residual branches to drop"):
        build_backbone("torchvision/vgg11", drop_path_rate=0.1)


def test_norm_layer_may_be_frozen(original, tmp_path):
    model = loaded("resnet18", original, tmp_path, norm_layer=FrozenBatchNorm2d)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    plain = loaded("resnet18", original, tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(model(images), plain(images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)
    with pytest.raises(InputError, match="vgg11 takes no norm_layer"):
        build_backbone("torchvision/vgg11", norm_layer=FrozenBatchNorm2d)


def test_torchvisions_detector_runs_on_the_features():
    class WithFPN(nn.Module):
        def __init__(self, body, out_channels=32):
            super().__init__()
            self.body, self.out_channels = body, out_channels
            self.fpn = FeaturePyramidNetwork(body.out_channels, out_channels)

        def forward(self, images):
            return self.fpn({str(i): m for i, m in enumerate(self.body(images))})

    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    body = WithFPN(build_backbone("torchvision/resnet18", frozen_stages=1, norm_eval=True))
    detector = FasterRCNN(body, num_classes=3, rpn_anchor_generator=anchors, min_size=90, max_size=130)
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0]]), "labels": torch.tensor([1])}]
    losses = detector([torch.rand(3, 97, 130)], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert body.body.stages[1][0].conv1.weight.grad.any()
    assert body.body.stages[0][0].conv1.weight.grad is None
    detections = detector.eval()([torch.rand(3, 97, 130)])
    assert detections[0].keys() == {"boxes", "labels", "scores"}
