"""Vision Transformer, DeiT, DeiT III and hybrid ViT, as a plugin."""

from pathlib import Path
from typing import Any

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results, torchvision_weights, transformer_layer_decay

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# dim, depth, heads
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_LICENSES = {"mae": "CC-BY-NC-4.0"}
_CLASSES = {"augreg_in21k": 21843, "orig_in21k": 0, "dino": 0, "mae": 0}  # of the others, 1000
_INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # JAX releases scale to [-1, 1]

# name: patch size, size, parameters in millions (1000 classes), multiply-adds in billions (224 x 224), weights
# published for timm: tags, with the image side where it is not 224; the first is what pretrained=True takes
_VIT = {
    "vit_tiny_patch16": (16, "tiny", 5.72, 1.25, "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k"),
    "vit_small_patch8": (8, "small", 22.06, 22.41, "dino"),
    "vit_small_patch16": (
        16,
        "small",
        22.05,
        4.60,
        "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in1k augreg_in1k@384 augreg_in21k dino",
    ),
    "vit_small_patch32": (32, "small", 22.88, 1.14, "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k"),
    "vit_base_patch8": (8, "base", 86.58, 78.15, "augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in21k dino"),
    "vit_base_patch16": (
        16,
        "base",
        86.57,
        17.56,
        "augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in1k "
        "augreg_in1k@384 augreg_in21k orig_in21k_ft_in1k@384 orig_in21k dino mae",
    ),
    "vit_base_patch32": (
        32,
        "base",
        88.22,
        4.41,
        "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in1k augreg_in1k@384 augreg_in21k",
    ),
    "vit_large_patch14": (14, "large", 304.20, 81.01, ""),
    "vit_large_patch16": (16, "large", 304.33, 61.55, "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k mae"),
    "vit_large_patch32": (32, "large", 306.54, 15.38, "orig_in21k_ft_in1k@384 orig_in21k"),
    "vit_huge_patch14": (14, "huge", 632.05, 167.30, "orig_in21k mae"),
}
_DEIT = {
    "deit_tiny_patch16": (16, "tiny", 5.72, 1.25, "fb_in1k"),
    "deit_small_patch16": (16, "small", 22.05, 4.60, "fb_in1k"),
    "deit_base_patch16": (16, "base", 86.57, 17.56, "fb_in1k fb_in1k@384"),
    "deit_tiny_distilled_patch16": (16, "tiny", 5.91, 1.26, "fb_in1k"),
    "deit_small_distilled_patch16": (16, "small", 22.44, 4.62, "fb_in1k"),
    "deit_base_distilled_patch16": (16, "base", 87.34, 17.66, "fb_in1k fb_in1k@384"),
}
_DEIT3 = {
    "deit3_small_patch16": (16, "small", 22.06, 4.60, "fb_in1k fb_in1k@384 fb_in22k_ft_in1k fb_in22k_ft_in1k@384"),
    "deit3_medium_patch16": (16, "medium", 38.85, 7.99, "fb_in1k fb_in22k_ft_in1k"),
    "deit3_base_patch16": (16, "base", 86.59, 17.56, "fb_in1k fb_in1k@384 fb_in22k_ft_in1k fb_in22k_ft_in1k@384"),
    "deit3_large_patch16": (16, "large", 304.37, 61.55, "fb_in1k fb_in1k@384 fb_in22k_ft_in1k fb_in22k_ft_in1k@384"),
    "deit3_huge_patch14": (14, "huge", 632.13, 167.30, "fb_in1k fb_in22k_ft_in1k"),
}
# name: bottlenecks of each stage of the ResNet, then the same
_HYBRID = {
    "vit_small_r26_s32": (
        (2, 2, 2, 2),
        "small",
        36.43,
        3.46,
        "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k",
    ),
    "vit_base_r26_s32": ((2, 2, 2, 2), "base", 101.38, 6.71, ""),
    "vit_base_r50_s16": ((3, 4, 9), "base", 98.66, 21.54, "orig_in21k_ft_in1k@384 orig_in21k"),
    "vit_large_r50_s32": (
        (3, 4, 6, 3),
        "large",
        328.99,
        19.41,
        "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k",
    ),
}
_RECIPE = "https://github.com/pytorch/vision/tree/main/references/classification#"
_SWAG, _LINEAR = "https://github.com/facebookresearch/SWAG", "https://github.com/pytorch/vision/pull/5793"
# torchvision's name, and its weights, its default first: tag, file, accuracies, image side, recipe
_TORCHVISION = {
    "vit_base_patch16": (
        "ViT_B_16",
        ("IMAGENET1K_V1", "vit_b_16-c867db91", 81.072, 95.318, 224, f"{_RECIPE}vit_b_16"),
        ("IMAGENET1K_SWAG_E2E_V1", "vit_b_16_swag-9ac1b537", 85.304, 97.65, 384, _SWAG),
        ("IMAGENET1K_SWAG_LINEAR_V1", "vit_b_16_lc_swag-4e70ced5", 81.886, 96.18, 224, _LINEAR),
    ),
    "vit_base_patch32": (
        "ViT_B_32",
        ("IMAGENET1K_V1", "vit_b_32-d86f8d99", 75.912, 92.466, 224, f"{_RECIPE}vit_b_32"),
    ),
    "vit_large_patch16": (
        "ViT_L_16",
        ("IMAGENET1K_V1", "vit_l_16-852ce7e3", 79.662, 94.638, 224, f"{_RECIPE}vit_l_16"),
        ("IMAGENET1K_SWAG_E2E_V1", "vit_l_16_swag-4f3808c9", 88.064, 98.512, 512, _SWAG),
        ("IMAGENET1K_SWAG_LINEAR_V1", "vit_l_16_lc_swag-4d563306", 85.146, 97.422, 224, _LINEAR),
    ),
    "vit_large_patch32": (
        "ViT_L_32",
        ("IMAGENET1K_V1", "vit_l_32-c7638314", 76.972, 93.07, 224, f"{_RECIPE}vit_l_32"),
    ),
    "vit_huge_patch14": (
        "ViT_H_14",
        ("IMAGENET1K_SWAG_E2E_V1", "vit_h_14_swag-80465313", 88.552, 98.694, 518, _SWAG),
        ("IMAGENET1K_SWAG_LINEAR_V1", "vit_h_14_lc_swag-c1eb923e", 85.708, 97.73, 224, _LINEAR),
    ),
}
_FORMER_NAMES = {"vit_base_r50_s16_384.orig_in21k_ft_in1k": "vit_base_resnet50_384"}
# by timm's name: ImageNet-1k top-1 accuracy as its authors or timm report it
_TOP1 = {
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": 75.45,
    "vit_small_patch16_224.augreg_in21k_ft_in1k": 81.40,
    "vit_small_patch16_224.augreg_in1k": 78.84,
    "vit_small_patch32_224.augreg_in21k_ft_in1k": 76.01,
    "vit_base_patch8_224.augreg2_in21k_ft_in1k": 86.25,
    "vit_base_patch8_224.augreg_in21k_ft_in1k": 85.84,
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": 85.11,
    "vit_base_patch16_224.augreg_in21k_ft_in1k": 84.53,
    "vit_base_patch16_224.augreg_in1k": 79.15,
    "vit_base_patch32_224.augreg_in21k_ft_in1k": 80.73,
    "vit_base_patch32_224.augreg_in1k": 74.91,
    "vit_large_patch16_224.augreg_in21k_ft_in1k": 85.86,
    "deit_tiny_patch16_224.fb_in1k": 72.2,
    "deit_small_patch16_224.fb_in1k": 79.9,
    "deit_base_patch16_224.fb_in1k": 81.8,
    "deit_tiny_distilled_patch16_224.fb_in1k": 74.5,
    "deit_base_distilled_patch16_224.fb_in1k": 83.4,
    "vit_small_r26_s32_224.augreg_in21k_ft_in1k": 81.86,
    "vit_small_r26_s32_384.augreg_in21k_ft_in1k": 84.07,
    "vit_base_r50_s16_384.orig_in21k_ft_in1k": 84.99,
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """Plain vision transformers, each with a simple pyramid unless told otherwise, and hybrids of them with ResNets."""
    vit, deit, deit3 = (f"https://arxiv.org/abs/{n}" for n in ("2010.11929", "2012.12877", "2204.07118"))
    third = {"no_embed_class": True, "init_values": 1e-6}
    return [
        *(_plain(name, "ViT", row, vit, {}) for name, row in _VIT.items()),
        *(_plain(name, "DeiT", row, deit, {"distilled": "distilled" in name}) for name, row in _DEIT.items()),
        *(_plain(name, "DeiT III", row, deit3, third) for name, row in _DEIT3.items()),
        *(_hybrid(name, row, vit) for name, row in _HYBRID.items()),
    ]


def _plain(name: str, family: str, row: tuple, paper: str, defaults: dict) -> BackboneSpec:
    patch_size, size, *rest = row
    doublings = {8: (1, 0, 0, 0), 32: (3, 2, 1, 0)}.get(patch_size, (2, 1, 0, 0))  # up-sampling halves the width
    return _spec(
        name,
        *rest,
        family=family,
        entry="backbones_vit.vit:VisionTransformer",
        channels=tuple(_SIZES[size][0] >> n for n in doublings),
        defaults={**_size(size), "patch_size": patch_size, **defaults},
        options=(
            *("img_size", "interpolation", "antialias", "conv_stem", "embed_layer", "qkv_bias", "qk_scale", "qk_norm"),
            *("norm_layer", "act_layer", "pyramid", "taps", "window_size", "global_blocks", "global_pool"),
        ),
        layer_decay=transformer_layer_decay(_SIZES[size][1]),
        summary="plain transformer over patches; ViTDet's simple pyramid makes its maps",
        paper=paper,
    )


def _hybrid(name: str, row: tuple, paper: str) -> BackboneSpec:
    cnn_depths, size, *rest = row
    dim = _SIZES[size][0]
    return _spec(
        name,
        *rest,
        family="Hybrid ViT",
        entry="backbones_vit.hybrid:HybridVisionTransformer",
        channels=(256, 512, 1024 if len(cnn_depths) == 4 else dim, dim),
        defaults={**_size(size), "cnn_depths": cnn_depths},
        options=("pyramid", "global_pool"),
        summary="transformer over the last map of a ResNet, whose stages are the pyramid's fine maps",
        paper=paper,
    )


def _size(size: str) -> dict[str, int]:
    return dict(zip(("dim", "depth", "heads"), _SIZES[size], strict=True))


def _spec(name: str, params: float, gmacs: float, weights: str, **fields: Any) -> BackboneSpec:
    rows = (_weights(name, *tag.partition("@")[::2]) for tag in weights.split())
    return BackboneSpec(
        name=name,
        results=_RESULTS.get(name, ()),
        strides=(4, 8, 16, 32),
        weights=(*rows, *_torchvision(name)),
        aliases=(f"{name}_224",),
        params=params,
        gmacs=gmacs,
        license="Apache-2.0",
        timm_name=f"{name}_224",
        **fields,
    )


def _weights(name: str, tag: str, side: str) -> Weights:
    published = f"{name}_{side or 224}.{tag}"
    former = _FORMER_NAMES.get(published)
    return Weights(
        tag=f"{tag}_{side}" if side else tag,
        source=f"hf-hub:timm/{published}",
        input_size=(3, int(side or 224), int(side or 224)),
        license=_LICENSES.get(tag, "Apache-2.0"),
        metrics={"imagenet_top1": _TOP1[published]} if published in _TOP1 else {},
        classes=_CLASSES.get(tag, 1000),
        options={"img_size": int(side)} if side else {},
        aliases=(f"{name}_{side or 224}", *([former] if former else ())),
        **(_INCEPTION if tag.startswith(("augreg", "orig")) else {}),
    )


def _torchvision(name: str) -> list[Weights]:
    model, *rows = _TORCHVISION.get(name, ("",))
    return [
        torchvision_weights(
            f"{model}_Weights.{tag}",
            *facts,
            recipe,
            side,
            interpolation="bicubic" if "SWAG" in tag else "bilinear",
            options={"interpolation": "torchvision", **({"img_size": side} if side != 224 else {})},
            aliases=(model.lower(),),
        )
        for tag, *facts, side, recipe in rows
    ]
