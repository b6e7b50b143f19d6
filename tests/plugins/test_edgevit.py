"""EdgeViT equals a plain reference, written from the paper's facts under the official names, on the same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backbones import InputError, backbone_info, build_backbone
from backbones.weights import load_weights
from backbones_edgevit.edgevit import OFFICIAL

# with 1000 classes; xxs and s as the official code has them
PARAMETERS = {"edgevit_xxs": 4_067_704, "edgevit_xs": 6_770_056, "edgevit_s": 13_108_168}
GMACS = {"edgevit_xxs": 0.551, "edgevit_xs": 1.127, "edgevit_s": 1.911}
VARIANTS = [pytest.param(name, marks=() if name.endswith("xxs") else pytest.mark.slow) for name in PARAMETERS]
RATES = (4, 2, 2, 1)


class Embed(nn.Module):
    def __init__(self, in_chans, dim, size):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, size, size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    def __init__(self, fc1, fc2):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LocalAgg(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.mlp = Mlp(nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1))

    def forward(self, x):
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class SparseAttn(nn.Module):
    def __init__(self, dim, heads, rate):
        super().__init__()
        self.heads, self.rate = heads, rate
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if rate > 1:
            self.LocalProp = nn.ConvTranspose2d(dim, dim, rate, rate, groups=dim)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x):  # (B, C, H, W), where the rate divides H and W
        b, c, h, w = F.avg_pool2d(x, 1, self.rate).shape
        tokens = F.avg_pool2d(x, 1, self.rate).reshape(b, c, h * w).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5, dim=-1)
        y = (weights @ v).transpose(1, 2).reshape(b, h * w, c)
        if self.rate > 1:
            y = self.LocalProp(y.transpose(1, 2).reshape(b, c, h, w))
            y = self.norm(y.reshape(b, c, -1).transpose(1, 2))
        return self.proj(y).transpose(1, 2).reshape(x.shape)


class SelfAttn(nn.Module):
    def __init__(self, dim, heads, rate):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = SparseAttn(dim, heads, rate)
        self.mlp = Mlp(nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.pos_embed(x)
        x = x + self.attn(self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return x + self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, dim, heads, rate):
        super().__init__()
        self.LocalAgg = LocalAgg(dim) if rate > 1 else nn.Identity()
        self.SelfAttn = SelfAttn(dim, heads, rate)

    def forward(self, x):
        return self.SelfAttn(self.LocalAgg(x))


class Reference(nn.Module):
    """For images whose sides 32 divides."""

    def __init__(self, dims, depths, heads, classes=1000):
        super().__init__()
        for i in range(4):
            embed = Embed(dims[i - 1], dims[i], 2) if i else Embed(3, dims[0], 4)
            setattr(self, f"patch_embed{i + 1}", embed)
            blocks = [Block(dims[i], heads[i], RATES[i]) for _ in range(depths[i])]
            setattr(self, f"blocks{i + 1}", nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], classes)

    def maps(self, x):
        maps = []
        for i in range(1, 5):
            x = getattr(self, f"blocks{i}")(getattr(self, f"patch_embed{i}")(x))
            maps.append(x)
        return maps

    def forward(self, x):
        return self.head(self.norm(self.maps(x)[-1]).mean((2, 3)))


def plain(name):
    return Reference(**backbone_info(name).defaults)


@pytest.fixture(scope="module")
def draw(randomise):
    """A reference with random weights, whose residual branches are small enough for the maps not to outgrow float32."""

    def drawn(name):
        reference = randomise(plain(name))
        with torch.no_grad():
            for key, parameter in reference.named_parameters():
                if key.startswith("blocks") and key.endswith(("pos_embed.weight", "conv2.weight", "fc2.weight")):
                    parameter.mul_(0.2)
        return reference

    return drawn


@pytest.fixture(scope="module")
def reference(draw):
    return draw("edgevit_xxs")


@pytest.fixture(scope="module")
def pair(reference, load_pair):
    return load_pair("edgevit_xxs", reference)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name, count, assert_parameters_as_published):
    assert_parameters_as_published(name, PARAMETERS[name])
    with torch.device("meta"):
        assert count(plain(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_gmacs_are_as_published(name):
    assert backbone_info(name).gmacs == round(GMACS[name], 2)
    with torch.device("meta"):
        model = build_backbone(name, features_only=False).eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 224, 224))
    gmacs = counter.get_total_flops() / 2e9
    print(f"{name}: {gmacs:.4f} GMACs at 224 x 224")
    assert gmacs == pytest.approx(GMACS[name], abs=1e-3)  # local propagation is no convolution here


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_maps_equal_the_reference(name, draw, load_pair, assert_equals_reference):
    reference = draw(name)
    classifier, backbone = load_pair(name, reference)
    for size in [(224, 224), (256, 320), (64, 32)]:
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            assert_equals_reference(f"{name} logits", classifier(images), reference(images))
            for stride, ours, theirs in zip(backbone.strides, backbone(images), reference.maps(images), strict=True):
                assert_equals_reference(f"{name} stride {stride}", ours, theirs)


def test_gradients_equal_the_reference(reference, load_pair, assert_gradients_equal):
    model, _ = load_pair("edgevit_xxs", reference)
    assert_gradients_equal(model, copy.deepcopy(reference), OFFICIAL)


def test_training_equals_the_reference(reference, load_pair, assert_equals_reference):
    model, _ = load_pair("edgevit_xxs", reference)
    images = torch.randn(4, 3, 64, 96)
    assert_equals_reference("training", model.train()(images), copy.deepcopy(reference).train()(images))


@pytest.mark.usefixtures("on_meta")
def test_norms_have_the_epsilon_of_the_reference(reference, assert_epsilons_equal):
    assert_epsilons_equal(build_backbone("edgevit_xxs", features_only=False), reference, OFFICIAL)


def test_drop_path_rises_linearly_and_drops_every_branch_but_positions():
    model = build_backbone("edgevit_s", drop_path_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    expected = torch.linspace(0, 0.3, 11).tolist()
    assert [block.self_attn.drop_path.drop_prob for block in blocks] == pytest.approx(expected)
    local = [block.local_agg.drop_path.drop_prob for block in blocks[:8]]
    assert local == pytest.approx(expected[:8])  # the last stage has no local aggregation
    block = blocks[1].train()
    x = torch.randn(2, 96, 6, 7)
    block.local_agg.drop_path.drop_prob = block.self_attn.drop_path.drop_prob = 1 - 1e-9
    y = x + block.local_agg.pos_embed(x)
    torch.testing.assert_close(block(x), y + block.self_attn.pos_embed(y))


@pytest.mark.parametrize("size", [(7, 9), (8, 5), (1, 1), (3, 12)])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_maps_that_the_rate_does_not_divide_are_padded_and_cropped_back(size, stage, reference, pair):
    theirs, ours = getattr(reference, f"blocks{stage + 1}")[0].SelfAttn.attn, pair[1].stages[stage].blocks[0].self_attn
    height, width = size
    rate = RATES[stage]
    x = torch.randn(2, theirs.qkv.in_features, height, width)
    with torch.no_grad():
        padded = theirs(F.pad(x, (0, -width % rate, 0, -height % rate)))[..., :height, :width]
        picked = x.permute(0, 2, 3, 1)[:, ::rate, ::rate]
        torch.testing.assert_close(ours.attn(picked, height, width).permute(0, 3, 1, 2), padded, atol=1e-5, rtol=1e-5)


def test_images_that_no_patch_divides_are_zero_padded(pair):
    images = torch.randn(1, 3, 61, 90)
    with torch.inference_mode():
        expected = pair[1](F.pad(images, (0, 2, 0, 3)))[0]
        assert torch.equal(pair[1](images)[0], expected)


def test_official_names_load_and_nothing_else_is_asked_for(reference):
    keys = reference.state_dict().keys()
    model = build_backbone("edgevit_xxs", features_only=False)
    assert OFFICIAL.convert(reference.state_dict()).keys() == model.state_dict().keys()
    block = {k.removeprefix("blocks1.0.").rpartition(".")[0] for k in keys if k.startswith("blocks1.0.")}
    local = "pos_embed norm1 conv1 attn conv2 norm2 mlp.fc1 mlp.fc2"
    attention = "pos_embed norm1 attn.qkv attn.proj attn.LocalProp attn.norm norm2 mlp.fc1 mlp.fc2"
    assert block == {*(f"LocalAgg.{n}" for n in local.split()), *(f"SelfAttn.{n}" for n in attention.split())}
    report = load_weights(model, {"model": reference.state_dict(), "epoch": 300})
    assert (report.layout, report.share) == ("official", 1)


def test_detection_checkpoint_loads_its_backbone(reference, tmp_path, assert_equals_reference):
    state = {f"backbone.{k}": v for k, v in reference.state_dict().items() if not k.startswith(("head.", "norm."))}
    neck = {f"neck.fpn_convs.{i}.conv.weight": torch.randn(8, 8, 3, 3) for i in range(5)}
    path = tmp_path / "retinanet_edgevit_xxs.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": state | neck, "optimizer": {}}, path)
    backbone = build_backbone("edgevit_xxs", out_indices=(1, 2, 3), pretrained=path).eval()
    assert backbone.load_report.prefix == "backbone."
    assert backbone.load_report.share == 1
    assert not backbone.load_report.missing
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        for ours, theirs in zip(backbone(images), reference.maps(images)[1:], strict=True):
            assert_equals_reference("detection checkpoint", ours, theirs)


def test_folded_norms_follow_what_is_learnt(reference, load_pair):
    model, _ = load_pair("edgevit_xxs", reference)
    images = torch.randn(1, 3, 64, 64)
    local = model.stages[0].blocks[0].local_agg
    with torch.no_grad():
        before = model(images)
        for changed in (local.conv1.norm.running_mean, local.fc1.norm.running_var, local.fc1.conv.bias):
            changed.mul_(1.5)
            after = model(images)
            with torch.enable_grad():
                torch.testing.assert_close(after, model(images).detach(), atol=1e-4, rtol=1e-4)
            assert not torch.allclose(before, after, atol=1e-3)
            before = after


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans_are_adapted(in_chans, reference):
    model = build_backbone("edgevit_xxs", in_chans=in_chans, features_only=False).eval()
    report = load_weights(model, reference.state_dict())
    assert list(report.resized) == ["stages.0.embed.proj.weight"]
    grey = torch.randn(1, 1, 64, 64)
    if in_chans == 1:
        with torch.inference_mode():
            torch.testing.assert_close(model(grey), reference(grey.expand(1, 3, 64, 64)), atol=1e-4, rtol=1e-4)


def test_reset_classifier(pair):
    model = copy.deepcopy(pair[0])
    images = torch.randn(2, 3, 64, 64)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == 7
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(InputError, match="5 heads do not divide a width of 36"):
        build_backbone("edgevit_xxs", heads=(5, 2, 4, 8))
