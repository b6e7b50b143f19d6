"""Heads of transformers on any backbone: torchvision's interface, any rectangle, transformers' own losses."""

import copy

import pytest
import torch
import transformers
from small_heads import SMALL
from timm.optim import create_optimizer_v2
from torch import nn

from backbones import for_inference, wrap
from backbones.errors import InputError
from backbones_tasks import build_detector, build_multitask, build_segmenter, from_pretrained
from backbones_tasks.models.heads import DETECTORS, SEGMENTERS

BACKBONE = "timm/test_resnet"
CLASSES = 4


def detector(architecture, backbone=BACKBONE, **options):
    sizes = {"min_size": 64, "max_size": 96}
    return build_detector(
        architecture, backbone=backbone, num_classes=CLASSES, **{**SMALL[architecture], **sizes, **options}
    )


def segmenter(architecture, backbone=BACKBONE, num_classes=CLASSES, **options):
    return build_segmenter(
        architecture, backbone=backbone, num_classes=num_classes, **{**SMALL[architecture], **options}
    )


def pair():
    """Two images of different sizes, of which one shows nothing."""
    images = [torch.rand(3, 60, 82), torch.rand(3, 80, 51)]
    boxes = torch.tensor([[10.0, 10, 50, 60], [5, 5, 20, 40]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    return images, [full, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]


def learning(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("architecture", DETECTORS)
def test_a_detector_trains_and_predicts_on_images_of_two_sizes(architecture):
    model, (images, targets) = detector(architecture), pair()
    seen = []
    model.hf.register_forward_hook(lambda module, inputs, output: seen.append(output.loss))
    losses = model(images, targets)
    total = sum(losses.values())
    torch.testing.assert_close(total, seen[0], rtol=1e-5, atol=0)
    assert sum("_0" in name for name in losses) >= 3, "there is one of each for the first decoder layer"
    total.backward()
    assert learning(model) == []
    with torch.no_grad():
        found = model.eval()(images)
    for image, objects in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        assert objects["boxes"].shape == (len(objects["scores"]), 4)
        assert objects["boxes"].min() >= 0
        assert (objects["boxes"].amax(0) <= torch.tensor([width, height] * 2)).all()
        assert objects["labels"].min() >= 1
        assert objects["labels"].max() < CLASSES
        assert (objects["scores"].diff() <= 0).all()


@pytest.mark.parametrize("architecture", ["hf/detr", "hf/deformable_detr", "hf/rt_detr_v2", "hf/d_fine", "hf/rf_detr"])
def test_images_without_objects_give_every_parameter_a_gradient(architecture):
    """DistributedDataParallel waits for all of them."""
    model, (images, (_, empty)) = detector(architecture), pair()
    sum(model(images, [empty, empty]).values()).backward()
    assert learning(model) == []


@pytest.mark.parametrize("architecture", ["hf/rt_detr_v2", "hf/rf_detr", "hf/mask2former"])
def test_mixed_precision_trains_and_predicts(architecture):
    """In bfloat16, which is what `fit` takes on a GPU."""
    detects = architecture in DETECTORS
    model = detector(architecture) if detects else segmenter(architecture)
    images, targets = pair() if detects else (torch.rand(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        sum(losses.values()).backward()
        said = model.eval()(images)
    assert torch.stack(list(losses.values())).isfinite().all()
    assert (said[0]["boxes"].dtype == torch.float32) if detects else said.isfinite().all()


@pytest.mark.parametrize("architecture", ["hf/detr", "hf/rt_detr_v2"])
def test_boxes_are_put_where_the_image_has_them(architecture):
    """What is said of an image are its own pixels, whatever it is resized and padded to."""
    model, (images, targets) = detector(architecture), pair()
    given = {}
    model.hf.register_forward_pre_hook(lambda module, inputs, named: given.update(named), with_kwargs=True)
    model(images, targets)
    (height, width), boxes = images[0].shape[-2:], given["labels"][0]["boxes"]
    mask, label = given["pixel_mask"][0], given["labels"][0]["class_labels"]
    seen = mask.any(1).sum(), mask.any(0).sum()
    scale = torch.stack(seen) / torch.tensor([height, width])
    frame = torch.stack(seen) if model.head.sees_padding else torch.tensor(mask.shape)
    centres = targets[0]["boxes"].view(-1, 2, 2).mean(1)
    torch.testing.assert_close(boxes[:, :2] * frame.flip(0), centres * scale.flip(0))
    assert label.tolist() == [0, 2]
    output = type("Output", (), {"logits": torch.zeros(1, 2, CLASSES), "pred_boxes": boxes[None]})
    model.eval()
    scales = [frame.flip(0).repeat(2).float()]
    found = model.transform.postprocess(model._found(output, scales, [tuple(seen)]), [tuple(seen)], [(height, width)])
    back = {tuple(box.round().int().tolist()) for box in found[0]["boxes"]}
    assert back == {(10, 10, 50, 60), (5, 5, 20, 40)}


@pytest.mark.parametrize("architecture", SEGMENTERS)
def test_a_segmenter_trains_and_labels_any_rectangle(architecture):
    model, images = segmenter(architecture), torch.rand(2, 3, 61, 90)
    masks = torch.randint(0, CLASSES, (2, 61, 90))
    masks[1] = 255  # nothing to learn from
    losses = model.losses(images, masks) if hasattr(model, "losses") else {"loss": model(images).square().mean()}
    sum(losses.values()).backward()
    assert learning(model) == []
    with torch.no_grad():
        logits = model.eval()(images)
        assert model(torch.rand(1, 3, 1, 70)).shape == (1, CLASSES, 1, 70)
    assert logits.shape == (2, CLASSES, 61, 90)
    assert logits.isfinite().all()


def test_masks_are_labelled_as_transformers_does_it():
    model, images = segmenter("hf/mask2former").eval(), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        ours = model(images).argmax(1)
        output = model.hf(images)
    processor = transformers.Mask2FormerImageProcessorPil()
    theirs = processor.post_process_semantic_segmentation(output, target_sizes=[(64, 96)] * 2)
    agreement = (torch.stack(theirs) == ours).float().mean()
    assert agreement > 0.9, "they resize masks to 384 x 384 in between"


def test_a_single_class_has_one_logit_whose_sign_is_the_answer():
    model, images = segmenter("hf/mask2former", num_classes=1), torch.rand(1, 3, 64, 64)
    masks = torch.zeros(1, 64, 64, dtype=torch.long)
    given = {}
    model.hf.criterion.register_forward_pre_hook(lambda module, inputs, named: given.update(named), with_kwargs=True)
    masks[0, :8] = 1
    model.losses(images, masks)
    assert [labels.tolist() for labels in given["class_labels"]] == [[0]]
    assert given["mask_labels"][0].sum() == 8 * 64
    assert model.eval()(images).shape == (1, 1, 64, 64)


def test_upernet_trains_on_a_single_image():
    model = segmenter("hf/upernet", aux=True)
    logits, aux = model(torch.rand(1, 3, 64, 64))
    assert logits.shape == aux.shape == (1, CLASSES, 64, 64)


@pytest.mark.parametrize("architecture", ["hf/deformable_detr", "hf/rt_detr_v2", "hf/rf_detr", "hf/mask2former"])
def test_saved_copied_and_made_fast_it_says_the_same(architecture, tmp_path):
    build = detector if architecture in DETECTORS else segmenter
    model = build(architecture, {"name": BACKBONE, "frozen_stages": 1}).eval()
    images = pair()[0] if architecture in DETECTORS else torch.rand(2, 3, 60, 82)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    with torch.no_grad():
        raw = said(model, images)
        assert torch.equal(said(copy.deepcopy(model), images), raw)
        assert torch.equal(said(loaded, images), raw)
        torch.testing.assert_close(said(for_inference(model), images), raw, rtol=1e-3, atol=1e-4)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == frozen


@pytest.mark.parametrize("architecture", SEGMENTERS)
def test_a_part_that_is_replaced_is_the_one_that_runs(architecture):
    """LoRA and quantisation put layers of their own in the place of convolutions and linear layers."""
    model, images = segmenter(architecture).eval(), torch.rand(1, 3, 64, 64)
    called, layers = set(), {}
    for name, module in list(model.hf.named_modules()):
        if type(module) in (nn.Conv2d, nn.Linear) and ".backbone." not in name:
            layers[name] = copy.deepcopy(module)
            layers[name].register_forward_hook(lambda module, inputs, output, name=name: called.add(name))
            model.hf.set_submodule(name, layers[name])
    with torch.no_grad():
        model(images)
    assert layers.keys() == called | {name for name in layers if name.startswith("auxiliary_head")}


def said(model, images):
    """What transformers' model says, whose order the ties of what is drawn at random do not change."""
    outputs = []
    handle = model.hf.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(images)
    handle.remove()
    return outputs[0].logits if hasattr(outputs[0], "logits") else outputs[0].masks_queries_logits


def test_layers_of_the_backbone_have_rates_of_their_own():
    model = detector("hf/rt_detr_v2")
    groups = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5).param_groups
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    inside = {p for name, p in model.named_parameters() if name.startswith(model.backbone_path)}
    assert {scale for p, scale in scales.items() if p not in inside} == {1.0}
    assert max(scale for p, scale in scales.items() if p in inside) < 1.0
    assert set(model.backbone_parameters()) == inside == set(model.inner_backbone.parameters())


@pytest.mark.parametrize("architecture", ["hf/rt_detr", "hf/rf_detr"])
def test_an_image_smaller_than_the_queries_are_many_is_padded(architecture):
    model = detector(architecture, num_queries=100, min_size=32, max_size=32).eval()
    with torch.no_grad():
        assert len(model([torch.rand(3, 32, 20)])[0]["boxes"]) == 100


def test_heads_share_a_backbone_with_others():
    boxes, masks = SMALL["hf/rt_detr_v2"], SMALL["hf/mask2former"]
    model = build_multitask(
        backbone=BACKBONE,
        heads={
            "boxes": {"task": "detection", "architecture": "hf/rt_detr_v2", "num_classes": CLASSES, **boxes},
            "pixels": {"task": "segmentation", "architecture": "hf/mask2former", "num_classes": CLASSES, **masks},
        },
        image_size=96,
    )
    images, targets = pair()
    losses = model.heads["boxes"](images, targets)
    losses |= model.heads["pixels"].losses(torch.rand(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64)))
    sum(losses.values()).backward()
    assert learning(model) == []
    model.eval()
    with torch.no_grad():
        together = model(images)
        alone = model.heads["boxes"](images)
        assert [logits.shape for logits in together["pixels"]] == [(CLASSES, *image.shape[-2:]) for image in images]
        for a, b in zip(together["boxes"], alone, strict=True):
            torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-3, atol=1e-4)
        model.heads["boxes"].hf.config.num_queries = 1000
        with pytest.raises(InputError, match=r"more than the pass that serves all heads has seen.*fewer num_queries"):
            model(images)


def test_norms_of_the_backbone_are_as_they_are_asked_for():
    kinds = {
        kind: {type(m) for m in detector("hf/detr", batch_norm=kind).inner_backbone.modules()}
        for kind in ("train", "frozen", "sync")
    }
    assert nn.BatchNorm2d in kinds["train"]
    assert not any(issubclass(cls, nn.modules.batchnorm._BatchNorm) for cls in kinds["frozen"])
    assert nn.SyncBatchNorm in kinds["sync"]


class Sparse(nn.Module):
    def forward(self, images):
        return [
            images.new_zeros(len(images), 4, *(-(-side // stride) for side in images.shape[-2:])) for stride in (8, 32)
        ]


def test_what_cannot_work_is_an_error_that_names_it():
    with pytest.raises(InputError, match=r"hf/rt_detr has no option 'num_querys'; did you mean 'num_queries'"):
        detector("hf/rt_detr", num_querys=3)
    with pytest.raises(InputError, match=r"hf/detr has no option 'fpn_channels'"):
        detector("hf/detr", fpn_channels=64)
    with pytest.raises(InputError, match=r"unknown architecture 'hf/rtdetr'; did you mean 'hf/rt_detr'"):
        build_detector("hf/rtdetr", backbone=BACKBONE, num_classes=2)
    with pytest.raises(InputError, match=r"hf/rt_detr with .*num_queries.*many"):
        detector("hf/rt_detr", num_queries="many")
    sparse = wrap(Sparse(), channels=(4, 4), strides=(8, 32))
    with pytest.raises(InputError, match=r"hf/rt_detr needs maps whose strides double .* strides \[8, 32\]"):
        detector("hf/rt_detr", backbone=sparse)
    with pytest.raises(InputError, match=r"hf/mask2former needs maps of strides \[4, 8, 16, 32\].*\[8, 16\]"):
        segmenter("hf/mask2former", {"name": BACKBONE, "out_indices": (1, 2)})
    with pytest.raises(InputError, match=r"hf/mask2former has no option 'num_querie'"):
        segmenter("hf/mask2former", num_querie=3)
    model, (images, targets) = detector("hf/detr"), pair()
    with pytest.raises(InputError, match=r"needs targets; call eval\(\)"):
        model(images)
    targets[0]["boxes"][1, 2] = 5
    with pytest.raises(InputError, match=r"target 0: the box \[5.0, 5.0, 5.0, 40.0\] has no area"):
        model(images, targets)


@pytest.mark.parametrize(
    ("architecture", "model", "kind", "stages"),
    [
        ("hf/rt_detr_v2", "RTDetrV2", "rt_detr_resnet", [2, 3, 4]),
        ("hf/mask2former", "Mask2Former", "resnet", [1, 2, 3, 4]),
    ],
)
def test_with_transformers_own_backbone_it_says_what_transformers_says(architecture, model, kind, stages):
    """The same weights under our contract and our bridge, and without them."""
    sizes = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "layer_type": "basic", "embedding_size": 16}
    backbone = {"name": f"transformers/{kind}", "config": sizes}
    build = detector if architecture in DETECTORS else segmenter
    ours = build(architecture, backbone).hf.eval()
    config = copy.deepcopy(ours.config)
    config.backbone_config = transformers.AutoConfig.for_model(kind, **sizes, out_indices=stages)
    theirs = type(ours)(config).eval()
    assert type(ours).__name__.startswith(model)
    state = {name.replace(".backbone.body.", "."): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        a, b = ours(images), theirs(images)
    for name in ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits"):
        if name in b:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)  # ours run channels-last
