"""Several heads on one backbone: one pass for all in eval mode, each for itself in training."""

import copy
import pickle
import threading

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from backbones import build_backbone, wrap
from backbones.errors import InputError
from backbones_tasks import build_classifier, build_detector, build_multitask, build_segmenter

DET = {"task": "detection", "num_classes": 5, "fpn_channels": 32, "box_channels": 32, "min_size": 96, "max_size": 96}
SEG = {"task": "segmentation", "num_classes": 4, "decoder_channels": 8}
CLS = {"task": "classification", "num_classes": 3}
HEADS = {"det": DET, "seg": SEG, "cls": CLS}


@pytest.fixture
def model(randomise):
    return randomise(build_multitask("pvt_v2_b0", HEADS))


class Strided(nn.Module):
    """Convolutions that are padded, and so need sides that 32 divides."""

    def __init__(self):
        super().__init__()
        widths = zip((3, 8, 16, 24), (8, 16, 24, 32), (4, 2, 2, 2), strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, stride + 1, stride, 1) for i, o, stride in widths)

    def forward(self, images):
        maps = [images]
        for conv in self.convs:
            maps.append(conv(maps[-1]).tanh())
        return maps[1:]


def passes(model):
    """Shapes of the images that the backbone is called with from now on."""
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    return seen


