"""The contract, on a small architecture written as a plugin author would, and on every family we ship."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import default_collate

from backbones import Backbone, InputError, backbone_info, build_backbone, list_backbones, wrap
from backbones.layers import Blocks


def smallest_of_each_family():
    """Whatever is listed is tested: no family can be forgotten."""
    infos = sorted((backbone_info(name) for name in list_backbones()), key=lambda info: -info.params)
    return sorted({info.family: info.name for info in infos}.values())


FAMILIES = [*smallest_of_each_family(), "pvt_v2_b2_li", "deit_tiny_distilled_patch16"]
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


def build(name, **options):
    torch.manual_seed(0)
    return Tiny(**options) if name == "tiny" else build_backbone(name, **options)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


everywhere = pytest.mark.parametrize("name", ["tiny", *FAMILIES])


@everywhere
@pytest.mark.parametrize("size", SIZES)
def test_map_sizes_are_ceil_of_input_over_stride(name, size):
    model = build(name).eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, *size))
    expected = [
        (2, c, math.ceil(size[0] / s), math.ceil(size[1] / s))
        for c, s in zip(model.out_channels, model.strides, strict=True)
    ]
    assert [tuple(m.shape) for m in maps] == expected
    assert model.strides == [4, 8, 16, 32]
    assert all(m.isfinite().all() for m in maps)


@pytest.fixture(scope="module", params=["tiny", *FAMILIES])
def model(request):
    return build(request.param).eval()


@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_any_size_keeps_the_promise(model, height, width):
    with torch.no_grad():
        maps = model(torch.randn(1, 3, height, width))
    assert [m.shape[-2:] for m in maps] == [(math.ceil(height / s), math.ceil(width / s)) for s in model.strides]


@everywhere
def test_output_stride_is_kept_and_told(name):
    for output_stride in build(name).output_strides:
        model = build(name, output_stride=output_stride).eval()
        assert model.strides == [min(stride, output_stride) for stride in (4, 8, 16, 32)]
        with torch.no_grad():
            maps = model(torch.randn(1, 3, 97, 33))
        assert [m.shape[-2:] for m in maps] == [(math.ceil(97 / s), math.ceil(33 / s)) for s in model.strides]


@everywhere
def test_feature_info_speaks_timm(name):
    model = build(name, out_indices=(1, -1))
    assert model.feature_info.channels() == model.out_channels
    assert model.feature_info.reduction() == model.strides == [8, 32]
    assert model.feature_info.channels(0) == build(name).out_channels[0]
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


@everywhere
def test_subsets_equal_the_full_pyramid_and_build_no_more_than_they_need(name):
    full = build(name).eval()
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        maps = full(images)
        for indices in [(0,), (1, 2), (0, 3)]:
            part = build(name, out_indices=indices).eval()
            part.load_state_dict(full.state_dict(), strict=False)
            assert not part.state_dict().keys() - full.state_dict().keys()
            for i, m in zip(indices, part(images), strict=True):
                torch.testing.assert_close(m, maps[i], atol=1e-6, rtol=1e-6)
            assert parameters(part) < parameters(full) or indices[-1] == 3


@everywhere
def test_drop_path_rates_do_not_depend_on_pruning_and_are_off_in_eval(name):
    def rates(model):
        return [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]

    full = build(name, drop_path_rate=0.3)
    assert rates(full)[0] == 0
    assert rates(full)[-1] == pytest.approx(0.3)
    assert rates(full) == sorted(rates(full))
    part = rates(build(name, drop_path_rate=0.3, out_indices=(1,)))
    assert part == rates(full)[: len(part)]
    images = torch.randn(1, 3, 64, 64)
    full.eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(full(images), full(images), strict=True))


@everywhere
def test_images_in_a_batch_do_not_see_each_other(name):
    model = build(name).eval()
    images = torch.randn(2, 3, 65, 80)
    with torch.no_grad():
        for both, alone in zip(model(images), model(images[1:]), strict=True):
            torch.testing.assert_close(both[1:], alone, atol=1e-6 * alone.abs().max().clamp(min=10).item(), rtol=1e-4)


@everywhere
def test_gradients_reach_every_parameter(name):
    model = build(name)
    sum(m.square().mean() for m in model(torch.randn(2, 3, 70, 90))).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all logits of a query alike, which the softmax takes back: zero but for rounding. So does
    # the last bias of an MLP that computes position biases, which for a single head may be zero to the last digit.
    assert not [n for n in missing if not n.endswith("rel_pos.fc2.bias")]


@everywhere
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_stages_neither_learn_nor_drift(name, frozen):
    model = build(name, frozen_stages=frozen, drop_path_rate=0.1)
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


@everywhere
def test_frozen_stages_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=r"frozen_stages=9 is out of range; choose from -1 \(none\) to 4"):
        build(name, frozen_stages=9)


@everywhere
def test_checkpointing_gives_equal_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = build(name, checkpointing=checkpointing, drop_path_rate=0.2)
        torch.manual_seed(1)
        images = torch.randn(2, 3, 64, 64)
        sum(m.square().mean() for m in model(images)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-6, rtol=1e-4)


@everywhere
@pytest.mark.parametrize("features_only", [True, False])
def test_layer_decay_covers_each_parameter_once_and_falls_towards_the_stem(name, features_only):
    model = build(name, features_only=features_only)
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


@everywhere
def test_classifier_follows_timm(name):
    model = build(name, features_only=False, num_classes=7).eval()
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
        ({"global_pool": "map", "features_only": False}, "global_pool='map' is unknown; choose from"),
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


@everywhere
def test_in_chans(name):
    model = build(name, in_chans=5).eval()
    assert [m.shape[1] for m in model(torch.randn(1, 5, 40, 40))] == model.out_channels


@everywhere
def test_copies_and_pickles_compute_the_same(name):
    model = build(name).eval()
    images = torch.randn(1, 3, 50, 60)
    with torch.no_grad():
        maps = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(a, b) for a, b in zip(maps, other(images), strict=True))


@everywhere
def test_maps_come_channels_last_and_out_norm_normalises_them(name):
    model = build(name, out_norm=True).eval()
    with torch.no_grad():
        for m in model(torch.randn(1, 3, 64, 64))[1:]:
            assert m.is_contiguous(memory_format=torch.channels_last)
    if name.startswith(("tiny", "pvt")):
        with torch.no_grad():
            for m in model(torch.randn(1, 3, 256, 256)):
                torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-4, rtol=0)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(name, dtype):
    model = build(name).eval().to(dtype)
    with torch.no_grad():
        assert all(m.dtype == dtype and m.isfinite().all() for m in model(torch.randn(1, 3, 64, 64, dtype=dtype)))


@everywhere
def test_autocast_stays_close_to_float32(name):
    model = build(name).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
    for a, b in zip(maps, mixed, strict=True):
        assert (a - b.float()).norm() < 0.05 * a.norm()


@everywhere
def test_export_takes_any_batch_height_and_width(name):
    model = build(name).eval()
    if model.size_divisor > 1 and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.6 cannot prove that a symbolic padding is not negative")
    sides = {n: torch.export.Dim(n, min=65, max=2048) for n in ("height", "width")}
    shapes = {"images": {0: torch.export.Dim("batch", max=64), 2: sides["height"], 3: sides["width"]}}
    program = torch.export.export(model, (torch.randn(2, 3, 200, 333),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for shape in [(1, 3, 224, 224), (3, 3, 97, 161), (2, 3, 128, 300)]:
            images = torch.randn(shape)
            for a, b in zip(model(images), program(images), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # the compiler takes about a minute per model and shape on two cores
@everywhere
def test_compile_has_no_graph_break_and_equals_eager(name):
    model = build(name).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in [(224, 224), (97, 161), (128, 300)]:
            images = torch.randn(2, 3, *size)
            for a, b in zip(model(images), compiled(images), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def _train_on_one_of_two(rank, address, name, queue):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(build(name))
    torch.manual_seed(rank)
    sum(m.square().mean() for m in model(torch.randn(1, 3, 64, 64))).backward()
    queue.put(sum(p.grad.double().abs().sum().item() for p in model.parameters()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes import torch
@everywhere
def test_two_processes_agree_on_gradients(name, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (f"file://{tmp_path / 'rendezvous'}", name, queue)
    processes = torch.multiprocessing.spawn(_train_on_one_of_two, arguments, nprocs=2, join=False)
    sums = [queue.get(), queue.get()]
    while not processes.join():
        pass
    assert sums[0] == pytest.approx(sums[1], rel=1e-9)
    assert sums[0] > 0


@pytest.mark.gpu
@everywhere
def test_gpu_equals_cpu(name):
    model = build(name).eval()
    images = torch.randn(2, 3, 97, 161)
    with torch.no_grad():
        expected = model(images)
        maps = model.cuda()(images.cuda())
    for a, b in zip(expected, maps, strict=True):
        assert (a - b.cpu()).norm() < 1e-2 * a.norm()  # convolutions may run in TF32


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


def test_maps_collate_as_plain_tensors():
    maps = Tiny()(torch.randn(2, 3, 32, 32))
    assert isinstance(maps, list)
    assert default_collate([maps[0], maps[0]]).shape[0] == 2
