"""MobileViT and MobileViTv2, as a plugin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# variant: stem widths, dims, transformer widths, expansion, classifier width, parameters in millions (1000 classes),
# multiply-adds in billions at 224 x 224, ImageNet top-1
_V1 = {
    "xxs": ((16, 16), (24, 48, 64, 80), (64, 80, 96), 2.0, 320, 1.27, 0.3, 69.0),
    "xs": ((16, 32), (48, 64, 80, 96), (96, 120, 144), 4.0, 384, 2.32, 0.77, 74.7),
    "s": ((16, 32), (64, 96, 128, 160), (144, 192, 240), 4.0, 640, 5.58, 1.52, 78.4),
}

# variant: parameters in millions (1000 classes), multiply-adds in billions at 224 x 224 (the published form of the
# attention takes 5 % more), ImageNet top-1
_V2 = {
    "050": (1.37, 0.36, 70.2),
    "075": (2.87, 0.8, None),
    "100": (4.9, 1.41, 78.1),
    "125": (7.48, 2.19, 79.65),
    "150": (10.59, 3.15, None),
    "175": (14.25, 4.27, 80.84),
    "200": (18.45, 5.57, 81.2),
}
_IN22K = ("150", "175", "200")


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """MobileViT xxs, xs and s; MobileViTv2 050 to 200."""
    return [
        *(
            BackboneSpec(
                name=f"mobilevit_{variant}",
                results=_RESULTS.get(f"mobilevit_{variant}", ()),
                family="MobileViT",
                entry="backbones_mobilevit.mobilevit:MobileViT",
                channels=dims,
                strides=(4, 8, 16, 32),
                defaults={
                    "stem_dims": stem_dims,
                    "dims": dims,
                    "attn_dims": attn_dims,
                    "expand_ratio": expand_ratio,
                    "head_dim": head_dim,
                },
                weights=(_weights(f"mobilevit_{variant}", metrics={"imagenet_top1": top1}),),
                params=params,
                gmacs=gmacs,
                options=("patch_size",),
                summary="inverted residuals, and transformers across 2 x 2 patches from stride 8 on",
                paper="https://arxiv.org/abs/2110.02178",
                license="Apache-2.0",
            )
            for variant, (stem_dims, dims, attn_dims, expand_ratio, head_dim, params, gmacs, top1) in _V1.items()
        ),
        *(
            BackboneSpec(
                name=f"mobilevitv2_{variant}",
                results=_RESULTS.get(f"mobilevitv2_{variant}", ()),
                family="MobileViTv2",
                entry="backbones_mobilevit.mobilevit_v2:MobileViTv2",
                channels=tuple(int(variant) * dim // 100 for dim in (128, 256, 384, 512)),
                strides=(4, 8, 16, 32),
                defaults={"width": int(variant) / 100},
                weights=tuple(_v2_weights(variant, {"imagenet_top1": top1} if top1 else {})),
                params=params,
                gmacs=gmacs,
                options=("patch_size",),
                summary="inverted residuals, and attention linear in pixels from stride 8 on",
                paper="https://arxiv.org/abs/2206.02680",
                license="Apache-2.0",
            )
            for variant, (params, gmacs, top1) in _V2.items()
        ),
    ]


def _v2_weights(variant: str, metrics: Mapping[str, float]) -> list[Weights]:
    name = f"mobilevitv2_{variant}"
    rows = [_weights(name, metrics=metrics)]
    if variant in _IN22K:
        rows.append(_weights(name, "cvnets_in22k_ft_in1k"))
        rows.append(_weights(name, "cvnets_in22k_ft_in1k_384", input_size=(3, 384, 384)))
    return rows


def _weights(name: str, tag: str = "cvnets_in1k", input_size: tuple[int, int, int] = (3, 256, 256), **facts: Any):
    return Weights(
        tag=tag,
        source=f"hf-hub:timm/{name}.{tag}",
        input_size=input_size,
        mean=(0.0, 0.0, 0.0),  # images scaled to 0..1 and nothing else
        std=(1.0, 1.0, 1.0),
        license="cvnets-license",
        classes=1000,
        **facts,
    )