def normalised(model, images):
    mean, std = (torch.tensor(model.backbone.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


def assert_same_objects(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def test_prediction_is_one_pass_of_the_backbone_for_all_heads(model):
    seen = passes(model)
    results = model([torch.rand(3, 90, 60), torch.rand(3, 50, 96)])
    assert seen == [(2, 3, 96, 96)]
    assert list(results) == ["det", "seg", "cls"]
    assert [logits.shape for logits in results["seg"]] == [(4, 90, 60), (4, 50, 96)]
    assert results["cls"].shape == (2, 3)
    assert [sorted(found) for found in results["det"]] == [["boxes", "labels", "scores"]] * 2


def test_a_pass_for_one_head_runs_no_other(model):
    ran = []
    for name, head in model.heads.items():
        head.register_forward_hook(lambda *args, name=name: ran.append(name))
    assert list(model([torch.rand(3, 64, 64)], heads=["seg"])) == ["seg"]
    assert ran == ["seg"]


def test_a_batch_gives_a_batch_of_logits(model):
    images = torch.rand(2, 3, 96, 64)
    results = model(images)
    assert results["seg"].shape == (2, 4, 96, 64)
    torch.testing.assert_close(results["seg"][1], model([images[1]])["seg"][0], atol=1e-4, rtol=1e-4)
    assert len(results["det"]) == 2


@pytest.mark.parametrize("size", [(96, 96), (96, 70), (61, 96), (33, 96)])
def test_each_head_says_in_a_common_pass_what_it_says_alone(randomise, size):
    """At the size that the detector brings images to, and on a backbone that pads to 32 by itself."""
    backbone = wrap(Strided(), channels=(8, 16, 24, 32))
    det = build_detector("faster_rcnn", backbone=backbone, **{k: v for k, v in DET.items() if k != "task"})
    seg = build_segmenter("upernet", backbone=backbone, num_classes=4, decoder_channels=8)
    cls = build_classifier(backbone=backbone, num_classes=3)
    for module in (det, seg, cls):
        randomise(module)
    alone = copy.deepcopy((det, seg, cls))
    model = build_multitask(backbone, {"det": det, "seg": seg, "cls": cls}).eval()
    others = [torch.rand(3, 96, 96)]  # which makes the batch larger than the image
    image = torch.rand(3, *size)
    with torch.no_grad():
        expected = alone[0]([image, *others])[0], *(m(normalised(model, image)[None])[0] for m in alone[1:])
        results = model([image, *others])
    assert len(expected[0]["boxes"]) > 0
    assert_same_objects(results["det"][0], expected[0])
    torch.testing.assert_close(results["seg"][0], expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results["cls"][0], expected[2], atol=1e-4, rtol=1e-4)


def test_boxes_and_pixels_are_those_of_the_image_whatever_its_size(model):
    results = model([torch.rand(3, 40, 200)])
    assert results["seg"][0].shape == (4, 40, 200)
    boxes = results["det"][0]["boxes"]
    assert len(boxes) > 0
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([200, 40, 200, 40]) + 1e-3).all()
    assert boxes[:, 2].max() > 96


@pytest.mark.parametrize(("heads", "expected"), [({"seg": SEG, "cls": CLS}, (1, 3, 37, 50)), (HEADS, (1, 3, 96, 96))])
def test_without_a_detector_images_keep_their_size(heads, expected):
    model = build_multitask("edgevit_xxs", heads).eval()
    seen = passes(model)
    model([torch.rand(3, 37, 50)])
    assert seen == [expected]


def test_the_common_size_can_be_chosen(model):
    model = build_multitask("edgevit_xxs", {"a": SEG, "b": {**DET, "min_size": 300}, "c": DET}, image_size=64).eval()
    seen = passes(model)
    results = model([torch.rand(3, 50, 100)])
    assert seen == [(1, 3, 32, 64)]
    assert results["a"][0].shape == (4, 50, 100)


def test_decoders_that_need_more_pixels_get_them():
    pan = {"task": "segmentation", "num_classes": 4, "architecture": "smp/pan"}
    model = build_multitask("edgevit_xxs", {"pan": pan, "seg": SEG}).eval()
    seen = passes(model)
    assert [logits.shape for logits in (r[0] for r in model([torch.rand(3, 40, 60)]).values())] == [(4, 40, 60)] * 2
    assert len(seen) == 1
    assert min(seen[0][2:]) >= 8 * 16


def test_heads_train_as_if_alone(model):
    model.train()
    images, targets = (
        [torch.rand(3, 96, 96)] * 2,
        [{"boxes": torch.tensor([[5.0, 5, 50, 60]]), "labels": torch.ones(1).long()}] * 2,
    )
    losses = model.heads["det"](images, targets)
    logits, classes = model.heads["seg"](torch.rand(2, 3, 64, 64)), model.heads["cls"](torch.rand(2, 3, 32, 32))
    for head, loss in (
        ("det", sum(losses.values())),
        ("seg", logits.square().mean()),
        ("cls", classes.square().mean()),
    ):
        model.zero_grad()
        loss.backward()
        touched = {name.split(".")[1] for name, p in model.heads.named_parameters("heads") if p.grad is not None}
        assert touched == {head}
        assert model.backbone.stages[0].embed.proj.weight.grad.abs().sum() > 0
    with pytest.raises(InputError, match=r"call model\.heads\[name\]"):
        model(images)


def test_the_backbone_is_built_with_the_maps_that_heads_want_and_no_others():
    dense = {"task": "detection", "num_classes": 5, "architecture": "retinanet", "fpn_channels": 32}
    model = build_multitask("vit_tiny_patch16", {"dense": dense, "cls": CLS})
    assert model.backbone.out_indices == (1, 2, 3)
    assert model.heads["dense"].inner_backbone.strides == [8, 16, 32]
    assert model.heads["cls"].inner_backbone.strides == [32]
    shallow = build_multitask("pvt_v2_b0", {"seg": {**SEG, "encoder_depth": 4}, "cls": {**CLS, "out_indices": [1]}})
    assert shallow.backbone.out_indices == (0, 1, 2)
    assert len(shallow.backbone.stages) == 3
    assert shallow.heads["cls"].inner_backbone.strides == [8]
    last = build_multitask(
        {"name": "pvt_v2_b0", "out_indices": (1, 2, 3)}, {"det": DET, "cls": {**CLS, "out_indices": (-1,)}}
    )
    assert last.heads["det"].inner_backbone.strides == [8, 16, 32]
    assert [m.shape[1] for m in last.eval().heads["cls"].inner_backbone(torch.rand(1, 3, 64, 64))] == [256]


def test_the_backbone_is_in_the_state_once(model):
    names = list(model.state_dict())
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(v.numel() for n, v in model.state_dict().items() if n in dict(model.named_parameters())) == parameters
    inside = [name for name in names if "stages.0.embed.proj.weight" in name]
    assert inside == ["backbone.stages.0.embed.proj.weight"]
    again = build_multitask("pvt_v2_b0", HEADS).eval()
    again.load_state_dict(model.state_dict())
    image = torch.rand(3, 96, 96)
    torch.testing.assert_close(again([image])["seg"][0], model([image])["seg"][0])


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_tiny_patch16"])
def test_the_optimizer_has_each_parameter_once_and_the_backbone_by_layers(name):
    model = build_multitask(name, HEADS)
    groups = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    inside = [p for group in groups for p in group["params"]]
    assert len(inside) == len(set(inside)) == len(list(model.parameters()))
    alone = build_segmenter("upernet", backbone=name, num_classes=4, decoder_channels=8)
    theirs = create_optimizer_v2(alone, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups

    def rates(model, groups):
        names = {p: n for n, p in model.named_parameters()}
        found = {names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        return {n: v for n, v in found.items() if n.startswith("backbone.")}

    assert rates(model, groups) == rates(alone, theirs)
    names = {p: n for n, p in model.named_parameters()}
    assert {g["lr_scale"] for g in groups for p in g["params"] if names[p].startswith("heads.")} == {1.0}
    assert set(model.backbone_parameters()) <= set(model.backbone.parameters())


def test_modes_and_devices_reach_the_backbone_once(model):
    model.train()
    assert model.backbone.training
    assert model.heads["seg"].training
    assert not model.eval().backbone.training
    assert model.to(torch.float64).backbone.stages[0].embed.proj.weight.dtype == torch.float64
    assert model([torch.rand(3, 64, 64, dtype=torch.float64)])["seg"][0].dtype == torch.float64


def test_copies_and_pickles_are_on_their_own(model):
    image = torch.rand(3, 64, 64)
    expected = model([image])["seg"][0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other([image])["seg"][0], expected)
        with torch.no_grad():
            for p in other.backbone.parameters():
                p.zero_()
        assert not other([image])["seg"][0].equal(expected)
        assert not other.heads["seg"](image[None]).equal(model.heads["seg"](image[None]))
    torch.testing.assert_close(model([image])["seg"][0], expected)


def test_threads_do_not_see_each_others_maps(model):
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    expected = [model([image])["seg"][0] for image in images]
    results, meet = {}, threading.Barrier(2, timeout=60)

    def both_have_their_maps(*args):
        meet.wait()

    model.heads["seg"].inner_backbone.register_forward_pre_hook(both_have_their_maps)

    def run(i):
        results[i] = model([images[i]], heads=["seg"])["seg"][0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        torch.testing.assert_close(results[i], expected[i])


def test_a_backbone_that_is_replaced_is_replaced_for_all(model):
    class Twice(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, images):
            return [2 * m for m in self.body(images)]

    images = torch.rand(1, 3, 64, 64)
    before = model.heads["cls"].inner_backbone(images)[0]
    model.backbone = Twice(model.backbone)
    torch.testing.assert_close(model.heads["cls"].inner_backbone(images)[0], 2 * before)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({}, "at least one head"),
        ({"a.b": SEG}, r"cannot be called 'a\.b'"),
        ({"keys": SEG}, "cannot be called 'keys'"),
        ({"seg": {"num_classes": 2}}, "the head 'seg' lacks \"task\""),
        ({"seg": {**SEG, "task": "segmentatoin"}}, "did you mean 'segmentation'"),
        ({"seg": {**SEG, "decoder_chanels": 8}}, "did you mean 'decoder_channels'"),
        ({"seg": {**SEG, "out_indices": [0, 7]}}, r"the head 'seg' wants the maps \[0, 7\]"),
        ({"det": {**DET, "batch_norm": "frozen"}}, "norm_eval=True"),
        ({"a": DET, "b": {**DET, "min_size": 64}}, "heads a, b bring images to different sizes"),
        ({"det": {**DET, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}, "seg": SEG}, "leave out image_mean"),
        ({"cls": {**CLS, "pool": "cls"}}, "no class token"),
    ],
)
def test_what_cannot_be_is_refused(heads, message):
    with pytest.raises(InputError, match=message):
        build_multitask("edgevit_xxs", heads)


def test_a_size_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="image_size=0 must be at least 1"):
        build_multitask("edgevit_xxs", {"seg": SEG}, image_size=0)


def test_a_head_of_another_backbone_is_refused():
    other = build_segmenter("upernet", backbone="edgevit_xxs", num_classes=2)
    for backbone in ("edgevit_xxs", build_backbone("edgevit_xxs")):
        with pytest.raises(InputError, match=r"heads\['seg'\] was not built on the backbone"):
            build_multitask(backbone, {"seg": other})


def test_timms_own_feature_extractors_can_be_shared():
    body = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    model = build_multitask(body, {"det": DET, "far": {**CLS, "out_indices": [4]}, "near": {**CLS, "out_indices": [1]}})
    strides = {name: head.inner_backbone.strides for name, head in model.heads.items()}
    assert strides == {"det": [4, 8, 16, 32], "far": [32], "near": [4]}
    assert model.eval()([torch.rand(3, 64, 64)])["far"].shape == (1, 3)
