"""PVT equals transformers' on the same weights, in its, the official and OpenMMLab's key layout."""

import pytest
import torch
import torch.nn.functional as F
from transformers import PvtConfig, PvtForImageClassification
from transformers.models.pvt.modeling_pvt import PvtPatchEmbeddings

from backbones import InputError, build_backbone
from backbones.weights import load_weights
from backbones_pvt.pvt import OFFICIAL, TRANSFORMERS

# with 1000 classes; the paper says 13.2, 24.5, 44.2 and 61.4 millions
PARAMETERS = {"pvt_tiny": 13_229_288, "pvt_small": 24_485_864, "pvt_medium": 44_208_104, "pvt_large": 61_369_320}


@pytest.fixture(scope="module")
def reference(randomise):
    """transformers' model, with the epsilons of the official code and its way to resize positions."""
    model = randomise(PvtForImageClassification(PvtConfig()))
    for name, module in model.named_modules():
        if name.endswith(("attention.self.layer_norm", "embeddings.0.layer_norm")) or "patch_embeddings" in name:
            module.eps = 1e-5
    return model


@pytest.fixture
def resized(monkeypatch):
    """transformers reshapes a table of 224 x 224 to the grid of the image, which fails for any other."""

    def interpolate(self, table, height, width):
        side = round(table.shape[1] ** 0.5)
        square = table.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(square, size=(height, width), mode="bilinear").flatten(2).transpose(1, 2)

    monkeypatch.setattr(PvtPatchEmbeddings, "interpolate_pos_encoding", interpolate)


def official(reference):
    """The reference's state under the names of the official release."""
    names = {ours: theirs for theirs, ours in _official_names(TRANSFORMERS.convert(reference.state_dict()))}
    return {names[key]: value for key, value in TRANSFORMERS.convert(reference.state_dict()).items()}


def _official_names(ours):
    for key in ours:
        part, _, rest = key.partition(".")
        if part == "stages":
            index, kind, *rest = rest.split(".", 2)
            stage = int(index) + 1
            kind = {"blocks": "block", "embed": "patch_embed"}.get(kind, kind)
            yield (kind if kind == "cls_token" else ".".join((f"{kind}{stage}", *rest))), key
        else:
            yield key, key


def maps_of(reference, images):
    """Of the official dense code, which leaves out the class token: the reference's modules, run one by one."""
    maps, x = [], images
    encoder = reference.pvt.encoder
    for embed, blocks in zip(encoder.patch_embeddings, encoder.block, strict=True):
        x = embed.projection(x)
        height, width = x.shape[-2:]
        table = embed.position_embeddings[:, embed.cls_token is not None :]
        x = embed.layer_norm(x.flatten(2).transpose(1, 2)) + embed.interpolate_pos_encoding(table, height, width)
        for block in blocks:
            (x,) = block(x, height, width)
        x = x.transpose(1, 2).unflatten(2, (height, width))
        maps.append(x)
    return maps


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name])


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
@pytest.mark.usefixtures("resized")
def test_logits_and_maps_equal_transformers(size, reference, load_pair, assert_equals_reference):
    classifier, backbone = load_pair("pvt_tiny", reference)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert_equals_reference("logits", classifier(images), reference(images).logits)
        for ours, theirs in zip(backbone(images), maps_of(reference, images), strict=True):
            assert_equals_reference("map", ours, theirs)


@pytest.mark.usefixtures("resized")
def test_official_layout_loads(reference, assert_equals_reference):
    model = build_backbone("pvt_tiny", features_only=False).eval()
    report = load_weights(model, official(reference))
    assert report.layout == "official"
    assert not report.missing
    assert not report.unexpected
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert_equals_reference("official layout", model(images), reference(images).logits)


def test_openmmlab_layout_loads():
    """Its list of blocks begins with the positions, its convolutions are 1x1, its attention is PyTorch's."""
    model = build_backbone("pvt_tiny", out_norm=False)
    state = {}
    for key, value in model.state_dict().items():
        _, stage, kind, *rest = key.split(".")
        rest = ".".join(rest)
        if kind == "pos_embed":
            key = f"layers.{stage}.1.0.pos_embed"
        elif kind == "embed":
            key = f"layers.{stage}.0.{rest.replace('proj.', 'projection.')}"
        else:
            block, _, rest = rest.partition(".")
            for ours, theirs in (
                ("attn.proj.", "attn.attn.out_proj."),
                ("attn.q.", "attn.attn.in_proj_"),
                ("mlp.fc1.", "ffn.layers.0."),
                ("mlp.fc2.", "ffn.layers.3."),
            ):
                rest = rest.replace(ours, theirs)
            if "attn.kv." in rest:
                continue
            if "in_proj_" in rest:
                value = torch.cat((value, model.state_dict()[key.replace(".q.", ".kv.")]))
            if "ffn.layers" in rest and value.ndim == 2:
                value = value[..., None, None]
            key = f"layers.{stage}.1.{int(block) + 1}.{rest}"
        state[key] = value
    report = load_weights(build_backbone("pvt_tiny"), {"state_dict": {f"backbone.{k}": v for k, v in state.items()}})
    assert report.layout == "OpenMMLab"
    assert report.share == 1
    assert not report.missing
    assert not report.unexpected


def test_tables_of_another_size_and_without_the_class_token_are_resized(reference):
    state = official(reference)
    model = build_backbone("pvt_tiny", img_size=(96, 160))
    report = load_weights(model, state)
    assert set(report.resized) == {f"stages.{i}.pos_embed" for i in range(4)}
    table = state["pos_embed4"][:, 1:].transpose(1, 2).unflatten(2, (7, 7))
    expected = F.interpolate(table, size=(3, 5), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.stages[3].pos_embed.detach(), expected)


@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilons_of_the_official_code():
    model = build_backbone("pvt_tiny", features_only=False)
    fine = [name for name, m in model.named_modules() if getattr(m, "eps", None) == 1e-6]
    assert [name for name in fine if "blocks" not in name] == ["norm"]
    coarse = [name for name, m in model.named_modules() if getattr(m, "eps", None) == 1e-5]
    assert all(name.endswith(("embed.norm", "attn.norm")) for name in coarse)
    assert len(coarse) == 4 + 6  # no reduction in the last stage


def test_class_token_and_cells_are_what_the_classifier_pools():
    model = build_backbone("pvt_tiny", features_only=False, global_pool="both").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        assert tokens.shape == (1, 1 + 4, 512)
        both = torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), 1)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), both)
        torch.testing.assert_close(model(images), model.head(both))
        model.reset_classifier(7, "max")
        torch.testing.assert_close(model(images), model.head(tokens[:, 1:].amax(1)))
        model.reset_classifier(7, "")
        assert model(images).shape == (1, 5, 7)


def test_a_class_token_cannot_be_reduced():
    with pytest.raises(InputError, match="sr_ratios"):
        build_backbone("pvt_tiny", features_only=False, sr_ratios=(8, 4, 2, 2))


def test_official_names_are_known():
    assert OFFICIAL.convert({"pos_embed4": torch.zeros(1), "cls_token": torch.zeros(1)}).keys() == {
        "stages.3.pos_embed",
        "stages.3.cls_token",
    }
