"""`for_inference` of task models: what they say, faster."""

import pytest
import torch

from backbones import for_inference
from backbones.errors import InputError
from backbones_tasks import build_classifier, build_detector, build_multitask, build_segmenter

BACKBONE = "mobilevitv2_050"
BUILD = {
    "segmenter": lambda: build_segmenter(backbone=BACKBONE, num_classes=3),
    "smp": lambda: build_segmenter("smp/fpn", backbone=BACKBONE, num_classes=3),
    "classifier": lambda: build_classifier(backbone=BACKBONE, num_classes=5),
    "published classifier": lambda: build_classifier(backbone="efficientformer_l1", num_classes=5, pool=None),
}


@pytest.mark.parametrize("kind", BUILD)
def test_logits_are_those_of_the_model_at_any_size(kind, randomise):
    model = randomise(BUILD[kind]())
    fast = for_inference(model)
    low = for_inference(model, dtype=torch.bfloat16)
    for size in ((64, 64), (50, 77)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(images)
        assert (fast(images) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
        assert low(images).dtype == torch.float32
        assert 0 < (low(images) - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(InputError, match="cannot be trained"):
        fast.train()
    assert model.train().training


@pytest.mark.parametrize("architecture", ["faster_rcnn", pytest.param("fcos", marks=pytest.mark.slow)])
def test_a_detector_finds_the_same_boxes(architecture):
    model = build_detector(architecture, backbone=BACKBONE, num_classes=3, min_size=64, max_size=96, score_thresh=0.0)
    model.eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 64)]
    with torch.no_grad():
        expected = model(images)
    for found, theirs in zip(for_inference(model)(images), expected, strict=True):
        assert len(theirs["boxes"])
        torch.testing.assert_close(found["scores"], theirs["scores"], atol=1e-4, rtol=0)
    low = for_inference(model, dtype=torch.bfloat16)
    for found, theirs in zip(low(images), expected, strict=True):
        assert found["boxes"].dtype == torch.float32
        assert abs(found["scores"].max() - theirs["scores"].max()) < 0.02
    assert {p.dtype for p in low.backbone.parameters()} == {torch.bfloat16}
    heads = low.roi_heads if architecture == "faster_rcnn" else low.head
    assert {p.dtype for p in heads.parameters()} == {torch.float32}


def test_heads_that_share_a_backbone_say_the_same():
    heads = {
        "stuff": {"task": "segmentation", "num_classes": 3},
        "kind": {"task": "classification", "num_classes": 4},
        "things": {"task": "detection", "num_classes": 3, "score_thresh": 0.0, "min_size": 64, "max_size": 96},
    }
    model = build_multitask(BACKBONE, heads).eval()
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 64)]
    with torch.no_grad():
        expected = model(images)
    for dtype, tolerance in ((None, 1e-4), (torch.bfloat16, 0.1)):
        found = for_inference(model, dtype=dtype)(images)
        for ours, theirs in zip([found["kind"], *found["stuff"]], [expected["kind"], *expected["stuff"]], strict=True):
            assert (ours - theirs).abs().max() < tolerance * max(1, theirs.abs().max())
        assert len(found["things"]) == 2
