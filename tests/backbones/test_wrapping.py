"""`wrap`: modules as people have them, each through a decoder and a detector."""

import copy
import re
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backbones import InputError, wrap
from backbones.testing import CHECKS, SLOW_CHECKS, check_backbone
from backbones_tasks import build_detector, build_segmenter

CHANNELS = (4, 6, 8, 10)


class Pyramid(nn.Module):
    """Four NCHW maps, finest first; children are a stem and a stage per map."""

    def __init__(self, channels=CHANNELS, in_chans=3):
        super().__init__()
        self.stem = nn.Conv2d(in_chans, channels[0], 4, 4)
        widths = [channels[0], *channels]
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, 1 if i == 0 else 2, 1 if i == 0 else 2)
            for i, (a, b) in enumerate(zip(widths, channels, strict=False))
        )

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        return maps


class Changed(Pyramid):
    """The same maps in another form."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x), x)


class Windows(Pyramid):
    """Sides have to be multiples of 96."""

    def forward(self, x):
        if x.shape[-1] % 96 or x.shape[-2] % 96:
            raise AssertionError("windows do not divide the image")
        return super().forward(x)


class OneSize(Pyramid):
    def forward(self, x):
        if x.shape[-2:] != (64, 96):
            raise AssertionError("made for 64 x 96")
        return super().forward(x)


def tokens(m, prefix=0):
    return torch.cat([m.new_zeros(m.shape[0], prefix, m.shape[1]), m.flatten(2).mT], 1)


FORMS = {
    "list": lambda maps, x: maps,
    "tuple": lambda maps, x: tuple(maps),
    "dict": lambda maps, x: OrderedDict((f"p{i}", m) for i, m in enumerate(maps)),
    "feature_maps": lambda maps, x: SimpleNamespace(feature_maps=tuple(maps)),
    "NHWC": lambda maps, x: [m.permute(0, 2, 3, 1) for m in maps],
    "coarse first": lambda maps, x: maps[::-1],
    "coarse first NHWC dict": lambda maps, x: {i: m.permute(0, 2, 3, 1) for i, m in enumerate(maps[::-1])},
    "tokens": lambda maps, x: [tokens(m) for m in maps],
    "tokens after a class token and registers": lambda maps, x: [tokens(m, 5) for m in maps],
    "tokens, channels first": lambda maps, x: [m.flatten(2) for m in maps],
}


def runs_under_heads(backbone):
    images = torch.rand(2, 3, 50, 71)
    segmenter = build_segmenter("upernet", backbone=copy.deepcopy(backbone), num_classes=3, decoder_channels=8)
    segmenter.eval()
    assert segmenter(images).shape == (2, 3, 50, 71)
    detector = build_detector("fcos", backbone=backbone, num_classes=3, fpn_channels=64, min_size=64, max_size=128)
    target = {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}
    losses = detector(list(images), [target, target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("form", FORMS)
def test_maps_of_any_form_are_those_of_the_plain_module(form):
    changed = Changed(FORMS[form])
    plain = Pyramid()
    plain.load_state_dict(changed.state_dict())
    model, reference = wrap(changed, CHANNELS).eval(), wrap(plain, CHANNELS, size_divisor=32).eval()
    for size in [(33, 65), (64, 64), (1, 1), (128, 40)]:
        images = torch.rand(2, 3, *size)
        for ours, theirs in zip(model(images), reference(images), strict=True):
            assert torch.equal(ours, theirs)
    runs_under_heads(model)


def test_a_single_map_is_a_pyramid_of_one():
    model = wrap(Changed(lambda maps, x: maps[2]), [8], [16])
    (m,) = model(torch.rand(1, 3, 33, 65))
    assert m.shape == (1, 8, 3, 5)


@pytest.mark.parametrize("first", [(32, 32), (64, 64), (32, 48)])
def test_a_map_as_wide_as_it_has_channels_is_told_apart(first):
    """2 channels on a grid of 2 x 2: the shape alone does not say which dimension is which."""
    module = Changed(lambda maps, x: maps[2].permute(0, 2, 3, 1), channels=(4, 6, 2, 10))
    model = wrap(module, [2], [16], size_divisor=16).eval()
    images = torch.rand(1, 3, *first)
    (m,) = model(images)
    torch.testing.assert_close(m, Pyramid.forward(module, images)[2])


def test_the_multiple_that_a_module_wants_is_found():
    model = wrap(Windows(), CHANNELS)
    assert [tuple(m.shape[2:]) for m in model(torch.rand(1, 3, 97, 30))] == [(25, 8), (13, 4), (7, 2), (4, 1)]
    assert model.size_divisor == 96
    assert model.training
    assert all(m.training for m in model.modules())
    runs_under_heads(model)


def test_a_multiple_is_found_when_the_first_images_did_not_need_it():
    model = wrap(Windows(), CHANNELS).eval()
    assert model(torch.rand(1, 3, 96, 96))[0].shape[2:] == (24, 24)
    assert model.size_divisor == 32
    images = torch.rand(1, 3, 97, 30)
    first, again = model(images), model(images)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert model.size_divisor == 96


def test_an_error_of_the_module_itself_passes_through():
    calls = []

    def fail(maps, x):
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return maps

    model = wrap(Changed(fail), CHANNELS).eval()
    model(torch.rand(1, 3, 32, 32))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.rand(1, 3, 32, 32))


def test_the_module_runs_once_per_call():
    module, calls = Pyramid(), []
    module.stem.register_forward_hook(lambda *seen: calls.append(seen))
    model = wrap(module, CHANNELS)
    for count in (1, 2):
        model(torch.rand(1, 3, 33, 65))
        assert len(calls) == count


def test_a_module_of_one_size_gets_images_of_that_size():
    model = wrap(OneSize(), CHANNELS, image_size=(64, 96))
    assert [tuple(m.shape[2:]) for m in model(torch.rand(1, 3, 97, 30))] == [(25, 8), (13, 4), (7, 2), (4, 1)]
    runs_under_heads(model)


def test_a_module_of_one_size_says_what_to_pass():
    with pytest.raises(InputError, match=r"OneSize takes no images .* made for 64 x 96.*image_size="):
        wrap(OneSize(), CHANNELS)(torch.rand(1, 3, 64, 64))


def test_maps_other_than_declared_name_the_module_and_both_shapes():
    model = wrap(Pyramid(), (4, 6, 8, 12))
    with pytest.raises(InputError, match=r"Pyramid returned maps .*\(1, 10, 1, 1\).*mean .*\('B', 12, 1, 1\)"):
        model(torch.rand(1, 3, 32, 32))
    model = wrap(Pyramid(), CHANNELS, strides=(4, 8, 16, 64))
    with pytest.raises(InputError, match="Pyramid returned maps"):
        model(torch.rand(1, 3, 64, 64))


def test_what_returns_no_maps_is_named():
    with pytest.raises(InputError, match="Changed returned a int; wrap takes a module that returns maps"):
        wrap(Changed(lambda maps, x: 3), CHANNELS)(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path_rate": 0.1}, r"wrap\(Pyramid\): drop_path_rate=0.1 is for what builds the module"),
        ({"drop_rate": 0.1}, r"wrap\(Pyramid\): drop_rate=0.1"),
        ({"checkpointing": True}, r"wrap\(Pyramid\): checkpointing=True"),
        ({"features_only": False}, r"wrap\(Pyramid\) yields feature maps"),
        ({"output_stride": 8}, "output_stride=8 is not supported"),
        ({"size_divisor": 32, "image_size": 64}, "pass one"),
        ({"size_divisor": 0}, "size_divisor=0 must be at least 1"),
    ],
)
def test_what_a_finished_module_cannot_keep_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        wrap(Pyramid(), CHANNELS, **options)


def test_a_module_with_its_own_checkpointing_keeps_it():
    module = Pyramid()
    module.set_grad_checkpointing = lambda enable: setattr(module, "recomputes", enable)
    wrap(module, CHANNELS, checkpointing=True)
    assert module.recomputes


def test_frozen_stages_and_layers_go_by_the_modules_children():
    model = wrap(Pyramid(), CHANNELS, frozen_stages=2)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == [
        f"module.{part}.{name}" for part in ("stem", "stages.0", "stages.1") for name in ("weight", "bias")
    ]
    with pytest.raises(InputError, match="choose from -1"):
        wrap(Pyramid(), CHANNELS, frozen_stages=5)

    from timm.models import group_parameters

    layers = group_parameters(model, model.group_matcher(), reverse=True)
    order = [layers[f"module.{part}.weight"] for part in ("stem", "stages.0", "stages.1", "stages.2", "stages.3")]
    assert order == sorted(order)
    assert len(set(order)) == 5


class ReadsEachStage(Pyramid):
    """Its forward looks into the last stage, so that nothing else can stand there."""

    def forward(self, x):
        return [m * self.stages[3].weight.sum() for m in super().forward(x)]


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_maps_coarser_than_those_asked_for_are_left_out(form):
    whole = wrap(Changed(FORMS[form]), CHANNELS).eval()
    part = wrap(Changed(FORMS[form]), CHANNELS, out_indices=(0, 1)).eval()
    assert {name.rpartition(".")[0] for name in part.state_dict()} == {
        f"module.{part}" for part in ("stem", "stages.0", "stages.1")
    }
    part.load_state_dict(whole.state_dict(), strict=False)
    for size in [(33, 65), (64, 64), (1, 1)]:
        images = torch.rand(2, 3, *size)
        for ours, theirs in zip(part(images), whole(images)[:2], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("module", "options"),
    [(ReadsEachStage(), {}), (OneSize(), {"size_divisor": 8}), (nn.Sequential(Pyramid()), {})],
    ids=["forward that reads a part", "no image that it takes", "no part per map"],
)
def test_a_module_that_cannot_do_without_its_parts_stays_whole(module, options):
    state = copy.deepcopy(module.state_dict())
    model = wrap(module, CHANNELS, out_indices=(0, 1), **options)
    assert {name.removeprefix("module.") for name in model.state_dict()} == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.module.state_dict().values(), state.values(), strict=True))


def test_parts_are_left_out_without_memory_and_random_numbers():
    with torch.device("meta"):
        assert len(list(wrap(Pyramid(), CHANNELS, out_indices=(0,)).parameters())) == 4
    module = Pyramid()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    wrap(module, CHANNELS, out_indices=(0,))
    assert torch.equal(torch.rand(2), expected)


def take_in_chans(in_chans=3, **options):
    return wrap(Pyramid(in_chans=in_chans), CHANNELS, in_chans=in_chans, **options)


@pytest.mark.parametrize("check", [c for c in CHECKS if c not in SLOW_CHECKS])
def test_a_function_that_returns_it_keeps_the_promise(check):
    """All but stochastic depth and recomputation, which a finished module has or has not."""
    (result,) = check_backbone(take_in_chans, checks=[check])
    refused = r"drop_path_rate=\S+ is for what builds the module|no set_grad_checkpointing"
    assert result.outcome in ("passed", "skipped") or re.search(refused, result.message), result.message


@pytest.mark.slow  # the compiler
@pytest.mark.parametrize("form", [form for form in FORMS if form != "feature_maps"])  # a namespace is no pytree
def test_maps_of_any_form_are_exported_and_compiled_for_any_size(form):
    for result in check_backbone(
        lambda **options: wrap(Changed(FORMS[form]), CHANNELS, **options), checks=["export", "compile"]
    ):
        assert result.outcome == "passed", result.message
