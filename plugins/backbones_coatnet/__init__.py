"""CoAtNet, as a plugin."""

from typing import Any

from backbones import BackboneSpec, Weights, hookimpl

BACKBONES_API = 1

# dims, depths by size
_DIMS = {
    "nano": (64, 128, 256, 512),
    "0": (96, 192, 384, 768),
    "1": (96, 192, 384, 768),
    "2": (128, 256, 512, 1024),
    "3": (192, 384, 768, 1536),
    "4": (192, 384, 768, 1536),
}
# What the variants that timm trained have in common.
_RW = {"act": "silu", "expand_output": False, "hidden_head": False}
_NANO = {**_RW, "depths": (3, 4, 6, 3), "stem": (32, 64)}
_COAT = {**_RW, "depths": (2, 6, 14, 2), "stem": (32, 64), "pre_act": True, "conv_bias": False}
_RELU = {**_COAT, "se_act": "relu"}
_EARLY = {**_RELU, "se_early": True, "shortcut_bias": False}

# variant: size, options, parameters in millions and GMACs (1000 classes), published weights: tags, with the
# image side where it is not 224; the first is what pretrained=True takes
_VARIANTS: dict[str, tuple[str, dict[str, Any], float, float, str]] = {
    "0": ("0", {"depths": (2, 3, 5, 2), "stem": (64, 64)}, 25.04, 4.55, ""),
    "1": ("1", {"depths": (2, 6, 14, 2), "stem": (64, 64)}, 42.23, 8.64, ""),
    "2": ("2", {"depths": (2, 6, 14, 2), "stem": (128, 128)}, 74.68, 16.43, ""),
    "3": ("3", {"depths": (2, 6, 14, 2), "stem": (192, 192)}, 166.97, 36.45, ""),
    "4": ("4", {"depths": (2, 12, 28, 2), "stem": (192, 192)}, 275.43, 62.32, ""),
    "nano_rw": ("nano", {**_NANO, "stride_mode": "pool"}, 15.14, 2.38, "sw_in1k"),
    "0_rw": ("0", {**_EARLY, "depths": (2, 3, 7, 2), "stride_mode": "pool"}, 27.44, 4.41, "sw_in1k"),
    "1_rw": ("1", _EARLY, 41.72, 7.99, "sw_in1k"),
    "2_rw": ("2", {**_COAT, "stem": (64, 128)}, 73.87, 15.02, "sw_in12k_ft_in1k sw_in12k"),
    "3_rw": ("3", {**_COAT, "stem": (96, 192), "init_values": 1e-6}, 165.17, 33.32, "sw_in12k"),
    "bn_0_rw": ("0", {**_EARLY, "depths": (2, 3, 7, 2), "norm": "batch"}, 27.44, 4.65, "sw_in1k"),
    "rmlp_nano_rw": ("nano", {**_NANO, "position_hidden": 384}, 15.15, 2.59, "sw_in1k"),
    "rmlp_0_rw": ("0", {**_RELU, "depths": (2, 3, 7, 2), "position_hidden": 512}, 27.45, 4.68, ""),
    "rmlp_1_rw": (
        "1",
        {**_EARLY, "stride_mode": "pool", "pool": "max", "position_hidden": 384},
        41.69,
        7.81,
        "sw_in1k",
    ),
    "rmlp_1_rw2": ("1", {**_RELU, "position_hidden": 512}, 41.72, 8.07, "sw_in12k_ft_in1k sw_in12k"),
    "rmlp_2_rw": (
        "2",
        {**_COAT, "stem": (64, 128), "position_hidden": 512, "init_values": 1e-6},
        73.88,
        15.11,
        "sw_in12k_ft_in1k sw_in12k_ft_in1k@384 sw_in1k sw_in12k",
    ),
}
# weights: ImageNet top-1
_TOP1 = {
    "coatnet_0_rw_224.sw_in1k": 82.4,
    "coatnet_1_rw_224.sw_in1k": 83.62,
    "coatnet_2_rw_224.sw_in12k_ft_in1k": 86.58,
    "coatnet_rmlp_1_rw_224.sw_in1k": 83.35,
    "coatnet_rmlp_2_rw_224.sw_in1k": 84.61,
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """CoAtNet 0 to 4, and the variants that timm trained."""
    return [_spec(variant, *row) for variant, row in _VARIANTS.items()]


def _spec(variant: str, size: str, options: dict, params: float, gmacs: float, weights: str) -> BackboneSpec:
    name = f"coatnet_{variant}"
    return BackboneSpec(
        name=name,
        family="CoAtNet",
        entry="backbones_coatnet.coatnet:CoAtNet",
        channels=_DIMS[size],
        strides=(4, 8, 16, 32),
        defaults={"dims": _DIMS[size], **options},
        weights=tuple(_weights(name, *tag.partition("@")[::2]) for tag in weights.split()),
        aliases=(f"{name}_224",),
        params=params,
        gmacs=gmacs,
        options=("img_size",),
        summary="convolutional stages, then transformer stages with relative attention over the whole map",
        paper="https://arxiv.org/abs/2106.04803",
        license="Apache-2.0",
        timm_name=f"{name}_224",
    )


def _weights(name: str, tag: str, side: str) -> Weights:
    published = f"{name}_{side or 224}.{tag}"
    scaling = {} if name == "coatnet_bn_0_rw" else {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return Weights(
        tag=f"{tag}_{side}" if side else tag,
        source=f"hf-hub:timm/{published}",
        input_size=(3, int(side or 224), int(side or 224)),
        license="Apache-2.0",
        metrics={"imagenet_top1": _TOP1[published]} if published in _TOP1 else {},
        classes=11821 if tag == "sw_in12k" else 1000,
        options={"img_size": int(side)} if side else {},
        aliases=(f"{name}_{side or 224}",),
        **scaling,
    )
