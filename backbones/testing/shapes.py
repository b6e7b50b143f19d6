"""What comes out: maps, their channels, strides and sizes, and the classifier's logits."""

from typing import Any

import torch
from torch import Tensor

from ..backbone import Backbone
from ..errors import InputError
from .common import Build, Skipped, count_parameters, expected_shapes, fail, random_images, require, require_close, some


def check_builds(build: Build) -> None:
    """It is built without options, and is a `Backbone`."""
    model = build()
    require(
        isinstance(model, Backbone),
        f"what is built is a {type(model).__name__}",
        "subclass backbones.Backbone, or put the module through backbones.wrap",
    )


def check_shapes(build: Build) -> None:
    """Maps are a list of NCHW tensors with the declared channels, at the declared strides, finest first."""
    model = build().eval()
    strides, channels = list(model.strides), list(model.out_channels)
    ascend = strides == sorted(strides if model.output_stride < 32 else set(strides))
    require(
        ascend and len(strides) == len(channels),
        f"strides {strides} and channels {channels} should be as many, and strides ascend",
        "give one stride per entry of channels, finest first",
    )
    with torch.no_grad():
        maps = model(random_images(model, 128, 192))
    require(
        isinstance(maps, (list, tuple)) and all(isinstance(m, Tensor) for m in maps),
        f"the forward should return a list of tensors, and returned {type(maps).__name__}",
        "return one NCHW map per stride",
    )
    for m, expected in zip(maps, expected_shapes(model, 2, 128, 192), strict=len(maps) == len(strides)):
        require(
            tuple(m.shape) == expected,
            f"expected a map (B, C, H, W) of {expected}, got {tuple(m.shape)}",
            "declare the channels and strides that the maps have, and return them channels first",
        )
    require(len(maps) == len(strides), f"expected {len(strides)} maps, got {len(maps)}", "return one map per stride")


def check_feature_info(build: Build) -> None:
    """`feature_info`, `out_channels` and `strides` agree before the first forward, whatever is asked for."""
    full = build()
    count = len(full.strides)
    for indices in (None, (0,), tuple(range(count)), (-1,), 1):
        model = build(out_indices=indices)
        chosen = range(count)[-1:] if indices in ((-1,), 1) else (0,) if indices == (0,) else range(count)
        told = (model.feature_info.channels(), model.feature_info.reduction())
        require(
            told == (model.out_channels, model.strides)
            and told == ([full.out_channels[i] for i in chosen], [full.strides[i] for i in chosen]),
            f"with out_indices={indices}, feature_info tells channels and strides {told}, the model "
            f"{(model.out_channels, model.strides)}",
            "pass out_indices on to Backbone.__init__, which fills feature_info in",
        )
    for wrong in ((count,), (-count - 1,), (), 0):
        try:
            build(out_indices=wrong)
        except InputError:
            continue
        fail(f"out_indices={wrong!r} should be refused, and was taken", "pass out_indices on to Backbone.__init__")


def check_any_size(build: Build) -> None:
    """Every map is ceil(H / stride) x ceil(W / stride), finite, for sizes of all kinds, in any order."""
    model = build().eval()
    for height, width in [(224, 224), (250, 333), (97, 161), (33, 65), (5, 300), (1, 1), (224, 224)]:
        with torch.no_grad():
            maps = model(random_images(model, height, width))
        for m, expected in zip(maps, expected_shapes(model, 2, height, width), strict=True):
            require(
                tuple(m.shape) == expected,
                f"images of {height} x {width}: expected a map of {expected}, got {tuple(m.shape)}",
                "pad what a stage cannot divide (size_divisor, or backbones.layers.pad_to_multiple); the base class "
                "crops",
            )
            require(bool(m.isfinite().all()), f"images of {height} x {width} give values that are not finite", "")


def check_out_indices(build: Build) -> None:
    """Maps of a subset equal those of the full pyramid, and stages beyond the last are not built."""
    full = build().eval()
    count = len(full.strides)
    images = random_images(full, 70, 90)
    with torch.no_grad():
        maps = full(images)
    for indices in [(0,), tuple(range(1, count)), (0, count - 1)]:
        part = build(out_indices=indices).eval()
        extra = part.state_dict().keys() - full.state_dict().keys()
        require(
            not extra,
            f"with out_indices={indices} there are parameters that the full model lacks: {some(extra)}",
            "name parts by their index in the full pyramid",
        )
        part.load_state_dict(full.state_dict(), strict=False)
        with torch.no_grad():
            chosen = part(images)
        for i, m in zip(indices, chosen, strict=True):
            require_close(m, maps[i], f"map {i} with out_indices={indices} differs from that of the full pyramid")
        if indices[-1] < count - 1:
            require(
                count_parameters(part) < count_parameters(full),
                f"with out_indices={indices} no fewer parameters are built: {count_parameters(part):,}",
                "make stages lazily and pass them through Backbone.wanted",
            )


def check_in_chans(build: Build) -> None:
    """Images with other than three channels are taken where `in_chans` says so."""
    for channels in (1, 5):
        model = build(in_chans=channels).eval()
        with torch.no_grad():
            maps = model(torch.randn(1, channels, 40, 40))
        widths = [m.shape[1] for m in maps]
        require(widths == model.out_channels, f"in_chans={channels}: maps of widths {widths}", "use self.in_chans")


def check_classifier(build: Build) -> None:
    """`features_only=False` is a classifier with timm's interface."""
    try:
        model: Any = build(features_only=False, num_classes=7).eval()  # returns logits, which `Backbone` cannot tell
    except InputError as error:
        raise Skipped(str(error)) from None
    images, first = random_images(model, 70, 90), model.global_pool
    with torch.no_grad():
        logits = model(images)
        require(logits.shape == (2, 7), f"expected logits of (2, 7), got {tuple(logits.shape)}", "")
        features = model.forward_features(images)
        again = model.forward_head(features)
        require_close(again, logits, "forward_head(forward_features(x)) differs from forward(x)")
        for kind in filter(None, model.global_pools):
            try:
                model.reset_classifier(3, kind)
            except InputError:  # a library's model, or one without a class token
                continue
            shape = tuple(model.forward_head(features).shape)
            require(shape == (2, 3), f"with global_pool={kind!r}, logits are {shape}", "leave it out of global_pools")
        model.reset_classifier(7, first)
        model.reset_classifier(3)
        shape = tuple(model(images).shape)
        require(shape == (2, 3), f"after reset_classifier(3), logits are {shape}", "")
        model.reset_classifier(0)
        pooled = model.forward_head(features, pre_logits=True)
        require_close(model(images), pooled, "after reset_classifier(0), the forward should return pooled features")
