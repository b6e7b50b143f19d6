"""The base class, on a small architecture written as a plugin author would."""

import copy
import importlib
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import default_collate

from backbones import Backbone, InputError, registry, wrap
from backbones.layers import Blocks
from backbones.testing import parametrize_backbones

SIZES = [(224, 224), (250, 333), (97, 161), (33, 65), (5, 300), (1, 1)]


class Block(nn.Module):
    def __init__(self, dim, drop_path):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.norm(self.conv(x)))


class Tiny(Backbone):
    """Non-overlapping down-sampling, so that odd sizes need the padding of the base class."""

    size_divisor = 32

    def __init__(self, dims=(4, 8, 12, 16), depths=(1, 2, 2, 1), **options):
        super().__init__(channels=dims, **options)
        rates = self.drop_path_rates(depths)
        self.stem = nn.Conv2d(self.in_chans, dims[0], 4, 4)
        self.stages = nn.ModuleList(
            self.wanted(
                nn.Sequential(
                    nn.Conv2d(dims[i - 1], dims[i], 2, 2) if i else nn.Identity(),
                    Blocks(*(Block(dims[i], rate) for rate in rates[i])),
                )
                for i in range(4)
            )
        )

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)\.0", None), (r"^stages\.(\d+)\.1\.(\d+)", None)]}


def build(**options):
    torch.manual_seed(0)
    return Tiny(**options)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@parametrize_backbones(
    [Tiny],
    {"Tiny": {"two_processes": "another process cannot import a class of this file"}},
    slow_marks=pytest.mark.slow,
)
def test_conformance(name, check):
    check(name)


@pytest.fixture(scope="module")
def model():
    return build().eval()


@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_any_size_keeps_the_promise(model, height, width):
    with torch.no_grad():
        maps = model(torch.randn(1, 3, height, width))
    assert [m.shape[-2:] for m in maps] == [(math.ceil(height / s), math.ceil(width / s)) for s in model.strides]


def test_feature_info_speaks_timm():
    model = build(out_indices=(1, -1))
    assert model.feature_info.channels() == model.out_channels
    assert model.feature_info.reduction() == model.strides == [8, 32]
    assert model.feature_info.channels(0) == build().out_channels[0]
    assert model.out_indices == (1, 3)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [(None, (0, 1, 2, 3)), (2, (2, 3)), ((0, 2), (0, 2)), ([-3, -1], (1, 3)), (range(3), (0, 1, 2)), ((-1,), (3,))],
)
def test_out_indices_take_every_form_of_timm(given, resolved):
    assert Tiny(out_indices=given).out_indices == resolved


@pytest.mark.parametrize("wrong", [(4,), (-5,), 0, 5, (), (2, 1), (1, 1), (1, -3), "12", 1.5, (0.5,)])
def test_wrong_out_indices_are_refused_with_the_valid_range(wrong):
    with pytest.raises(InputError, match="valid indices are 0 to 3"):
        Tiny(out_indices=wrong)


def test_drop_path_rates_do_not_depend_on_pruning_and_are_off_in_eval():
    def rates(model):
        return [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]

    full = build(drop_path_rate=0.3)
    assert rates(full)[0] == 0
    assert rates(full)[-1] == pytest.approx(0.3)
    assert rates(full) == sorted(rates(full))
    part = rates(build(drop_path_rate=0.3, out_indices=(1,)))
    assert part == rates(full)[: len(part)]
    images = torch.randn(1, 3, 64, 64)
    full.eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(full(images), full(images), strict=True))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_stages_neither_learn_nor_drift(frozen):
    model = build(frozen_stages=frozen, drop_path_rate=0.1)
    parts = [p for group in model.freezable()[: frozen + 1] for p in group]
    held = {id(p) for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())}
    assert held
    assert all(p.requires_grad is (id(p) not in held) for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    assert not any(m.training for part in parts if isinstance(part, nn.Module) for m in part.modules())
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    names = {n for n, p in model.named_parameters() if id(p) in held}
    assert all(torch.equal(before[n], model.state_dict()[n]) for n in names)
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n not in names)


def test_frozen_batch_norms_and_norm_eval_keep_their_statistics():
    for options, kept in [({"frozen_stages": 1}, "stages.0.1.0"), ({"norm_eval": True}, "stages.3.1.0")]:
        model = Tiny(**options).train()
        model(torch.randn(4, 3, 64, 64))
        assert model.get_submodule(kept).norm.num_batches_tracked == 0
        assert model.get_submodule(kept).training is ("norm_eval" in options)
    assert Tiny().train().stages[0][1][0].norm.training


def test_frozen_stages_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"frozen_stages=9 is out of range; choose from -1 \(none\) to 4"):
        build(frozen_stages=9)


@pytest.mark.parametrize("features_only", [True, False])
def test_layer_decay_covers_each_parameter_once_and_falls_towards_the_stem(features_only):
    model = build(features_only=features_only)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert sorted(scale) == sorted(names.values())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    stem = {
        id(p)
        for part in model.freezable()[0]
        for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    }
    assert {scale[names[i]] for i in stem} == {min(scale.values())}
    assert len(set(scale.values())) > 5
    assert all(value == 0 for n, value in decay.items() if n.endswith("bias") or n in model.no_weight_decay())
    if not features_only:
        assert scale["head.weight"] == 1.0


