"""What `build_backbone` returns behaves as any `nn.Module` does, whatever is written to it or put in its layers."""

import copy
import io
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torchvision.ops import FrozenBatchNorm2d

from backbones import build_backbone, list_backbones, wrap
from backbones.layers import Blocks
from backbones.testing import smallest_of_each_family

CHEAP = ("mobilevitv2_050", "pvt_v2_b0", "timm/resnet10t")
MORE = ("coatnet_rmlp_nano_rw", "torchvision/resnet18", "torchvision/mobilenet_v3_small", "timm/efficientnet_b0")
FAMILIES = sorted({*smallest_of_each_family(list_backbones()), *CHEAP, *MORE})
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in FAMILIES]
)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@torch.no_grad()
def maps_of(model, images):
    return list(model(images))


def differ(some, others):
    return not all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# --- any write to any parameter --------------------------------------------------------------------------------------


def set_data(parameter, value):
    parameter.data = value


WRITES = {
    "in place": lambda p: p.copy_(-0.5 * p),
    "data, in place": lambda p: p.data.mul_(-0.5),
    "data": lambda p: set_data(p, -0.5 * p),
    "a moving average": lambda p: p.data.mul_(0.5).add_(-p.data, alpha=1.0),
    "another storage": lambda p: p.set_(-0.5 * p),
}


def assert_follows_its_parameters(model, images, write):
    """After one forward without autograd and a write, maps are those of a model that was never called."""
    with torch.no_grad():
        before = maps_of(model, images)
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            if tensor.requires_grad:
                write(tensor)
        fresh = copy.deepcopy(model)
        after, expected = maps_of(model, images), maps_of(fresh, images)
    assert differ(before, after)
    assert not differ(after, expected)


@every_family
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_maps_follow_the_parameters_however_they_are_written(name, write, build, images):
    assert_follows_its_parameters(build(name), images, write)


@every_family
def test_maps_follow_loaded_weights_and_statistics(name, build, images):
    model = build(name)
    before = maps_of(model, images)
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert differ(before, maps_of(model, images))
    assert not differ(maps_of(model, images), maps_of(copy.deepcopy(model), images))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.data.add_(1)
    assert not differ(maps_of(model, images), maps_of(copy.deepcopy(model), images))


def test_a_table_kept_by_version_is_found_out(images):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 1), None

        def forward(self, x):
            if self.table is None or self.table[0] != self.conv.weight._version:
                self.table = self.conv.weight._version, self.conv.weight * 2
            return [torch.conv2d(x, self.table[1])]

    assert_follows_its_parameters(Kept(), images, WRITES["in place"])
    with pytest.raises(AssertionError):
        assert_follows_its_parameters(Kept(), images, WRITES["data, in place"])


# --- any hook --------------------------------------------------------------------------------------------------------


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def assert_every_layer_is_called(model, images):
    """All that holds parameters, but for lists, which cannot be called, and the outermost modules of timm's."""
    called = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: called.add(module))
    maps_of(model, images)
    silent = [
        name
        for name, module in model.named_modules()
        if module not in called
        and any(True for _ in module.parameters())
        and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        and not re.fullmatch(r"model(\.\w+)?", name)  # timm itself calls the parts of its outermost layers
    ]
    assert not silent


def assert_hooks_keep_what_they_saw(model, images):
    seen = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen.extend(
                (name, t, t.detach().clone()) for t in tensors(output)
            )
        )
    maps_of(model, images)
    assert len(seen) > 1
    assert not [name for name, now, then in seen if not torch.equal(now, then)]


@every_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_every_layer_that_holds_parameters_is_called(name, training, build, images):
    assert_every_layer_is_called(build(name).train(training), images)


@every_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_what_a_hook_saw_is_never_overwritten(name, training, build, images):
    assert_hooks_keep_what_they_saw(build(name).train(training), images)


def test_a_layer_that_is_read_or_overwritten_from_outside_is_found_out(images):
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return [self.norm(torch.conv2d(x, self.conv.weight)).relu_()]

    with pytest.raises(AssertionError, match="conv"):
        assert_every_layer_is_called(Outside(), images)
    with pytest.raises(AssertionError, match="norm"):
        assert_hooks_keep_what_they_saw(Outside(), images)


def test_hooks_change_no_number(images):
    class InPlace(nn.Module):
        def forward(self, x):
            y = torch.ones_like(x)
            y.div_(4)  # a statement: whoever wrote it goes on with y
            x = self.relu(x)
            z = x
            z += y
            return [z.mul_(2) + x * 0]

        relu = nn.ReLU(inplace=True)

    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 8, 8), InPlace()), channels=[4], strides=[8])
    with torch.no_grad():
        plain = model(images)
        seen = []
        for module in model.modules():
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        hooked = model(images)
    assert seen
    assert not differ(plain, hooked)


def test_hooks_leave_drop_path_of_timm_as_it_is(images):
    found = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = build_backbone("timm/mobilenetv3_small_050", drop_path_rate=0.5)
        if hooked:
            model.model.conv_stem.register_forward_hook(lambda module, inputs, output: None)
        torch.manual_seed(1)
        found.append(maps_of(model, images))
    assert not differ(*found)


@every_family
def test_hooks_may_replace_what_a_layer_yields(name, build, images):
    """Of each kind of layer the last one is silenced, and the maps notice."""
    expected = maps_of(build(name), images)
    model = build(name)
    last = {type(m): m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm))}
    for module in last.values():
        handle = module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        assert differ(maps_of(model, images), expected), module
        handle.remove()
    assert not differ(maps_of(model, images), expected)


