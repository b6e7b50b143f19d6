"""Vision Transformer, DeiT and DeiT III, as a plugin."""

from backbones import BackboneSpec, Weights, hookimpl

BACKBONES_API = 1

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
_INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # JAX releases scale to [-1, 1]

# name: patch size, size, parameters in millions (1000 classes), weights published for timm: tags, with the image side
# where it is not 224; the first is what pretrained=True takes
_VIT = {
    "vit_tiny_patch16": (16, "tiny", 5.72, "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k"),
    "vit_small_patch8": (8, "small", 22.06, "dino"),
    "vit_small_patch16": (
        16,
        "small",
        22.05,
        "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in1k augreg_in1k@384 augreg_in21k dino",
    ),
    "vit_small_patch32": (32, "small", 22.88, "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k"),
    "vit_base_patch8": (8, "base", 86.58, "augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in21k dino"),
    "vit_base_patch16": (
        16,
        "base",
        86.57,
        "augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in1k "
        "augreg_in1k@384 augreg_in21k orig_in21k_ft_in1k@384 orig_in21k dino mae",
    ),
    "vit_base_patch32": (
        32,
        "base",
        88.22,
        "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in1k augreg_in1k@384 augreg_in21k",
    ),
    "vit_large_patch14": (14, "large", 304.20, ""),
    "vit_large_patch16": (16, "large", 304.33, "augreg_in21k_ft_in1k augreg_in21k_ft_in1k@384 augreg_in21k mae"),
    "vit_large_patch32": (32, "large", 306.54, "orig_in21k_ft_in1k@384 orig_in21k"),
    "vit_huge_patch14": (14, "huge", 632.05, "orig_in21k mae"),
}
_DEIT = {
    "deit_tiny_patch16": (16, "tiny", 5.72, "fb_in1k"),
    "deit_small_patch16": (16, "small", 22.05, "fb_in1k"),
    "deit_base_patch16": (16, "base", 86.57, "fb_in1k fb_in1k@384"),
    "deit_tiny_distilled_patch16": (16, "tiny", 5.91, "fb_in1k"),
    "deit_small_distilled_patch16": (16, "small", 22.44, "fb_in1k"),
    "deit_base_distilled_patch16": (16, "base", 87.34, "fb_in1k fb_in1k@384"),
}
_DEIT3 = {
    "deit3_small_patch16": (16, "small", 22.06, "fb_in22k_ft_in1k fb_in22k_ft_in1k@384 fb_in1k fb_in1k@384"),
    "deit3_medium_patch16": (16, "medium", 38.85, "fb_in22k_ft_in1k fb_in1k"),
    "deit3_base_patch16": (16, "base", 86.59, "fb_in22k_ft_in1k fb_in22k_ft_in1k@384 fb_in1k fb_in1k@384"),
    "deit3_large_patch16": (16, "large", 304.37, "fb_in22k_ft_in1k fb_in22k_ft_in1k@384 fb_in1k fb_in1k@384"),
    "deit3_huge_patch14": (14, "huge", 632.13, "fb_in22k_ft_in1k fb_in1k"),
}
_TORCHVISION = {
    "vit_base_patch16": "vit_b_16",
    "vit_base_patch32": "vit_b_32",
    "vit_large_patch16": "vit_l_16",
    "vit_large_patch32": "vit_l_32",
    "vit_huge_patch14": "vit_h_14",
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """Plain vision transformers, each with a simple pyramid unless told otherwise."""
    return [
        *(_spec(name, "ViT", row, "https://arxiv.org/abs/2010.11929", {}) for name, row in _VIT.items()),
        *(
            _spec(name, "DeiT", row, "https://arxiv.org/abs/2012.12877", {"distilled": "distilled" in name})
            for name, row in _DEIT.items()
        ),
        *(
            _spec(
                name, "DeiT III", row, "https://arxiv.org/abs/2204.07118", {"no_embed_class": True, "init_values": 1e-6}
            )
            for name, row in _DEIT3.items()
        ),
    ]


def _spec(name: str, family: str, row: tuple, paper: str, defaults: dict) -> BackboneSpec:
    patch_size, size, params, weights = row
    dim, depth, heads = _SIZES[size]
    doublings = {8: (1, 0, 0, 0), 32: (3, 2, 1, 0)}.get(patch_size, (2, 1, 0, 0))  # up-sampling halves the width
    torchvision = (_TORCHVISION[name],) if name in _TORCHVISION else ()
    rows = [_weights(name, *tag.partition("@")[::2]) for tag in weights.split()]
    sides = dict.fromkeys((224, *(row.input_size[-1] for row in rows)))
    return BackboneSpec(
        name=name,
        family=family,
        entry="backbones_vit.vit:VisionTransformer",
        channels=tuple(dim >> n for n in doublings),
        strides=(4, 8, 16, 32),
        defaults={"dim": dim, "depth": depth, "heads": heads, "patch_size": patch_size, **defaults},
        weights=tuple(rows),
        aliases=(*(f"{name}_{side}" for side in sides), *torchvision),
        params=params,
        summary="plain transformer over patches; ViTDet's simple pyramid makes its maps",
        paper=paper,
        license="Apache-2.0",
    )


def _weights(name: str, tag: str, side: str) -> Weights:
    side = int(side or 224)
    return Weights(
        tag=tag if side == 224 else f"{tag}_{side}",
        source=f"hf-hub:timm/{name}_{side}.{tag}",
        input_size=(3, side, side),
        license=_LICENSES.get(tag, "Apache-2.0"),
        **(_INCEPTION if tag.startswith(("augreg", "orig")) else {}),
    )
