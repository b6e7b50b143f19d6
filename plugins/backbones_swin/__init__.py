"""Swin Transformer, as a plugin."""

from pathlib import Path

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results, torchvision_weights

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# variant: dims, depths, heads, parameters in millions (1000 classes), GMACs at 224 x 224
_VARIANTS = {
    "tiny": ((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), 28.29, 4.49),
    "small": ((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), 49.61, 8.74),
    "base": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), 87.77, 15.43),
    "large": ((192, 384, 768, 1536), (2, 2, 18, 2), (6, 12, 24, 48), 196.53, 34.48),
}
# Weights published for timm with windows of 7; the first is what pretrained=True takes.
_TAGS = {
    "tiny": "ms_in1k ms_in22k_ft_in1k ms_in22k",
    "small": "ms_in22k_ft_in1k ms_in1k ms_in22k",
    "base": "ms_in22k_ft_in1k ms_in1k ms_in22k",
    "large": "ms_in22k_ft_in1k ms_in22k",
}
_RECIPE = "https://github.com/pytorch/vision/tree/main/references/classification#swintransformer"
# torchvision's weights: file, accuracies
_TORCHVISION = {
    "tiny": ("swin_t-704ceda3", 81.474, 95.776),
    "small": ("swin_s-5e29d889", 83.196, 96.36),
    "base": ("swin_b-68c6b09e", 83.582, 96.64),
}
_TOP1 = {
    ("tiny", "ms_in1k"): 81.2,
    ("small", "ms_in1k"): 83.2,
    ("base", "ms_in1k"): 83.5,
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """Swin tiny to large."""
    return [
        BackboneSpec(
            name=f"swin_{variant}",
            results=_RESULTS.get(f"swin_{variant}", ()),
            family="Swin",
            entry="backbones_swin.swin:SwinTransformer",
            channels=dims,
            strides=(4, 8, 16, 32),
            defaults={"dims": dims, "depths": depths, "heads": heads},
            weights=(*(_weights(variant, tag) for tag in _TAGS[variant].split()), *_torchvision(variant)),
            aliases=(f"swin_{variant}_patch4_window7_224",),
            params=params,
            gmacs=gmacs,
            options=("window_size", "ape", "patch_norm"),
            summary="pyramid of transformer stages that attend within windows, shifted in every other block",
            paper="https://arxiv.org/abs/2103.14030",
            license="Apache-2.0",
        )
        for variant, (dims, depths, heads, params, gmacs) in _VARIANTS.items()
    ]


def _weights(variant: str, tag: str) -> Weights:
    return Weights(
        tag=tag,
        source=f"hf-hub:timm/swin_{variant}_patch4_window7_224.{tag}",
        license="MIT",
        metrics={"imagenet_top1": _TOP1[variant, tag]} if (variant, tag) in _TOP1 else {},
        classes=21841 if tag.endswith("in22k") else 1000,
    )


def _torchvision(variant: str) -> list[Weights]:
    if variant not in _TORCHVISION:
        return []
    file, *accuracies = _TORCHVISION[variant]
    enum = f"Swin_{variant[0].upper()}_Weights.IMAGENET1K_V1"
    alias = f"swin_{variant[0]}"
    return [torchvision_weights(enum, file, *accuracies, _RECIPE, interpolation="bicubic", aliases=(alias,))]
