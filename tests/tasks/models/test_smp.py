"""smp's own models take backbones by name."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import nn

import backbones_tasks.smp  # noqa: F401  (teaches smp the names)
from backbones import UnknownBackbone, WeightsError, backbone_info, list_backbones
from backbones.errors import InputError
from backbones_tasks.smp import Encoder, Levels

REFUSED = {"dpt"}
MODELS = [name for name in smp.MODEL_ARCHITECTURES_MAPPING if name not in REFUSED]


def test_the_models_are_those_that_smp_has():
    assert len(MODELS) >= 9
    with pytest.raises(ValueError, match=r"Only Timm encoders are supported for DPT.*backbones-vit_tiny_patch16"):
        smp.DPT("backbones-vit_tiny_patch16", encoder_weights=None)


@pytest.mark.parametrize("encoder", ["pvt_v2_b0", "vit/vit_tiny_patch16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_smp_model_trains_on_it(name, encoder):
    model = smp.create_model(name, f"backbones-{encoder}", encoder_weights=None, classes=3)
    side = 128 if name == "pan" else 64  # PAN's pooling needs 8 cells of stride 16
    logits = model(torch.randn(2, 3, 128, side))
    assert logits.shape == (2, 3, 128, side)
    logits.square().mean().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    # a ViT makes each map apart, and some decoders leave some out
    assert [n for n in unused if not n.startswith("encoder.backbone.pyramid.levels.")] == []


@pytest.mark.parametrize("name", ["unet", "manet", "upernet", "segformer"])
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_depths(name, depth):
    options = {"decoder_channels": (32, 24, 16, 12, 8)[:depth]} if name in ("unet", "manet") else {}
    model = smp.create_model(name, "backbones-pvt_v2_b0", None, encoder_depth=depth, **options).eval()
    assert model.encoder.out_channels == [3, 0, 32, 64, 160, 256][: depth + 1]
    assert len(model.encoder.backbone.stages) == depth - 1, "stages that the decoder does not see are not built"
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1, 64, 96)


def test_the_encoder_keeps_smps_contract():
    encoder = smp.encoders.get_encoder("backbones-pvt_v2_b0", in_channels=5, depth=4, drop_path_rate=0.2)
    images = torch.randn(2, 5, 64, 96)
    maps = encoder(images)
    assert encoder.out_channels == [m.shape[1] for m in maps] == [5, 0, 32, 64, 160]
    assert encoder.output_stride == 16
    assert maps[0] is images
    assert [tuple(m.shape[2:]) for m in maps] == [(64 // s, 96 // s) for s in (1, 2, 4, 8, 16)]
    assert encoder.backbone.drop_path_rate == 0.2


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_backbones_of_catalogues_are_found_by_name(name):
    model = smp.Unet(f"backbones-{name}", encoder_weights=None).eval()
    assert model.encoder.out_channels == [3, 0, 64, 128, 256, 512]
    assert model.encoder.backbone.canonical_name == name
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 50, 70)).shape == (1, 1, 50, 70)


def test_unet_needs_no_divisible_size_and_others_keep_smps_rule():
    model = smp.Unet("backbones-pvt_v2_b0", encoder_weights=None).eval()
    for size in ((97, 131), (33, 64), (1, 1)):
        with torch.inference_mode():
            assert model(torch.randn(1, 3, *size)).shape == (1, 1, *size)
    with pytest.raises(RuntimeError, match=r"divisible by 32"):
        smp.FPN("backbones-pvt_v2_b0", encoder_weights=None)(torch.randn(1, 3, 97, 131))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["pvt_v2_b0", "timm/pvt_v2_b0"])
def test_output_stride_is_dilated_where_the_backbone_can_be_and_resized_elsewhere(name, stride):
    model = smp.DeepLabV3(f"backbones-{name}", encoder_weights=None, encoder_output_stride=stride).eval()
    assert model.encoder.backbone.strides == ([4, 8, 16, 32] if "/" in name else [4, 8, min(stride, 16), stride])
    with torch.inference_mode():
        assert model.encoder(torch.randn(1, 3, 64, 64))[-1].shape[2:] == (64 // stride, 64 // stride)
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_the_same_decoder_on_the_same_maps_gives_the_same_logits(randomise):
    """smp's `tu-` encoder and ours, with the same weights of timm."""
    theirs = randomise(smp.Unet("tu-pvt_v2_b0", encoder_weights=None, classes=2))
    path_less = theirs.encoder.model.state_dict()
    ours = smp.Unet("backbones-pvt_v2_b0", encoder_weights=None, classes=2).eval()
    from backbones.weights import load_weights

    load_weights(ours.encoder.backbone, path_less)
    rest = {k: v for k, v in theirs.state_dict().items() if not k.startswith("encoder.")}
    assert ours.load_state_dict(rest, strict=False).unexpected_keys == []
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = theirs(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(images), expected, atol=1e-3, rtol=1e-3)


# Weights


@pytest.fixture
def published(tmp_path, monkeypatch, randomise):
    """What pvt_v2_b0's `in1k` would download, as a file."""
    reference = randomise(timm.create_model("pvt_v2_b0"))
    path = tmp_path / "pvt.pth"
    torch.save(reference.state_dict(), path)
    monkeypatch.setattr("backbones.weights.published._fetch", lambda row, name: path)
    return reference, path


