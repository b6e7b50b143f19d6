"""Every head of transformers on backbones of every kind, on images of two sizes: it trains, and predicts.

`pytest -m slow tests/campaign/test_heads.py -s` prints a line each.
"""

import sys
from pathlib import Path

import pytest
import torch

import backbones
from backbones import registry
from backbones.discovery import Plugin
from backbones_tasks import build_detector, build_segmenter
from backbones_tasks.models.heads import DETECTORS, HEADS

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
from small_heads import SMALL

BACKBONES = ("pvt_v2_b0", "swin_tiny", "vit_tiny_patch16", "convnext_tiny", "timm/resnet18", "mynet_s")
SIZES = ((240, 328), (333, 500))
CLASSES = 5

pytestmark = pytest.mark.slow


@pytest.fixture
def template(monkeypatch):
    """The plugin that authors start from, registered."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "plugin-template")
    monkeypatch.setattr(registry, "_local", Plugin(namespace="local", module="__main__"))
    import mynet

    for spec in mynet.register_backbones():
        backbones.register(spec)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("architecture", HEADS)
def test_a_step_and_a_prediction(architecture, backbone, template):
    images = [torch.rand(3, *size) for size in SIZES]
    found, loss, unused = (_detect if architecture in DETECTORS else _segment)(architecture, backbone, images)
    print(f"{architecture:20} {backbone:18} loss {loss:8.2f}  without gradient {len(unused)}  {found}")
    assert torch.tensor(loss).isfinite()
    assert unused == []


def _detect(architecture, backbone, images):
    sizes = {"min_size": 240, "max_size": 500}
    model = build_detector(architecture, backbone=backbone, num_classes=CLASSES, **{**SMALL[architecture], **sizes})
    boxes = torch.tensor([[20.0, 30, 200, 120], [5, 5, 90, 230]])
    losses = model(images, [{"boxes": boxes, "labels": torch.tensor([1, 4])}] * 2)
    loss, unused = _step(model, losses)
    with torch.no_grad():
        results = model.eval()(images)
    for objects, (height, width) in zip(results, SIZES, strict=True):
        assert objects["boxes"].min() >= 0
        assert (objects["boxes"].amax(0) <= torch.tensor([width, height] * 2)).all()
    return f"{[len(objects['boxes']) for objects in results]} boxes within the images", loss, unused


def _segment(architecture, backbone, images):
    model = build_segmenter(architecture, backbone=backbone, num_classes=CLASSES, **SMALL[architecture])
    batch = torch.stack([images[0], images[1][:, : SIZES[0][0], : SIZES[0][1]]])
    masks = torch.randint(0, CLASSES, (2, *SIZES[0]))
    own = hasattr(model, "losses")
    losses = model.losses(batch, masks) if own else {"ce": torch.nn.functional.cross_entropy(model(batch), masks)}
    loss, unused = _step(model, losses)
    with torch.no_grad():
        logits = [model.eval()(image[None]) for image in images]
    assert [tuple(maps.shape) for maps in logits] == [(1, CLASSES, *size) for size in SIZES]
    return f"logits {[tuple(maps.shape[2:]) for maps in logits]}", loss, unused


def _step(model, losses):
    """The loss of one step of the optimizer, and which parameters had no gradient in it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss = sum(losses.values())
    loss.backward()
    optimizer.step()
    return loss.item(), [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
