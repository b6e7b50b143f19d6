"""Configurations of transformers, read without transformers or torch: which maps a model will have."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbones.errors import InputError, UnknownBackbone

STRIDES = (4, 8, 16, 32)
PYRAMIDS = ("simple", "taps", "plain")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is known of one `model_type`.

    Args:
        family, paper: for people.
        widths: the setting that has the width of each stage; "embed_dim" doubles from stage to stage.
        counts: the setting that has the number of stages, beside the lengths of lists.
        divisor: what the sides of images are padded to; the patch size for plain models.
        plain: whether all blocks work at the stride of the patches.
        first: index of the first stage among the features that transformers counts.
        unused: a norm of the whole model that no feature has passed.
        defaults: settings as transformers has them, which a saved configuration leaves out.
    """

    family: str
    paper: str
    widths: str = "hidden_sizes"
    counts: str = ""
    divisor: int = 1
    plain: bool = False
    first: int = 1
    unused: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _plain(family: str, paper: str, dim: int = 768, depth: int = 12, patch: int = 16, unused: str = "") -> Kind:
    defaults = {"hidden_size": dim, "num_hidden_layers": depth, "patch_size": patch}
    return Kind(family=family, paper=f"https://arxiv.org/abs/{paper}", plain=True, unused=unused, defaults=defaults)


def _pyramid(family: str, paper: str, **options: Any) -> Kind:
    return Kind(family=family, paper=f"https://arxiv.org/abs/{paper}", **options)


_CONVNEXT = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
_BIT = {"hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}
_RESNET = _BIT | {"downsample_in_first_stage": False}
_SWIN = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "patch_size": 4}

