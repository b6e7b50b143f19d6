"""Fake CUDA tensors tell, without a GPU, what a model would do wrong on one and what it would ask of it."""

import json

import pytest
import torch
from torch import nn

from backbones import list_backbones
from backbones.cli import main
from backbones.cli.bench import Case, fake
from backbones.testing import smallest_of_each_family

FAMILIES = smallest_of_each_family(list_backbones())
IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("for_inference", [False, True], ids=["plain", "for_inference"])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_stays_on_the_gpu_and_never_waits_for_it(name, dtype, for_inference):
    asked = fake.ask(Case(name=name, size=(72, 88), batch=2, dtype=dtype, for_inference=for_inference))
    assert not asked.error
    assert asked.operations > 10


def test_operations_and_bytes_are_those_that_the_forward_needs():
    layer = nn.Linear(8, 4).eval()
    work = fake.count(layer, torch.zeros(2, 8), torch.float32)
    assert work.operations == {"aten.addmm": 1}
    assert work.bytes == 4 * (2 * 8 + 8 * 4 + 4 + 2 * 4)
    work = fake.count(nn.Linear(8, 4).eval(), torch.zeros(2, 8), torch.bfloat16)
    assert work.operations == {"aten._to_copy": 3, "aten.addmm": 1}, "autocast casts images, weight and bias"
    work = fake.count(nn.Linear(8, 4).eval(), torch.zeros(2, 8), torch.bfloat16, cast=True)
    assert work.operations == {"aten.addmm": 1}
    assert work.bytes == 2 * (2 * 8 + 8 * 4 + 4 + 2 * 4)


def test_attention_is_one_operation_and_views_are_none():
    class Attention(nn.Module):
        def forward(self, x):
            x = x.flatten(2).transpose(1, 2).unsqueeze(1)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    work = fake.count(Attention(), IMAGES, torch.float32)
    assert work.operations == {"scaled_dot_product_attention": 1}
    assert work.bytes == 4 * 4 * IMAGES.numel()


class TableOnTheCPU(nn.Module):
    def forward(self, x):
        return x + torch.arange(8)


class TableCopiedAtEachCall(nn.Module):
    def forward(self, x):
        return x + torch.arange(8).to(x.device)


class Waits(nn.Module):
    def forward(self, x):
        return x / x.max().item()


class Branches(nn.Module):
    def forward(self, x):
        return x if x.max() > 0 else -x


class Selects(nn.Module):
    def forward(self, x):
        return x[x > 0]


class AttentionAcrossDevices(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, torch.zeros(8, 8))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (TableOnTheCPU, "cuda:0 and cpu"),
        (TableCopiedAtEachCall, "between CPU and GPU"),
        (Waits, "makes the CPU wait"),
        (Branches, "makes the CPU wait"),
        (Selects, "makes the CPU wait"),
        (AttentionAcrossDevices, "on cpu"),
    ],
)
def test_a_planted_fault_is_found(fault, message):
    with pytest.raises(Exception, match=message):
        fake.count(fault(), IMAGES, torch.float32)


def test_a_number_on_the_cpu_is_no_fault():
    class Scaled(nn.Module):
        def forward(self, x):
            return x * torch.tensor(0.5)

    assert fake.count(Scaled(), IMAGES, torch.float32).operations == {"aten.mul": 1}


def test_bench_on_fake_cuda_prints_ours_beside_timms(capsys):
    options = ["--size", "64", "--vs", "timm", "--device", "fake-cuda"]
    assert main(["bench", "pvt_v2_b0", *options]) == 0
    machine, header, row = capsys.readouterr().out.splitlines()
    assert "batch 8, 64 x 64" in machine
    assert header.split() == ["name", "size", "timm", "float32", "plain", "float32", "for_inference", "float32"]
    assert row.split()[:2] == ["pvt/pvt_v2_b0", "64x64"]
    assert main(["bench", "pvt_v2_b0", *options, "--dtype", "bfloat16", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["column"] for result in results] == ["timm", "timm cast", "plain", "for_inference"]
    assert all(sum(r["by_operation"].values()) == r["operations"] for r in results)


def test_bench_on_fake_cuda_fails_where_one_of_ours_has_a_fault(capsys, monkeypatch):
    monkeypatch.setattr(Case, "build", lambda self, device=None: (Waits(), IMAGES))
    assert main(["bench", "pvt_v2_b0", "--size", "8", "--device", "fake-cuda"]) == 1
    assert "pvt/pvt_v2_b0, plain float32: WouldWait" in capsys.readouterr().err
