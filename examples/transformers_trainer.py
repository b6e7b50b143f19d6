"""transformers' Trainer on Mask2Former with a backbone of ours: 20 steps on images drawn on the fly.

pip install 'dense-backbones[transformers]' accelerate; python examples/transformers_trainer.py
"""

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Trainer, TrainingArguments

from backbones_tasks.data.shapes import CLASSES, draw_scene
from backbones_tasks.transformers import DenseBackboneConfig


def example(seed: int) -> dict[str, torch.Tensor]:
    scene = draw_scene(seed, 128)
    return {
        "pixel_values": torch.from_numpy(scene.image).permute(2, 0, 1) / 255,
        "mask_labels": torch.from_numpy(scene.masks).float(),
        "class_labels": torch.from_numpy(scene.labels) - 1,
    }


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, object]:
    batch = {name: [each[name] for each in examples] for name in examples[0]}
    return {**batch, "pixel_values": torch.stack(batch["pixel_values"])}


backbone = DenseBackboneConfig(name="pvt_v2_b0", options={"drop_path_rate": 0.1})
sizes = {"hidden_dim": 128, "feature_size": 128, "mask_feature_size": 128, "decoder_layers": 4, "num_queries": 20}
config = Mask2FormerConfig(backbone_config=backbone, num_labels=len(CLASSES) - 1, train_num_points=1024, **sizes)
model = Mask2FormerForUniversalSegmentation(config)
told = {"learning_rate": 3e-4, "logging_steps": 5, "report_to": "none", "remove_unused_columns": False}
arguments = TrainingArguments("runs/trainer", max_steps=20, per_device_train_batch_size=4, **told)
Trainer(model, arguments, train_dataset=[example(i) for i in range(80)], data_collator=collate).train()
model.save_pretrained("runs/trainer/model")
loaded = Mask2FormerForUniversalSegmentation.from_pretrained("runs/trainer/model")
same = all(map(torch.equal, model.cpu().state_dict().values(), loaded.state_dict().values()))
print("every weight saved and loaded without a difference:", same)