KINDS: Mapping[str, Kind] = {
    "beit": _plain("BEiT", "2106.08254"),
    "bit": _pyramid("BiT", "1912.11370", unused="bit.norm", defaults=_BIT),
    "convnext": _pyramid(
        "ConvNeXt", "2201.03545", counts="num_stages", divisor=32, defaults=_CONVNEXT | {"patch_size": 4}
    ),
    "convnextv2": _pyramid(
        "ConvNeXt V2", "2301.00808", counts="num_stages", divisor=32, defaults=_CONVNEXT | {"patch_size": 4}
    ),
    "dinov2": _plain("DINOv2", "2304.07193", patch=14),
    "dinov2_with_registers": _plain("DINOv2 with registers", "2309.16588"),
    "dinov3_convnext": _pyramid("DINOv3 ConvNeXt", "2508.10104", divisor=32, defaults=_CONVNEXT),
    "dinov3_vit": _plain("DINOv3 ViT", "2508.10104", dim=384),
    "hgnet_v2": _pyramid(
        "HGNetV2", "2304.08069", widths="stage_out_channels", defaults={"stage_out_channels": [128, 512, 1024, 2048]}
    ),
    "maskformer-swin": _pyramid(
        "MaskFormer's Swin", "2107.06278", widths="embed_dim", unused="model.layernorm", defaults=_SWIN
    ),
    "pixio": _plain("Pixio", "2512.15715", dim=1280, depth=32, unused="pixio.layernorm"),
    "pvt_v2": _pyramid(
        "PVTv2",
        "2106.13797",
        counts="num_encoder_blocks",
        divisor=32,
        first=0,
        defaults={"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "strides": [4, 2, 2, 2]},
    ),
    "resnet": _pyramid("ResNet", "1512.03385", defaults=_RESNET),
    "rt_detr_resnet": _pyramid("RT-DETR's ResNet", "2304.08069", defaults=_RESNET),
    "sapiens2": _plain("Sapiens2", "2408.12569", dim=1024, depth=24),
    "swin": _pyramid("Swin", "2103.14030", widths="embed_dim", unused="swin.layernorm", defaults=_SWIN),
    "swinv2": _pyramid("Swin V2", "2111.09883", widths="embed_dim", defaults=_SWIN),
    "tipsv2_vision_model": _plain("TIPSv2", "2410.16512", patch=14),
    "vitdet": _plain("ViTDet", "2203.16527"),
}

_ONE_SIZE = "transformers builds it for images of one size"
REFUSED: Mapping[str, str] = {
    "dinat": "it needs the package natten, which has kernels for some machines only",
    "focalnet": "transformers hands out its maps after their down-sampling, so that stride 4 has only the patches",
    "hiera": f"{_ONE_SIZE}; 'timm/hiera_tiny_224' and its like are models to try",
    "lw_detr_vit": "its windows divide images of some sizes only",
    "pp_lcnet": "it is made for lines of text, and so are its strides",
    "pp_lcnet_v3": "it is made for lines of text, and so are its strides",
    "pp_lcnet_v4": "its strides differ between height and width",
    "rf_detr_dinov2": "its windows divide images of some sizes only",
    "textnet": "it is made for lines of text, and so are its strides",
    "timm_backbone": "it is a model of timm: build 'timm/NAME'",
    "uvdoc_backbone": "it has maps of one stride only, without the depth of a plain transformer",
    "vitpose_backbone": _ONE_SIZE,
}


def read(name: str) -> dict[str, Any] | None:
    """The settings in `config.json` of a folder or a hub id, or of a model type by default; None for other names.

    Raises:
        UnknownBackbone: it is a folder or a hub id, and its configuration cannot be had.
    """
    if name in KINDS or name in REFUSED:
        return {"model_type": name}
    path = folder(name)
    if path is None and not _HUB_ID.fullmatch(name):
        return None
    try:
        file = path / "config.json" if path else _fetch(name)
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # no such file, no JSON
        raise UnknownBackbone(f"transformers/{name}: no configuration can be read there: {error}") from error
    kind = settings.get("model_type")
    if kind not in KINDS and kind not in REFUSED:
        raise UnknownBackbone(
            f"transformers/{name} is of model type {kind!r}, which is none that gives maps here: {', '.join(KINDS)}"
        )
    return settings


def folder(name: str) -> Path | None:
    """The local folder that a name means: one that begins with '/', './', '../' or '~', or that holds a config.json."""
    path = Path(name).expanduser()
    is_path = name.startswith(("/", "./", "../", "~"))
    return path if is_path or ("/" in name and (path / "config.json").is_file()) else None


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of transformers' defaults that decide about maps."""
    return dict(KINDS[settings["model_type"]].defaults) | dict(settings)


def levels(
    settings: Mapping[str, Any], pyramid: str = "simple", taps: Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of each map: width, stride and, counted as transformers does, the feature that it is made from.

    Args:
        settings: as `complete` returns them.
        pyramid, taps: as `TransformersBackbone` takes them.
    """
    kind = KINDS[settings["model_type"]]
    if kind.plain:
        return _plain_levels(settings, pyramid, taps)
    if pyramid != "simple" or taps is not None:
        raise InputError(f"{kind.family} has a pyramid of its own; pyramid= and taps= are for plain transformers")
    widths = settings[kind.widths]
    if kind.widths == "embed_dim":
        widths = [widths * 2**i for i in range(len(settings["depths"]))]
    steps = settings.get("strides") or [settings.get("patch_size", 4), *[2] * (len(widths) - 1)]
    if settings.get("downsample_in_first_stage"):
        steps = [8, *steps[1:]]
    strides = [math.prod(steps[: i + 1]) for i in range(len(widths))]
    if settings.get("output_stride", 32) != 32:
        raise InputError(f"{kind.family} with output_stride={settings['output_stride']} in its config is not supported")
    return tuple(widths), tuple(strides), tuple(kind.first + i for i in range(len(widths)))


def _plain_levels(
    settings: Mapping[str, Any], pyramid: str, taps: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if pyramid not in PYRAMIDS:
        raise InputError(f"pyramid={pyramid!r} is unknown; choose from {', '.join(map(repr, PYRAMIDS))}")
    dim, depth, patch = settings["hidden_size"], settings["num_hidden_layers"], patch_size(settings)
    taps = tuple(taps) if taps else tuple(max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1))
    if len(taps) != 4 or list(taps) != sorted(taps) or not 1 <= taps[0] <= taps[-1] <= depth:
        raise InputError(f"taps={taps} must be four ascending blocks from 1 to {depth}")
    if pyramid == "plain":
        return (dim,), (patch,), (depth,)
    # As `backbones.pyramid.Pyramid.channels` has it: each doubling of the sides halves the width.
    halvings = [max(0, round(math.log2(patch / stride))) if pyramid == "simple" else 0 for stride in STRIDES]
    return tuple(dim >> n for n in halvings), STRIDES, taps if pyramid == "taps" else (depth,) * 4


def patch_size(settings: Mapping[str, Any]) -> int:
    """Side of a patch, in pixels."""
    size = settings["patch_size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise InputError(f"patch_size={size}: patches that are no squares give maps of no single stride")
    return sides.pop()


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # offline and not in the cache, no such repository, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownBackbone(
            f"transformers/{name}: its config.json is not in the local cache and could not be downloaded ({reason}). "
            f"Where there is a network, run `hf download {name}`, then copy the cache and set HF_HOME, or name the "
            "folder as transformers/./FOLDER; `backbones list 'transformers/*'` shows types, which need no network"
        ) from error
