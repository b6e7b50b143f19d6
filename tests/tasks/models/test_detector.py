"""torchvision's detectors on any backbone: same numbers, same interface, for any strides and sizes."""

import copy
import itertools
import pickle
import statistics

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from backbones import build_backbone, wrap
from backbones.errors import InputError, UnknownBackbone
from backbones_tasks import build_detector
from backbones_tasks.data.shapes import CLASSES, draw_scene
from backbones_tasks.models.detector import ARCHITECTURES, MASKED

SMALL = {"fpn_channels": 64, "min_size": 64, "max_size": 96}
# Regions enough to see that R-CNNs work.
FEW = {
    "rpn_post_nms_top_n_train": 100,
    "rpn_post_nms_top_n_test": 100,
    "box_batch_size_per_image": 32,
}
LOSSES = {
    "faster_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
    "mask_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"},
    "cascade_rcnn": {"loss_objectness", "loss_rpn_box_reg"}
    | {f"loss_{part}_{i}" for part in ("classifier", "box_reg") for i in (1, 2, 3)},
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
}


class Tiny(nn.Module):
    """Maps of the strides asked for, from one convolution each."""

    def __init__(self, strides):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 8, stride, stride) for stride in strides)

    def forward(self, images):
        return [conv(images).relu() for conv in self.convs]


def tiny(strides=(4, 8, 16, 32)):
    return wrap(Tiny(strides), channels=(8,) * len(strides), strides=strides)


def small(architecture, backbone=None, num_classes=5, **options):
    if architecture not in ("retinanet", "fcos"):
        options = {"box_channels": 32, **FEW, **options}
    if architecture in MASKED:
        options = {"mask_channels": 8, **options}
    return build_detector(architecture, backbone=backbone or tiny(), num_classes=num_classes, **{**SMALL, **options})


def scenes(count, size=64):
    """Images and targets as torchvision's detectors take them."""
    images, targets = [], []
    for seed in range(count):
        scene = draw_scene(seed, size)
        images.append(torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255)
        targets.append(
            {
                "boxes": torch.from_numpy(scene.boxes),
                "labels": torch.from_numpy(scene.labels),
                "masks": torch.from_numpy(scene.masks).byte(),
                "image_id": seed,
            }
        )
    return images, targets


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_in_training_reach_every_parameter(architecture):
    model = small(architecture)
    images, targets = scenes(2)
    losses = model(images, targets)
    assert losses.keys() == LOSSES[architecture]
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_lie_in_their_own_images(architecture):
    model = small(architecture, score_thresh=0.0, detections_per_img=7).eval()
    sizes = [(33, 50), (64, 48), (120, 61)]
    with torch.no_grad():
        outputs = model([torch.rand(3, *size) for size in sizes])
    for output, (height, width) in zip(outputs, sizes, strict=True):
        assert output.keys() == {"boxes", "labels", "scores"} | ({"masks"} if architecture in MASKED else set())
        assert len(output["boxes"]) == len(output["labels"]) == len(output["scores"]) == 7
        assert (output["boxes"] >= 0).all()
        assert (output["boxes"][:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        if architecture in MASKED:
            assert output["masks"].shape == (7, 1, height, width)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_without_objects_train(architecture):
    model = small(architecture)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 64, 64)}
    losses = model([torch.rand(3, 64, 64)], [nothing])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():  # DDP waits for the gradient of each
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


