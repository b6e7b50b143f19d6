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
        f"the forward should return a list of tensors, and returned {_kind(maps)}",
        "return one NCHW map per stride",
    )
    require(len(maps) == len(strides), f"expected {len(strides)} maps, got {len(maps)}", "return one map per stride")
    for m, expected in zip(maps, expected_shapes(model, 2, 128, 192), strict=True):
        last = tuple(m.shape) == (expected[0], *expected[2:], expected[1])
        require(
            tuple(m.shape) == expected,
            f"expected a map (B, C, H, W) of {expected}, got {tuple(m.shape)}",
            "return channels first, as m.permute(0, 3, 1, 2)"
            if last
            else "declare the channels and strides that the maps have, finest first",
        )


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
            require(
                bool(m.isfinite().all()),
                f"images of {height} x {width} give values that are not finite",
                "look for a division by a variance, a norm or a count that is 0 of so few cells, such as the unbiased "
                "variance of one",
            )


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
            require_close(
                m,
                maps[i],
                f"map {i} with out_indices={indices} differs from that of the full pyramid",
                "let no part depend on which others are built, and return maps by self.out_indices",
            )
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
        require(
            widths == model.out_channels,
            f"in_chans={channels}: maps of widths {widths}",
            "build the first convolution with self.in_chans, and nothing else",
        )


def check_output_strides(build: Build) -> None:
    """Every stride that `output_strides` claims is told and kept, and others are refused."""
    full = build()
    claimed = full.output_strides
    require(
        32 in claimed and all(isinstance(s, int) for s in claimed),
        f"output_strides={claimed!r} should have 32, which leaves the architecture as it is",
        "list it beside the strides that the architecture can dilate to",
    )
    for asked in claimed:
        model = build(output_stride=asked).eval()
        expected = [min(stride, asked) if asked < 32 else stride for stride in full.strides]
        told = f"output_strides claims {asked}, and with output_stride={asked} "
        remedy = "let stages beyond that stride dilate in place of striding, or claim (32,) alone"
        require(model.strides == expected, f"{told}strides are told as {model.strides}, not {expected}", remedy)
        with torch.no_grad():
            try:
                maps = model(random_images(model, 97, 33))
            except Exception as error:  # of whatever is wrong with it
                fail(f"{told}it raises {type(error).__name__}: {error}", remedy)
        shapes = [tuple(m.shape) for m in maps]
        require(shapes == expected_shapes(model, 2, 97, 33), f"{told}maps of 97 x 33 are {shapes}", remedy)
    try:
        build(output_stride=7)
    except InputError:
        return
    fail("output_stride=7 should be refused, and was taken", "pass output_stride on to Backbone.__init__")


def check_classifier(build: Build) -> None:
    """`features_only=False` is a classifier with timm's interface."""
    model = _classifier(build)
    images = random_images(model, 70, 90)
    with torch.no_grad():
        logits = model(images)
        require(
            isinstance(logits, Tensor) and logits.shape == (2, 7),
            f"with num_classes=7, expected logits of (2, 7), got {_kind(logits)}",
            "let forward_head return self.head of pooled features, (B, C)",
        )
        features = model.forward_features(images)
        require_close(
            model.forward_head(features),
            logits,
            "forward_head(forward_features(x)) differs from forward(x)",
            "do in these two all that forward does",
        )
        model.reset_classifier(3)
        require(
            model(images).shape == (2, 3),
            f"after reset_classifier(3), logits are {tuple(model(images).shape)}",
            "set self.head anew, in make_head for self.num_classes, or extend reset_classifier",
        )
        model.reset_classifier(0)
        require_close(
            model(images),
            model.forward_head(features, pre_logits=True),
            "after reset_classifier(0), the forward should return pooled features, and its output differs",
            "let forward_head(features, pre_logits=True) return what the last layer sees, and the head of no classes "
            "pass it on",
        )


def check_global_pools(build: Build) -> None:
    """Each way to pool that `global_pools` claims is another one, in `build_backbone` and in `reset_classifier`."""
    first = _classifier(build)
    images = random_images(first, 64, 96)
    pools: dict[str, Tensor] = {}
    for pool in first.global_pools:
        told = f"global_pools claims {pool!r}, and with global_pool={pool!r} "
        remedy = "let forward_head pool by self.global_pool, or claim what it does alone"
        try:
            model: Any = build(features_only=False, num_classes=3, global_pool=pool).eval()
            first.reset_classifier(3, pool)
            model.load_state_dict(first.eval().state_dict())
            with torch.no_grad():
                logits, anew = model(images), first(images)
        except InputError:  # which says what does not go with it: a library's model, or options
            continue
        except Exception as error:  # of whatever is wrong with it
            fail(f"{told}it raises {type(error).__name__}: {error}", remedy)
        require(
            not pool or logits.shape == (2, 3), f"{told}logits of 3 classes are {_kind(logits)}, not (2, 3)", remedy
        )
        require(
            _same(anew, logits),
            f"{told}logits differ from those after reset_classifier(3, {pool!r})",
            "let reset_classifier and make_head set all that depends on self.global_pool",
        )
        with torch.no_grad():
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        same = [other for other, features in pools.items() if _same(features, pooled)]
        require(not same, f"{told}features are those of {same}", remedy)
        pools[pool] = pooled


def _classifier(build: Build) -> Any:  # what it returns are logits, which `Backbone` cannot tell
    try:
        return build(features_only=False, num_classes=7).eval()
    except InputError as error:
        raise Skipped(str(error)) from None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _kind(value: object) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
