"""ConvNeXt, as a plugin."""

from pathlib import Path

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results, torchvision_weights

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# variant: dims, depths, parameters in millions (1000 classes), GMACs at 224 x 224
_VARIANTS = {
    "tiny": ((96, 192, 384, 768), (3, 3, 9, 3), 28.59, 4.46),
    "small": ((96, 192, 384, 768), (3, 3, 27, 3), 50.22, 8.68),
    "base": ((128, 256, 512, 1024), (3, 3, 27, 3), 88.59, 15.35),
    "large": ((192, 384, 768, 1536), (3, 3, 27, 3), 197.77, 34.36),
    "xlarge": ((256, 512, 1024, 2048), (3, 3, 27, 3), 350.20, 60.92),
}

# Weights published for timm; the first is what pretrained=True takes.
_FACEBOOK = "fb_in22k_ft_in1k fb_in22k_ft_in1k_384 fb_in22k"
_TIMM = "in12k_ft_in1k in12k_ft_in1k_384 in12k"
_DENSE = "dinov3_lvd1689m eupe_lvd1689m"
_CLIP = (
    "clip_laion2b_augreg_ft_in12k_in1k clip_laion2b_augreg_ft_in12k_in1k_384 clip_laion2b_augreg_ft_in1k "
    "clip_laiona_augreg_ft_in1k_384 clip_laion2b_augreg_ft_in12k clip_laion2b clip_laion2b_augreg clip_laiona "
    "clip_laiona_320 clip_laiona_augreg_320"
)
_TAGS = {
    "tiny": f"{_TIMM} {_FACEBOOK} fb_in1k {_DENSE}",
    "small": f"{_TIMM} {_FACEBOOK} fb_in1k {_DENSE}",
    "base": f"{_FACEBOOK} fb_in1k {_CLIP} {_DENSE}",
    "large": f"{_FACEBOOK} fb_in1k dinov3_lvd1689m",
    "xlarge": _FACEBOOK,
}
_RECIPE = "https://github.com/pytorch/vision/tree/main/references/classification#convnext"
# torchvision's weights: file, accuracies
_TORCHVISION = {
    "tiny": ("convnext_tiny-983f1562", 82.52, 96.146),
    "small": ("convnext_small-0c510722", 83.616, 96.65),
    "base": ("convnext_base-6075fbad", 84.062, 96.87),
    "large": ("convnext_large-ea097f82", 84.414, 96.976),
}
_TOP1 = {
    ("tiny", "fb_in1k"): 82.1,
    ("small", "fb_in1k"): 83.1,
    ("base", "fb_in1k"): 83.8,
    ("xlarge", "fb_in22k_ft_in1k"): 87.0,
}
_LICENSES = {"dinov3_lvd1689m": "dinov3-license", "eupe_lvd1689m": "fair-noncommercial-research-license"}
_CLIP_NORM = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """ConvNeXt tiny to xlarge."""
    return [
        BackboneSpec(
            name=f"convnext_{variant}",
            results=_RESULTS.get(f"convnext_{variant}", ()),
            family="ConvNeXt",
            entry="backbones_convnext.convnext:ConvNeXt",
            channels=dims,
            strides=(4, 8, 16, 32),
            defaults={"dims": dims, "depths": depths},
            weights=(*(_weights(variant, tag) for tag in _TAGS[variant].split()), *_torchvision(variant)),
            params=params,
            gmacs=gmacs,
            options=("layer_scale",),
            layer_decay=0.95,  # per block; the official dense code decays by 0.7 to 0.95 over 6 or 12 groups of them
            summary="convolutional pyramid: depth-wise 7 x 7 convolutions and channel MLPs",
            paper="https://arxiv.org/abs/2201.03545",
            license="Apache-2.0",
        )
        for variant, (dims, depths, params, gmacs) in _VARIANTS.items()
    ]


def _weights(variant: str, tag: str) -> Weights:
    side = 256 if tag.startswith(("clip", "eupe")) else 224
    last = tag.rpartition("_")[2]
    side = int(last) if last.isdigit() else side
    return Weights(
        tag=tag,
        source=f"hf-hub:timm/convnext_{variant}.{tag}",
        input_size=(3, side, side),
        license=_LICENSES.get(tag, "Apache-2.0"),
        metrics={"imagenet_top1": _TOP1[variant, tag]} if (variant, tag) in _TOP1 else {},
        classes=_classes(tag),
        **(_CLIP_NORM if tag.startswith("clip") else {}),
    )


def _torchvision(variant: str) -> list[Weights]:
    if variant not in _TORCHVISION:
        return []
    return [torchvision_weights(f"ConvNeXt_{variant.title()}_Weights.IMAGENET1K_V1", *_TORCHVISION[variant], _RECIPE)]


def _classes(tag: str) -> int:
    if tag.endswith("lvd1689m"):
        return 0
    if tag.startswith("clip") and "_ft_" not in tag:
        return 640  # the width of CLIP's embeddings
    return 11821 if tag.endswith("in12k") else 21841 if tag.endswith("in22k") else 1000