def test_classifier_follows_timm():
    model = build(features_only=False, num_classes=7).eval()
    images = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        assert model(images).shape == (2, 7)
        torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images))
        assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, model.num_features)
        heads = model.get_classifier()
        assert all(head.out_features == 7 for head in (heads if isinstance(heads, tuple) else [heads]))
        model.bfloat16().reset_classifier(3)
        assert model(images.bfloat16()).shape == (2, 3)
        model.reset_classifier(0)
        assert model(images.bfloat16()).shape == (2, model.num_features)


def test_classifier_and_maps_are_told_apart():
    with pytest.raises(InputError, match="features_only=False builds a classifier"):
        Tiny(features_only=False, out_indices=(1,))
    with pytest.raises(InputError, match="features_only=False to have a classifier"):
        Tiny().reset_classifier(3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"in_chans": 0}, "in_chans=0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"output_stride": 8}, r"output_stride=8 is not supported; choose from \(32,\)"),
        ({"global_pool": "map", "features_only": False}, "global_pool='map' is unknown; choose from 'avg'"),
        ({"num_classes": -1}, "num_classes=-1"),
    ],
)
def test_wrong_options_are_named(option, message):
    with pytest.raises(InputError, match=message):
        Tiny(**option)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"takes float images of shape \(B, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), "build it with in_chans to match"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"scale to \[0, 1\] and normalise"),
        (torch.zeros(1, 3, 0, 8), "H and W of at least 1"),
    ],
)
def test_wrong_images_are_named(images, message):
    with pytest.raises(InputError, match=message):
        Tiny()(images)


def test_maps_come_channels_last_and_out_norm_normalises_them():
    model = build(out_norm=True).eval()
    with torch.no_grad():
        for m in model(torch.randn(1, 3, 64, 64))[1:]:
            assert m.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for m in model(torch.randn(1, 3, 256, 256)):
            torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-4, rtol=0)


class Foreign(nn.Module):
    def __init__(self, sides=()):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 10, 2, 2)
        self.sides = sides

    def forward(self, x):
        assert x.shape[-1] % 16 == x.shape[-2] % 16 == 0
        a = self.a(x)
        return a, self.b(a)


def test_wrap_gives_a_foreign_module_the_contract():
    model = wrap(Foreign(), channels=(6, 10), strides=(8, 16), size_divisor=16, out_indices=(1,), frozen_stages=0)
    (m,) = model(torch.randn(1, 3, 50, 70))
    assert m.shape == (1, 10, 4, 5)
    assert not any(p.requires_grad for p in model.parameters())


def test_wrap_names_a_wrong_number_of_maps():
    model = wrap(Foreign(), channels=(6, 10, 12), strides=(8, 16, 32))
    with pytest.raises(InputError, match="Foreign returned 2 maps where 3 were declared"):
        model(torch.randn(1, 3, 64, 64))


# What is for callers alone; all else that is public may be overridden, and the docstring's table says so.
FOR_CALLERS = {
    "out_channels",
    "strides",
    "default_cfg",
    "pooled_features",
    "transforms",
    "save_pretrained",
    "push_to_hub",
    "wanted",
    "drop_path_rates",
    "fast",
}
#: Methods of any nn.Module that it extends, or that modules may.
OF_ANY_MODULE = {"__init__", "__getstate__", "__setstate__"}


def overridable():
    """Names in the tables of `Backbone`'s docstring, each with what it says."""
    lines = re.findall(r"^    (\w+) {2,}(\S.*)$", Backbone.__doc__, re.MULTILINE)
    return dict(line for line in lines if line[0] not in ("attribute", "method"))


def public(cls):
    """Names that it and its bases of ours define."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("backbones")]
    return {name for base in bases for name in vars(base) if not name.startswith("_")}


def test_the_docstring_has_all_that_may_be_overridden_each_with_a_line():
    assert overridable().keys() | FOR_CALLERS == public(Backbone)
    assert not overridable().keys() & FOR_CALLERS
    assert all(len(line) > 20 for line in overridable().values())


def test_what_our_plugins_override_is_in_the_docstring():
    entries = {spec.entry.partition(":")[0] for plugin in registry._plugins() for spec in plugin.specs.values()}
    for module in [*entries, "backbones_transformers.models", "backbones_timm.model"]:
        importlib.import_module(module)
    bases = {base for cls in subclasses(Backbone) for base in cls.__mro__} - {*Backbone.__mro__}
    classes = [cls for cls in bases if cls.__module__.startswith("backbones")]
    assert len(classes) > 15
    taken = {name for cls in classes for name in vars(cls) if hasattr(Backbone, name) and not hasattr(object, name)}
    taken -= {"__module__", "__annotations__", "__dict__", "__weakref__", *OF_ANY_MODULE}
    assert taken <= overridable().keys()
    assert len(taken) > 20


def subclasses(cls):
    for sub in cls.__subclasses__():
        yield from (sub, *subclasses(sub))


def test_maps_collate_as_plain_tensors():
    maps = Tiny()(torch.randn(2, 3, 32, 32))
    assert isinstance(maps, list)
    assert default_collate([maps[0], maps[0]]).shape[0] == 2