class _Maps(nn.Module):
    """torchvision's own body, whose dict of maps becomes a list."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, images):
        return list(self.body(images).values())


def theirs_and_ours(architecture, **options):
    """torchvision's detector on its ResNet-18, and ours on the same body with the same weights."""
    dense = architecture in ("retinanet", "fcos")
    layers = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if dense else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, **layers)
    made = {"faster_rcnn": detection.FasterRCNN, "mask_rcnn": detection.MaskRCNN, "fcos": detection.FCOS}
    if architecture == "retinanet":
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
        anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        theirs = detection.RetinaNet(backbone, 5, anchor_generator=anchors, **options)
    else:
        theirs = made[architecture](backbone, 5, **options)
    channels = (128, 256, 512) if dense else (64, 128, 256, 512)
    strides = (8, 16, 32) if dense else (4, 8, 16, 32)
    body = wrap(_Maps(copy.deepcopy(backbone.body)), channels=channels, strides=strides)
    ours = build_detector(architecture, backbone=body, num_classes=5, **options)
    state = {name.replace("backbone.body.", "backbone.body.module.body."): v for name, v in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    return theirs, ours


@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_models_equal_torchvisions_own_on_the_same_weights(architecture):
    # 128 is divided by the strides of all levels: elsewhere torchvision misplaces anchors, see below
    few = {**FEW, "box_detections_per_img": 6} if architecture.endswith("rcnn") else {"detections_per_img": 6}
    theirs, ours = theirs_and_ours(architecture, min_size=128, max_size=128, **few)
    assert isinstance(ours, type(theirs))
    images, targets = scenes(2, 128)
    torch.manual_seed(1)
    expected = theirs(images, targets)
    torch.manual_seed(1)
    losses = ours(images, targets)
    assert losses.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], atol=1e-4, rtol=1e-4)

    for model in (theirs, ours):
        model.eval().double()  # fresh heads are sure of nothing: rounding would decide which boxes come first
        (model if hasattr(model, "score_thresh") else model.roi_heads).score_thresh = 0.0
    images = [image.double() for image in images]
    with torch.no_grad():
        for expected, output in zip(theirs(images), ours(images), strict=True):
            assert len(expected["boxes"]) == 6
            assert output.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=1e-5)


def test_neck_and_heads_have_torchvisions_names_so_that_published_weights_fit():
    with torch.device("meta"):
        theirs = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        body = wrap(nn.Identity(), channels=(256, 512, 1024, 2048))
        ours = build_detector("mask_rcnn", backbone=body, num_classes=91).state_dict()
    expected = {name: value.shape for name, value in theirs.items() if not name.startswith("backbone.body.")}
    assert {name: value.shape for name, value in ours.items()} == expected


def test_anchors_stand_on_the_strides_of_the_levels_for_any_size():
    model = small("retinanet", tiny((8, 16, 32)))
    images = torch.zeros(1, 3, 352, 416)  # P7 has 3 x 4 cells, which torchvision would place 117 and 104 pixels apart
    levels = list(model.backbone(images).values())
    (anchors,) = model.anchor_generator(ImageList(images, [(352, 416)]), levels)
    per_level = [9 * m.shape[-2] * m.shape[-1] for m in levels]
    for stride, level, boxes in zip((8, 16, 32, 64, 128), levels, anchors.split(per_level), strict=True):
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert centres.amax(0).tolist() == [(level.shape[-1] - 1) * stride, (level.shape[-2] - 1) * stride]


@pytest.mark.parametrize(
    ("architecture", "strides", "levels", "sizes"),
    [
        ("faster_rcnn", (4, 8, 16, 32), [4, 8, 16, 32, 64], [(32,), (64,), (128,), (256,), (512,)]),
        ("faster_rcnn", (8, 16, 32), [8, 16, 32, 64], [(64,), (128,), (256,), (512,)]),
        ("faster_rcnn", (16,), [16, 32], [(128,), (256,)]),
        # a dilated backbone: its last map is as fine as the one before, and still for objects twice as large
        ("faster_rcnn", (4, 8, 16, 16), [4, 8, 16, 16, 32], [(32,), (64,), (128,), (256,), (512,)]),
        # a gap: the first map's anchors fill it, and the others have as many
        ("faster_rcnn", (4, 32), [4, 32, 64], [(32, 64, 128), (256, 322, 406), (512, 645, 812)]),
        ("retinanet", (8, 16), [8, 16, 32, 64], [(32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406)]),
        ("fcos", (8, 16, 32), [8, 16, 32, 64, 128], [(8,), (16,), (32,), (64,), (128,)]),
        ("fcos", (16, 16), [16, 16, 32, 64], [(16,), (32,), (64,), (128,)]),
    ],
)
def test_levels_and_anchors_follow_from_the_strides(architecture, strides, levels, sizes):
    model = small(architecture, tiny(strides))
    generator = model.anchor_generator if architecture in ("retinanet", "fcos") else model.rpn.anchor_generator
    assert model.backbone.strides == levels == list(generator.strides)
    assert list(generator.sizes) == sizes
    assert model.transform.size_divisible == max(strides)
    images, targets = scenes(1)
    sum(model(images, targets).values()).backward()


