"""Pyramid Vision Transformer, its first version and v2, as a plugin."""

from pathlib import Path

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# variant: depths, parameters in millions (1000 classes), multiply-adds in billions (224 x 224), ImageNet top-1
_V1 = {
    "tiny": ((2, 2, 2, 2), 13.23, 1.93, 75.1),
    "small": ((3, 4, 6, 3), 24.49, 3.82, 79.8),
    "medium": ((3, 4, 18, 3), 44.21, 6.66, 81.2),
    "large": ((3, 8, 27, 3), 61.37, 9.81, 81.7),
}
# variant: dims, depths, MLP ratios, linear attention, parameters in millions (1000 classes), multiply-adds in billions
# (224 x 224), ImageNet top-1
_V2 = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2), (8, 8, 4, 4), False, 3.67, 0.57, 70.5),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2), (8, 8, 4, 4), False, 14.01, 2.11, 78.7),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3), (8, 8, 4, 4), False, 25.36, 4.03, 82.0),
    "b2_li": ((64, 128, 320, 512), (3, 4, 6, 3), (8, 8, 4, 4), True, 22.55, 3.89, 82.1),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3), (8, 8, 4, 4), False, 45.24, 6.90, 83.1),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3), (8, 8, 4, 4), False, 62.56, 10.10, 83.6),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3), (4, 4, 4, 4), False, 81.96, 11.72, 83.8),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """PVT tiny to large; PVTv2 b0 to b5 and b2 with linear attention."""
    return [
        *(
            BackboneSpec(
                name=f"pvt_{variant}",
                results=_RESULTS.get(f"pvt_{variant}", ()),
                family="PVT",
                entry="backbones_pvt.pvt:PyramidVisionTransformer",
                channels=(64, 128, 320, 512),
                strides=(4, 8, 16, 32),
                defaults={"depths": depths},
                weights=(
                    Weights(
                        tag="in1k",
                        source=f"https://github.com/whai362/PVT/releases/download/v2/pvt_{variant}.pth",
                        layout="official",
                        license="Apache-2.0",
                        classes=1000,
                        metrics={"imagenet_top1": top1},
                    ),
                ),
                params=params,
                gmacs=gmacs,
                options=("img_size", "global_pool"),
                summary="pyramid of transformer stages with position embeddings and spatially reduced attention",
                paper="https://arxiv.org/abs/2102.12122",
                license="Apache-2.0",
            )
            for variant, (depths, params, gmacs, top1) in _V1.items()
        ),
        *(
            BackboneSpec(
                name=f"pvt_v2_{variant}",
                results=_RESULTS.get(f"pvt_v2_{variant}", ()),
                family="PVTv2",
                entry="backbones_pvt.pvt_v2:PyramidVisionTransformerV2",
                channels=dims,
                strides=(4, 8, 16, 32),
                defaults={"dims": dims, "depths": depths, "mlp_ratios": mlp_ratios, "linear": linear},
                weights=(
                    Weights(
                        tag="in1k",
                        source=f"hf-hub:timm/pvt_v2_{variant}.in1k",
                        license="Apache-2.0",
                        classes=1000,
                        metrics={"imagenet_top1": top1},
                    ),
                ),
                params=params,
                gmacs=gmacs,
                summary="pyramid of transformer stages with overlapping patches and spatially reduced attention",
                paper="https://arxiv.org/abs/2106.13797",
                license="Apache-2.0",
            )
            for variant, (dims, depths, mlp_ratios, linear, params, gmacs, top1) in _V2.items()
        ),
    ]
