"""Cascade R-CNN: box heads in a row, on torchvision's Faster R-CNN."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import clip_boxes_to_image

from .base import Detector


class CascadeRCNN(Detector, detection.FasterRCNN):
    """torchvision's Faster R-CNN with a cascade of box heads; see `build_detector` and `CascadeHeads`.

    Args:
        backbone: a `FeaturePyramid`
        num_classes: number of classes, the background included
        box_channels: width of each head
        options: of torchvision's FasterRCNN
    """

    def __init__(self, backbone: nn.Module, num_classes: int, box_channels: int, **options: Any):
        super().__init__(backbone, box_head=nn.Identity(), box_predictor=nn.Identity(), **options)
        like = self.roi_heads  # torchvision's, which tells what the options were
        inputs = backbone.out_channels * math.prod(like.box_roi_pool.output_size)
        self.roi_heads = CascadeHeads(
            RoIHeads(
                like.box_roi_pool,
                TwoMLPHead(inputs, box_channels),
                ClassAgnosticPredictor(box_channels, num_classes),
                fg_iou_thresh=iou,
                bg_iou_thresh=iou,
                batch_size_per_image=like.fg_bg_sampler.batch_size_per_image,
                positive_fraction=like.fg_bg_sampler.positive_fraction,
                bbox_reg_weights=weights,
                score_thresh=like.score_thresh,
                nms_thresh=like.nms_thresh,
                detections_per_img=like.detections_per_img,
            )
            for iou, weights in zip(CascadeHeads.IOUS, CascadeHeads.BOX_WEIGHTS, strict=True)
        )


class CascadeHeads(nn.Module):
    """Box heads in a row, each on the boxes of the one before and for a stricter overlap.

    Cascade R-CNN, Cai and Vasconcelos, https://arxiv.org/abs/1712.00726. Called as torchvision's RoIHeads are. Scores
    are the mean over the heads, boxes those of the last.

    Args:
        stages: torchvision's RoIHeads with class-agnostic boxes
    """

    IOUS = (0.5, 0.6, 0.7)
    BOX_WEIGHTS = tuple((10.0 * i, 10.0 * i, 5.0 * i, 5.0 * i) for i in (1, 2, 3))
    LOSS_WEIGHTS = (1.0, 0.5, 0.25)

    def __init__(self, stages: Iterable[RoIHeads]):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, in eval mode, and losses, in training mode, of the RPN's proposals."""
        losses, probabilities = {}, []
        for i, stage in enumerate(self.stages):
            if self.training:
                proposals, _, labels, offsets = stage.select_training_samples(proposals, targets)
            regions = stage.box_roi_pool(features, proposals, image_shapes)
            logits, deltas = stage.box_predictor(stage.box_head(regions))
            if self.training:
                parts = fastrcnn_loss(logits, deltas, labels, offsets)
                for name, part in zip(("loss_classifier", "loss_box_reg"), parts, strict=True):
                    losses[f"{name}_{i + 1}"] = self.LOSS_WEIGHTS[i] * part
            else:
                probabilities.append(logits.softmax(-1))
            if i + 1 < len(self.stages):
                proposals = self._refine(stage, deltas, proposals, image_shapes)
        if self.training:
            return [], losses
        mean = torch.stack(probabilities).mean(0).log()  # torchvision takes the softmax, which gives the mean again
        found = self.stages[-1].postprocess_detections(mean, deltas, proposals, image_shapes)
        return [{"boxes": b, "labels": n, "scores": s} for b, s, n in zip(*found, strict=True)], {}

    @staticmethod
    def _refine(
        stage: RoIHeads, deltas: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Tensor]:
        boxes = stage.box_coder.decode(deltas[:, :4].detach(), proposals).reshape(-1, 4)
        parts = boxes.split([len(p) for p in proposals])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]


class ClassAgnosticPredictor(FastRCNNPredictor):
    """torchvision's FastRCNNPredictor with one box per region, whatever its class.

    Args:
        in_channels: width of the features
        num_classes: number of classes, the background included
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().forward(x)
        return scores, boxes.repeat(1, scores.shape[1])