@pytest.mark.parametrize("strides", [(4, 32), (8, 64), (16,), (4, 8, 16, 32), (4, 8, 16, 16)])
def test_every_region_is_read_from_some_map(strides):
    model = small("faster_rcnn", tiny(strides))
    pool = model.roi_heads.box_roi_pool
    maps = {str(i): torch.full((1, 2, 1024 // s, 1024 // s), i + 1.0) for i, s in enumerate(strides)}
    sides = torch.tensor([8.0, 30, 60, 112, 130, 224, 260, 448, 900])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], 1)
    read = pool(maps, [boxes], [(1024, 1024)])
    torch.testing.assert_close(read, read[:, :1, :1, :1].expand_as(read))
    indices = read[:, 0, 0, 0].round() - 1
    assert (indices.diff() >= 0).all(), "larger regions come from coarser maps"
    assert {0, len(strides) - 1} == {int(indices[0]), int(indices[-1])}


def test_a_tiny_first_image_does_not_decide_the_scale_of_regions():
    model = small("faster_rcnn", min_size=10, max_size=10).eval()  # padded to 32: torchvision would infer 1 for 1/4
    with torch.no_grad():
        model([torch.rand(3, 10, 10)])
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_boxes_keep_their_precision_under_bfloat16(architecture):
    model = small(architecture, min_size=512, max_size=512, score_thresh=0.0).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (output,) = model([torch.rand(3, 512, 512)])
    far = output["boxes"][(output["boxes"] > 256) & (output["boxes"] < 512)]
    assert {value.dtype for value in output.values()} == {torch.float32, torch.int64}
    assert (far % 2 != 0).float().mean() > 0.5, "bfloat16 knows no odd number over 256"


def test_cascade_heads_see_the_boxes_of_the_head_before_and_average_scores():
    model = small("cascade_rcnn", score_thresh=0.0, detections_per_img=5).eval()
    stages = model.roi_heads.stages
    seen = []
    pool = stages[0].box_roi_pool
    assert all(stage.box_roi_pool is pool for stage in stages)
    pool.register_forward_pre_hook(lambda module, args: seen.append(args[1][0]))
    for i, stage in enumerate(stages):  # each moves all boxes a tenth to the right, and is sure of another class
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        nn.init.zeros_(stage.box_predictor.cls_score.weight)
        stage.box_predictor.bbox_pred.bias.data = torch.tensor([0.1 * 10 * (i + 1), 0, 0, 0])
        stage.box_predictor.cls_score.bias.data = 50.0 * torch.eye(5)[i + 1]
    with torch.no_grad():
        (output,) = model([torch.rand(3, 64, 64)])
    for before, after in itertools.pairwise(seen):
        moved = before + 0.1 * (before[:, 2] - before[:, 0])[:, None] * torch.tensor([1.0, 0, 1, 0])
        torch.testing.assert_close(after, moved.clamp(max=64), atol=1e-3, rtol=0)
    assert len(seen) == 3
    torch.testing.assert_close(output["scores"], torch.full((5,), 1 / 3))
    images, targets = scenes(1)
    model.train()(images, targets)
    assert [stage.proposal_matcher.high_threshold for stage in stages] == [0.5, 0.6, 0.7]


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", {"name": "vit_tiny_patch16", "drop_path_rate": 0.1}])
@pytest.mark.parametrize("architecture", ["faster_rcnn", "fcos"])
def test_backbones_by_name_and_by_options(backbone, architecture):
    model = small(architecture, backbone)
    strides = [4, 8, 16, 32] if architecture == "faster_rcnn" else [8, 16, 32]
    assert model.backbone.body.strides == strides
    images, targets = scenes(1)
    sum(model(images, targets).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_options_of_the_backbone_pass_through_its_dict():
    backbone = {"name": "pvt_v2_b0", "out_indices": (0, 1), "frozen_stages": 1}
    model = small("retinanet", backbone)
    assert model.backbone.body.strides == [4, 8]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(name.startswith("backbone.body.stages.0.") for name in frozen)


def test_images_are_normalised_as_the_weights_of_the_backbone_want_it():
    body = tiny()
    body.pretrained_cfg.update(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    assert small("fcos", body).transform.image_mean == [0.5, 0.4, 0.3]
    assert small("fcos", body).transform.image_std == [0.1, 0.2, 0.3]
    assert small("fcos", body, image_mean=[0.0] * 3).transform.image_mean == [0.0] * 3


def test_images_of_other_than_three_channels_need_their_statistics():
    backbone = {"name": "pvt_v2_b0", "in_chans": 1}
    with pytest.raises(InputError, match="1 channels: give image_mean and image_std"):
        small("faster_rcnn", backbone)
    model = small("faster_rcnn", backbone, image_mean=[0.5], image_std=[0.2]).eval()
    with torch.no_grad():
        assert len(model([torch.rand(1, 40, 50)])) == 1


def test_common_names_of_options_are_torchvisions_own():
    options = {"score_thresh": 0.11, "nms_thresh": 0.22, "detections_per_img": 33}
    for model in (small("faster_rcnn", **options), small("mask_rcnn", **{f"box_{k}": v for k, v in options.items()})):
        heads = model.roi_heads
        assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.11, 0.22, 33)
    model = small("cascade_rcnn", **options, rpn_nms_thresh=0.44, box_batch_size_per_image=55)
    assert model.rpn.nms_thresh == 0.44
    for heads in model.roi_heads.stages:
        assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.11, 0.22, 33)
        assert heads.fg_bg_sampler.batch_size_per_image == 55
    model = small("retinanet", **options, topk_candidates=66)
    assert (model.score_thresh, model.nms_thresh, model.detections_per_img, model.topk_candidates) == (
        0.11,
        0.22,
        33,
        66,
    )


def test_anchor_sizes_can_be_given():
    model = small("faster_rcnn", tiny((8, 16)), anchor_sizes=[(8, 16), (32, 64), (128, 256)], aspect_ratios=(0.3, 3.0))
    assert model.rpn.anchor_generator.num_anchors_per_location() == [4, 4, 4]
    assert model.rpn.head.cls_logits.out_channels == 4


def test_a_box_predictor_can_be_replaced_as_in_torchvisions_tutorial():
    model = small("faster_rcnn")
    features = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(features, 2)
    images, targets = scenes(1)
    for target in targets:
        target["labels"] = torch.ones_like(target["labels"])
    assert model(images, targets).keys() == LOSSES["faster_rcnn"]


def test_batch_norms_of_the_backbone_are_trained_frozen_or_synchronised():
    backbone = {"name": "edgevit_xxs"}
    norms = {}
    for mode in ("train", "frozen", "sync"):
        body = small("faster_rcnn", backbone, batch_norm=mode).backbone.body
        kinds = (nn.SyncBatchNorm, nn.BatchNorm2d, FrozenBatchNorm2d)
        norms[mode] = [type(m).__name__ for m in body.modules() if isinstance(m, kinds)]
    assert len(norms["train"]) == len(norms["frozen"]) == len(norms["sync"]) > 0
    assert {mode: set(kinds) for mode, kinds in norms.items()} == {
        "train": {"BatchNorm2d"},
        "frozen": {"FrozenBatchNorm2d"},
        "sync": {"SyncBatchNorm"},
    }


def test_frozen_batch_norms_give_the_maps_of_eval_mode(randomise):
    body = randomise(build_backbone("edgevit_xxs"))
    frozen = small("faster_rcnn", copy.deepcopy(body), batch_norm="frozen").backbone.body
    images = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        expected = body(images)
        for mode in (True, False):  # DropPath is off by default, so that training differs in batch norms alone
            for ours, theirs in zip(frozen.train(mode)(images), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_frozen_batch_norms_keep_their_numbers_through_training():
    model = small("faster_rcnn", "edgevit_xxs", batch_norm="frozen")
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    images, targets = scenes(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(model(images, targets).values()).backward()
    optimizer.step()
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("architecture", ["mask_rcnn", "retinanet"])
@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "vit_tiny_patch16"])
def test_optimizer_groups_hold_every_parameter_once_with_the_backbones_layers(architecture, backbone):
    model = small(architecture, backbone)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert {scale for name, scale in scales.items() if not name.startswith("backbone.body.")} == {1.0}
    inside = {scale for name, scale in scales.items() if name.startswith("backbone.body.")}
    assert len(inside) > 8
    assert min(inside) < 0.1
    assert model.no_weight_decay() <= set(names.values())
    assert model.no_weight_decay() == {f"backbone.body.{n}" for n in model.backbone.body.no_weight_decay()}


def test_models_can_be_copied_and_pickled():
    model = small("mask_rcnn").eval()
    image = torch.rand(3, 50, 60)
    with torch.no_grad():
        (expected,) = model([image])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other([image])[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "faster_rccn"}, "did you mean 'faster_rcnn'"),
        ({"num_classes": 1}, "num_classes=1: the background counts"),
        ({"box_score_tresh": 0.1}, "did you mean 'box_score_thresh'"),
        ({"architecture": "fcos", "anchor_sizes": [(8,)]}, "fcos has no option 'anchor_sizes'"),
        ({"architecture": "retinanet", "rpn_nms_thresh": 0.7}, "retinanet has no option 'rpn_nms_thresh'"),
        ({"architecture": "cascade_rcnn", "box_fg_iou_thresh": 0.5}, "no option 'box_fg_iou_thresh'"),
        ({"mask_channels": 8}, "faster_rcnn has no option 'mask_channels'"),
        ({"score_thresh": 0.1, "box_score_thresh": 0.2}, "the same option"),
        ({"anchor_sizes": [(8,), (16,)]}, r"each of the levels of strides \[4, 8, 16, 32, 64\]"),
        ({"backbone": {"out_indices": 2}}, 'lack "name"'),
        ({"backbone": nn.Conv2d(3, 3, 1)}, "no feature_info"),
        ({"architecture": "fcos", "backbone": {"name": "pvt_v2_b0", "out_indices": (0, 3)}}, "without a gap"),
        ({"architecture": "fcos", "fpn_channels": 48}, "multiple of 32"),
        ({"batch_norm": "none"}, "batch_norm='none'"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_detector(**{"backbone": "pvt_v2_b0", "num_classes": 5, **options})


def test_unknown_backbones_are_refused_with_the_nearest_name():
    for architecture in ("faster_rcnn", "retinanet"):
        with pytest.raises(UnknownBackbone, match="did you mean 'pvt_v2_b"):
            build_detector(architecture, backbone="pvt_v2_bo", num_classes=2)


# A loop in the style of torchvision's references/detection: it knows nothing of backbones.


def train_one_epoch(model, optimizer, data_loader, device, scaler=None):
    model.train()
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=len(data_loader) - 1)
    history = []
    for images, targets in data_loader:
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in targets]
        with torch.autocast(device.type, enabled=scaler is not None):
            loss_dict = model(images, targets)
            losses = sum(loss for loss in loss_dict.values())
        assert losses.isfinite(), loss_dict
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        warmup.step()
        history.append(losses.item())
    return history