def test_weights_by_tag_by_smps_word_and_by_path(published):
    reference, path = published
    expected = reference.stages[0].blocks[0].attn.q.weight
    for weights in (True, "imagenet", "in1k", str(path)):
        encoder = smp.encoders.get_encoder("backbones-pvt_v2_b0", weights=weights, in_channels=4)
        assert torch.equal(encoder.backbone.state_dict()["stages.0.blocks.0.attn.q.weight"], expected), weights
    assert smp.Unet("backbones-pvt_v2_b0").encoder.backbone.load_report.layout == "timm"  # smp's default: "imagenet"
    with pytest.raises(WeightsError, match=r"'imagenet21k' is neither a file nor one of its weights \(in1k\)"):
        smp.Unet("backbones-pvt_v2_b0", encoder_weights="imagenet21k")
    with pytest.raises(WeightsError, match="edgevit_xxs has no published weights"):
        smp.Unet("backbones-edgevit_xxs")


def test_preprocessing_is_that_of_the_weights():
    row = backbone_info("convnext_base").weights[0]
    params = smp.encoders.get_preprocessing_params("backbones-convnext_base")
    assert params == {"input_space": "RGB", "input_range": [0, 1], "mean": [*row.mean], "std": [*row.std]}
    clip = smp.encoders.get_preprocessing_params("backbones-convnext_base", pretrained="clip_laion2b")
    assert clip["mean"][0] == pytest.approx(0.48145466)
    image = torch.full((4, 4, 3), 255.0).numpy()
    prepared = smp.encoders.get_preprocessing_fn("backbones-pvt_v2_b0")(image)
    assert prepared[0, 0, 0] == pytest.approx((1 - 0.485) / 0.229)
    with pytest.raises(WeightsError, match=r"no published weights 'gone'; it has in1k"):
        smp.encoders.get_preprocessing_params("backbones-pvt_v2_b0", "gone")
    with pytest.raises(WeightsError, match="it has none"):
        smp.encoders.get_preprocessing_params("backbones-edgevit_xxs")


# smp stays smp


def test_names_are_found_not_registered_and_smps_own_stay():
    before = set(smp.encoders.encoders)
    names = smp.encoders.get_encoder_names()
    assert {f"backbones-{name}" for name in list_backbones()} < set(names)
    assert set(names) > before
    assert not any(name.startswith("backbones-") for name in smp.encoders.encoders)
    assert type(smp.encoders.get_encoder("mit_b0", weights=None)).__name__ == "MixVisionTransformerEncoder"
    assert type(smp.Unet("resnet18", encoder_weights=None).encoder).__name__ == "ResNetEncoder"
    with pytest.raises(KeyError, match="Wrong encoder name `resnet19`"):
        smp.Unet("resnet19", encoder_weights=None)
    with pytest.raises(UnknownBackbone, match="did you mean 'pvt_v2_b"):
        smp.Unet("backbones-pvt_v2_bo", encoder_weights=None)


def test_smp_saves_and_loads_it(tmp_path, randomise):
    model = randomise(
        smp.Unet("backbones-pvt_v2_b0", encoder_weights=None, in_channels=4, classes=2, drop_path_rate=0.1)
    )
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    assert again.encoder.backbone.drop_path_rate == 0.1
    images = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


def test_a_model_that_was_built_on_published_weights_loads_without_them(tmp_path, published, monkeypatch):
    model = smp.Unet("backbones-pvt_v2_b0", encoder_weights="imagenet").eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("backbones.weights.published._fetch", None)
    again = smp.from_pretrained(tmp_path, encoder_weights=None).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))


def test_freezing_the_encoder_as_smp_does_holds():
    model = smp.Unet("backbones-edgevit_xxs", encoder_weights=None)
    model.freeze_encoder()
    model.train()
    assert not any(p.requires_grad for p in model.encoder.parameters())
    norms = [m for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)


# What cannot work


@pytest.mark.parametrize("depth", [1, 6])
def test_depths_that_a_backbone_has_no_maps_for(depth):
    with pytest.raises(InputError, match=f"encoder_depth={depth}, and a backbone has maps for 2 to 5"):
        smp.encoders.get_encoder("backbones-pvt_v2_b0", depth=depth)


def test_backbones_of_other_strides_are_refused():
    with pytest.raises(InputError, match=r"need maps of strides \[4, 8, 16, 32\], but .* returns strides \[16\]"):
        smp.Unet("backbones-vit_tiny_patch16", encoder_weights=None, pyramid="plain", out_indices=(0,))


def test_maps_of_stride_2_are_handed_on():
    backbone = timm.create_model("resnet18", features_only=True)
    encoder = Encoder(backbone)
    assert encoder.out_channels == [3, 64, 64, 128, 256, 512]
    model = UnetDecoder(encoder.out_channels, (32, 24, 16, 12, 8))
    assert model(encoder(torch.randn(2, 3, 64, 64))).shape == (2, 8, 64, 64)
    assert Levels.of(backbone, 3, depth=3, output_stride=32).channels == [3, 64, 64, 128]
