"""Any backbone tells classes, by its published classifier where it has one."""

import pytest
import timm
import torch
from timm.layers import SelectAdaptivePool2d
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

import backbones_tasks
from backbones import UnknownBackbone, build_backbone, wrap
from backbones.errors import InputError
from backbones_tasks import build_classifier
from backbones_tasks.models.classifier import PooledHead

SIZES = [(64, 64), (33, 70), (1, 1)]


class Tiny(nn.Module):
    """Two maps of strides 4 and 8."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 2, 2)

    def forward(self, images):
        x = self.a(images)
        return [x, self.b(x)]


def tiny():
    return wrap(Tiny(), channels=(8, 12), strides=(4, 8))


@pytest.mark.parametrize(
    ("backbone", "pool"),
    [
        ("pvt_v2_b0", None),
        ("pvt_v2_b0", "avg"),
        ("pvt_v2_b0", "max"),
        ("pvt_v2_b0", "catavgmax"),
        ("timm/pvt_v2_b0", "avgmax"),
        ("vit_tiny_patch16", "cls"),
        ("vit_tiny_patch16", "avg"),
        ("vit_tiny_patch16", "both"),
        ("vit_tiny_patch16", "max"),
        ({"name": "deit_tiny_distilled_patch16", "drop_path_rate": 0.1}, None),
        (tiny, None),
        (tiny, "max"),
        (tiny, "catavgmax"),
    ],
)
def test_every_image_has_logits_and_every_parameter_learns(backbone, pool):
    backbone = backbone() if callable(backbone) else backbone
    model = build_classifier(backbone=backbone, num_classes=5, pool=pool, drop_rate=0.1)
    out = model(torch.randn(2, 3, 64, 64))
    loss = sum(F.cross_entropy(logits, torch.tensor([0, 4])) for logits in (out if isinstance(out, tuple) else [out]))
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval()
    for size in SIZES:
        with torch.no_grad():
            logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()


def test_the_published_classifier_is_used_with_its_weights(tmp_path, randomise):
    theirs = randomise(timm.create_model("vit_tiny_patch16_224"))
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    backbone = {"name": "vit_tiny_patch16", "pretrained": str(tmp_path / "vit.pth")}
    images = torch.randn(2, 3, 224, 224)
    for pool in (None, "cls"):
        model = build_classifier(backbone=backbone, num_classes=1000, pool=pool).eval()
        assert model.head is None
        with torch.inference_mode():
            torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)
    averaged = build_classifier(backbone=backbone, num_classes=1000, pool="avg").eval()
    assert torch.equal(averaged.backbone.fc_norm.weight, theirs.norm.weight), (
        "the trained norm moves behind the pooling"
    )
    other = build_classifier(backbone=backbone, num_classes=7)
    assert set(other.backbone.load_report.mismatched) == {"head.weight", "head.bias"}


def test_pooling_is_what_it_is_called():
    images = torch.randn(2, 3, 64, 64)
    model = build_classifier(backbone="vit_tiny_patch16", num_classes=5, pool="both").eval()
    tokens = model.backbone.forward_features(images)
    joined = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(model.backbone.forward_head(tokens, pre_logits=True), joined)
    for pool in ("avg", "max", "avgmax", "catavgmax"):
        head = PooledHead(6, 3, pool)
        x = torch.randn(2, 6, 4, 5)
        pooled = SelectAdaptivePool2d(pool_type=pool, flatten=True)(x)
        assert head.fc.in_features == pooled.shape[1]
        torch.testing.assert_close(head(x), head.fc(head.norm(pooled)))
        published = build_classifier(backbone="mobilevit_xxs", num_classes=5, pool=pool)
        assert published.head is None
        assert published.backbone.get_classifier().in_features == len(pooled[0]) * 320 // 6
    assert PooledHead(6, 3, drop_rate=0.4).drop.p == 0.4
    assert build_classifier(backbone="edgevit_xxs", num_classes=3, drop_rate=0.4).backbone.drop_rate == 0.4


def test_distilled_models_train_both_heads_and_average_them_afterwards():
    model = build_classifier(backbone="deit_tiny_distilled_patch16", num_classes=5)
    images = torch.randn(2, 3, 64, 64)
    pair = model(images)
    assert [logits.shape for logits in pair] == [(2, 5), (2, 5)]
    assert not torch.allclose(*pair)
    torch.testing.assert_close(model.eval()(images), (pair[0] + pair[1]) / 2)
    with pytest.raises(InputError, match=r"pool='avg' does not work with vit/deit_tiny_distilled_patch16: .*distilled"):
        build_classifier(backbone="deit_tiny_distilled_patch16", num_classes=5, pool="avg")


def test_options_for_maps_get_a_head_on_the_last_of_them():
    model = build_classifier(backbone={"name": "pvt_v2_b0", "out_indices": (0, 1)}, num_classes=3)
    assert model.head.fc.in_features == 64
    assert len(model.backbone.stages) == 2
    windowed = {"name": "vit_tiny_patch16", "window_size": 4, "pyramid": "plain"}
    assert build_classifier(backbone=windowed, num_classes=3, pool="avg").head.fc.in_features == 192
    with pytest.raises(InputError, match="window_size=4 leaves out the class token"):
        build_classifier(backbone=windowed, num_classes=3, pool="cls")


def test_modules_of_others_serve():
    model = build_classifier(backbone=timm.create_model("resnet18", features_only=True), num_classes=3).eval()
    assert model(torch.randn(1, 3, 40, 50)).shape == (1, 3)


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("pool", ["cls", "max"])
def test_optimizer_groups_hold_every_parameter_once(pool, layer_decay):
    model = build_classifier(backbone="vit_tiny_patch16", num_classes=3, pool=pool)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups["backbone.pos_embed"]["weight_decay"] == 0
    if layer_decay:
        assert groups["backbone.head.weight"]["lr_scale"] == 1
        assert groups["backbone.pos_embed"]["lr_scale"] < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"drop_rate": 1.0}, r"drop_rate=1\.0 must be"),
        ({"pool": "agv"}, "did you mean 'avg'"),
        (
            {"pool": "cls"},
            r"pool='cls' does not work with pvt/pvt_v2_b0: .*has no class token; choose from 'avg', 'max'",
        ),
        ({"backbone": {"drop_path_rate": 0.1}}, 'lack "name"'),
        ({"backbone": {"name": "pvt_v2_b0", "num_classes": 7}}, r"have num_classes, which build_classifier decides"),
        ({"backbone": {"name": "pvt_v2_b0", "drop_path_rte": 0.1}}, "did you mean 'drop_path_rate'"),
        ({"backbone": nn.Conv2d(3, 3, 1)}, "no feature_info"),
        ({"backbone": tiny(), "pool": "both"}, "hold no class token"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_classifier(**{"backbone": "pvt_v2_b0", "num_classes": 2, **options})


def test_classifiers_as_modules_are_refused():
    ours, theirs = build_backbone("pvt_v2_b0", features_only=False), timm.create_model("resnet18")
    for module in (ours, theirs):
        with pytest.raises(InputError, match="is a classifier already"):
            build_classifier(backbone=module, num_classes=3)


def test_unknown_backbones_are_refused_with_the_nearest_name():
    with pytest.raises(UnknownBackbone, match="did you mean 'pvt_v2_b"):
        build_classifier(backbone="pvt_v2_bo", num_classes=2)


def test_it_is_found_in_the_package():
    assert backbones_tasks.build_classifier is build_classifier
    assert "build_classifier" in backbones_tasks.__all__