@torch.inference_mode()
def evaluate(model, data_loader, device):
    model.eval()
    results = {}
    for images, targets in data_loader:
        outputs = model([image.to(device) for image in images])
        outputs = [{k: v.cpu() for k, v in t.items()} for t in outputs]
        results.update({target["image_id"]: output for target, output in zip(targets, outputs, strict=True)})
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loop_written_for_torchvision_runs_unchanged_and_learns(architecture):
    images, targets = scenes(4)
    data_loader = [(images[i : i + 2], targets[i : i + 2]) for i in (0, 2)] * 5
    model = small(architecture, "pvt_v2_b0", num_classes=len(CLASSES))
    device = torch.device("cpu")
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    history = train_one_epoch(model, optimizer, data_loader, device)
    history += train_one_epoch(model, optimizer, data_loader, device)
    results = evaluate(model, data_loader[:2], device)
    assert statistics.median(history[-4:]) < 0.9 * statistics.median(history[:4])
    assert sorted(results) == [0, 1, 2, 3]


def test_a_backbone_that_is_built_already_is_taken_as_it_is():
    backbone = build_backbone("pvt_v2_b0", out_indices=(0, 1, 2))
    model = small("retinanet", backbone)
    assert model.backbone.body is backbone
    assert model.backbone.strides == [4, 8, 16, 32, 64]