# --- any layer in the place of another -------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A frozen batch norm as DETR and its kin have it: buffers, and an epsilon that nobody can ask for."""

    def __init__(self, channels):
        super().__init__()
        for buffer in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(buffer, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Adapter(nn.Module):
    """What LoRA puts in a layer's place: the layer, and an update of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features)
        else:
            options = {"padding": base.padding, "stride": base.stride, "bias": False}
            self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, **options)
            self.up = nn.Conv2d(2, base.out_channels, 1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def replace(model, kinds, make):
    """Puts what `make` yields in the place of each layer that is of a kind; how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in kinds:
                setattr(parent, name, make(child))
                count += 1
    return count


def act_free(channels):
    return FrozenBatchNormAct2d(channels, apply_act=False)


@every_family
@pytest.mark.parametrize("frozen", [Frozen, FrozenBatchNorm2d, act_free], ids=["DETR", "torchvision", "timm"])
def test_a_frozen_norm_of_any_library_takes_the_place_of_a_batch_norm(name, frozen, build, images):
    model = build(name)
    expected = maps_of(model, images)

    def make(norm):
        layer = frozen(norm.num_features)
        layer.load_state_dict(norm.state_dict(), strict=False)
        if hasattr(layer, "eps"):
            layer.eps = norm.eps
        return layer

    if not replace(model, (nn.BatchNorm2d,), make):
        pytest.skip("has no batch norms")
    for training in (False, True):
        for ours, theirs in zip(maps_of(model.train(training).eval(), images), expected, strict=True):
            assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()  # DETR's epsilon is 1e-5 whatever ours is


@every_family
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_adapters_take_the_place_of_layers(name, kind, build, images):
    model = build(name).requires_grad_(False)
    expected = maps_of(model, images)

    def wrap(layer):
        return layer if getattr(layer, "groups", 1) > 1 else Adapter(layer)

    replace(model, (kind,), wrap)
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    if not adapters:
        pytest.skip(f"has no {kind.__name__}")
    assert differ(maps_of(model, images), expected)
    model.train()
    sum(m.square().mean() for m in model(images)).backward()
    idle = [a for a in adapters if a.up.weight.grad is None or not a.up.weight.grad.any()]
    assert not idle


@every_family
def test_other_norms_take_the_place_of_ours(name, build, images):
    model = build(name)
    count = replace(model, (nn.BatchNorm2d,), lambda norm: nn.GroupNorm(1, norm.num_features))
    count += replace(model, (nn.LayerNorm,), lambda norm: nn.RMSNorm(norm.normalized_shape))
    if not count:
        pytest.skip("has neither norm of torch")
    assert not differ(maps_of(model, images), maps_of(copy.deepcopy(model), images))


@every_family
def test_dynamic_quantisation_finds_the_linear_layers(name, build, images):
    model = build(name)
    linear = sum(type(m) is nn.Linear for m in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    found = sum(type(m) is torch.ao.nn.quantized.dynamic.Linear for m in quantised.modules())
    assert found == linear
    if linear:
        assert differ(maps_of(quantised, images), maps_of(model, images))


@every_family
def test_pruned_and_parametrised_layers_run(name, build, images):
    model = build(name)
    layers = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    assert sum(int((m.weight == 0).sum()) for m, _ in layers) >= 0.49 * sum(m.weight.numel() for m, _ in layers)
    pruned = maps_of(model, images)
    for layer, weight in layers:
        prune.remove(layer, weight)
    assert not differ(pruned, maps_of(model, images))
    for layer, weight in layers:
        nn.utils.parametrize.register_parametrization(layer, weight, nn.Dropout(0.0))
    assert not differ(pruned, maps_of(model, images))


# --- how parameters lie, and what reads them -------------------------------------------------------------------------


@every_family
def test_parameters_and_buffers_are_contiguous_and_are_saved_as_they_are(name, build, tmp_path):
    model = build(name)
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_file(tmp_path / "model.safetensors").items())
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(vector, model.parameters())
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    assert not differ(model.parameters(), torch.load(buffer, weights_only=False).parameters())


@every_family
def test_lbfgs_takes_a_step(name, build, images):
    model = build(name)
    before = parameters_to_vector(model.parameters())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=1)

    def closure():
        optimizer.zero_grad()
        loss = sum(m.square().mean() for m in model(images))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert differ([before], [parameters_to_vector(model.parameters())])


@every_family
def test_a_fresh_model_is_traced(name, build, images):
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(build(name), images, strict=False)
    for ours, theirs in zip(traced(images), maps_of(build(name), images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# --- checkpointing ---------------------------------------------------------------------------------------------------


def assert_checkpointing_changes_no_number(models, images):
    found = []
    for model in models:
        torch.manual_seed(0)
        sum(m.square().mean() for m in model.train()(images)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*gradients, *model.buffers()])
    assert not differ(*found)


@every_family
def test_checkpointing_changes_no_gradient_and_no_statistics(name, build, images):
    plain, checkpointed = build(name), build(name)
    checkpointed.set_grad_checkpointing()
    assert_checkpointing_changes_no_number((plain, checkpointed), images)


def test_statistics_that_move_twice_are_found_out(images):
    def model(checkpointing):
        torch.manual_seed(1)
        blocks = Blocks(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        return nn.Sequential(blocks if not checkpointing else Twice(blocks))

    class Twice(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.blocks, x, use_reentrant=False)

    with pytest.raises(AssertionError):
        assert_checkpointing_changes_no_number((model(False), model(True)), images)
