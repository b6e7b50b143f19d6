"""EfficientFormer, as a plugin."""

from pathlib import Path

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# variant: dims, depths, attention blocks, parameters in millions (1000 classes, both heads), GMACs, ImageNet top-1
_VARIANTS = {
    "l1": ((48, 96, 224, 448), (3, 2, 6, 4), 1, 12.29, 1.29, 80.50),
    "l3": ((64, 128, 320, 512), (4, 4, 12, 6), 4, 31.41, 3.91, None),
    "l7": ((96, 192, 384, 768), (6, 6, 18, 8), 8, 82.23, 10.12, 83.3),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """EfficientFormer l1, l3 and l7."""
    return [
        BackboneSpec(
            name=f"efficientformer_{variant}",
            results=_RESULTS.get(f"efficientformer_{variant}", ()),
            family="EfficientFormer",
            entry="backbones_efficientformer.efficientformer:EfficientFormer",
            channels=dims,
            strides=(4, 8, 16, 32),
            defaults={"dims": dims, "depths": depths, "attention_blocks": attention_blocks},
            weights=(
                Weights(
                    tag="snap_dist_in1k",
                    source=f"hf-hub:timm/efficientformer_{variant}.snap_dist_in1k",
                    license="Apache-2.0",
                    classes=1000,
                    metrics={"imagenet_top1": top1} if top1 else {},
                ),
            ),
            params=params,
            gmacs=gmacs,
            summary="pooling and 1x1 convolutions with batch norms, attention at stride 32 alone; two heads",
            paper="https://arxiv.org/abs/2206.01191",
            license="Apache-2.0",
        )
        for variant, (dims, depths, attention_blocks, params, gmacs, top1) in _VARIANTS.items()
    ]
