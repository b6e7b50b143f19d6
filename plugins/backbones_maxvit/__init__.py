"""MaxViT, as a plugin."""

from pathlib import Path
from typing import Any

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results, torchvision_weights

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

_NARROW = (64, 128, 256, 512)
_WIDE = (96, 192, 384, 768)
# What the variants that timm trained have in common.
_RW = {
    "stem": (32, 64),
    "stem_bias": (False, False),
    "act": "silu",
    "mlp_act": "gelu",
    "expand_output": False,
    "se_ratio": 1 / 16,
    "conv_bias": False,
    "conv_eps": 1e-5,
    "eps": 1e-6,
    "same": False,
    "heads_first": True,
    "hidden_head": False,
}
_RMLP = {**_RW, "position_hidden": 512}
_TORCHVISION = {
    "stem_bias": (False, True),
    "act": "gelu",
    "mlp_act": "gelu",
    "pool": "avg3",
    "project": True,
    "same": False,
    "scale_by_dim": True,
    "head_bias": False,
}

# variant: dims, depths, further options, parameters in millions and GMACs (1000 classes), weights published for timm:
# tags with the image side; the first is what pretrained=True takes
_VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], float, float, str]] = {
    "tiny": (_NARROW, (2, 2, 5, 2), {}, 30.92, 5.55, "in1k@224 in1k@384 in1k@512"),
    "small": (_WIDE, (2, 2, 5, 2), {}, 68.93, 11.58, "in1k@224 in1k@384 in1k@512"),
    "base": (
        _WIDE,
        (2, 6, 14, 2),
        {},
        119.47,
        23.90,
        "in1k@224 in1k@384 in1k@512 in21k_ft_in1k@384 in21k_ft_in1k@512 in21k@224",
    ),
    "large": (
        (128, 256, 512, 1024),
        (2, 6, 14, 2),
        {"stem": (128, 128)},
        211.79,
        43.49,
        "in1k@224 in1k@384 in1k@512 in21k_ft_in1k@384 in21k_ft_in1k@512 in21k@224",
    ),
    "xlarge": (
        (192, 384, 768, 1536),
        (2, 6, 14, 2),
        {"stem": (192, 192)},
        474.95,
        97.21,
        "in21k@224 in21k_ft_in1k@384 in21k_ft_in1k@512",
    ),
    "nano_rw": (_NARROW, (1, 2, 3, 1), {**_RW, "partition": 8}, 15.45, 3.60, "sw_in1k@256"),
    "tiny_rw": (_NARROW, (2, 2, 5, 2), _RW, 29.06, 5.07, "sw_in1k@224"),
    "rmlp_pico_rw": (
        (32, 64, 128, 256),
        (2, 2, 5, 2),
        {**_RMLP, "stem": (24, 32), "partition": 8},
        7.52,
        1.49,
        "sw_in1k@256",
    ),
    "rmlp_nano_rw": (_NARROW, (1, 2, 3, 1), {**_RMLP, "partition": 8}, 15.50, 3.61, "sw_in1k@256"),
    "rmlp_tiny_rw": (_NARROW, (2, 2, 5, 2), {**_RMLP, "partition": 8}, 29.15, 5.47, "sw_in1k@256"),
    "rmlp_small_rw": (_WIDE, (2, 2, 5, 2), {**_RMLP, "init_values": 1e-6}, 64.9, 10.69, "sw_in1k@224"),
    "rmlp_base_rw": (
        _WIDE,
        (2, 6, 14, 2),
        {**_RMLP, "hidden_head": True},
        116.14,
        23.04,
        "sw_in12k_ft_in1k@224 sw_in12k_ft_in1k@384 sw_in12k@224",
    ),
    "t": (_NARROW, (2, 2, 5, 2), _TORCHVISION, 30.92, 5.56, ""),
}
# weights: ImageNet top-1
_TOP1 = {
    "maxvit_tiny_tf_224.in1k": 83.62,
    "maxvit_small_tf_224.in1k": 84.45,
    "maxvit_large_tf_224.in1k": 85.17,
    "maxvit_tiny_rw_224.sw_in1k": 83.52,
    "maxvit_rmlp_tiny_rw_256.sw_in1k": 84.23,
    "maxvit_rmlp_small_rw_224.sw_in1k": 84.49,
}
# The others scale to [-1, 1].
_IMAGENET_SCALING = {f"maxvit_{size}_tf_224.in1k" for size in ("tiny", "small", "base", "large")}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """MaxViT tiny to xlarge as TensorFlow has them, the variants that timm trained, and torchvision's."""
    return [_spec(variant, *row) for variant, row in _VARIANTS.items()]


def _spec(
    variant: str,
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    options: dict[str, Any],
    params: float,
    gmacs: float,
    weights: str,
) -> BackboneSpec:
    name = f"maxvit_{variant}"
    timm_name = f"{name}_tf" if variant in ("tiny", "small", "base", "large", "xlarge") else name
    rows = [_weights(timm_name, *tag.split("@")) for tag in weights.split()]
    return BackboneSpec(
        name=name,
        results=_RESULTS.get(name, ()),
        family="MaxViT",
        entry="backbones_maxvit.maxvit:MaxViT",
        channels=dims,
        strides=(4, 8, 16, 32),
        defaults={"dims": dims, "depths": depths, **options},
        weights=(*rows, *((_torchvision(),) if variant == "t" else ())),
        aliases=(timm_name,) if timm_name != name else (),
        params=params,
        gmacs=gmacs,
        options=("partition", "window_size", "grid_size"),
        summary="MBConv, attention in windows and attention over a grid in every block",
        paper="https://arxiv.org/abs/2204.01697",
        license="Apache-2.0",
    )


def _weights(timm_name: str, tag: str, side: str) -> Weights:
    published = f"{timm_name}_{side}.{tag}"
    scaling = {} if published in _IMAGENET_SCALING else {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    is_larger = side in ("384", "512")
    return Weights(
        tag=f"{tag}_{side}" if is_larger else tag,
        source=f"hf-hub:timm/{published}",
        input_size=(3, int(side), int(side)),
        license="Apache-2.0",
        metrics={"imagenet_top1": _TOP1[published]} if published in _TOP1 else {},
        classes={"in21k": 21843, "sw_in12k": 11821}.get(tag, 1000),
        options={"partition": int(side) // 32} if is_larger else {},
        aliases=(f"{timm_name}_{side}",),
        **scaling,
    )


def _torchvision() -> Weights:
    recipe = "https://github.com/pytorch/vision/tree/main/references/classification#maxvit"
    member, file = "MaxVit_T_Weights.IMAGENET1K_V1", "maxvit_t-bc5ab103"
    return torchvision_weights(member, file, 83.7, 96.722, recipe, interpolation="bicubic")
