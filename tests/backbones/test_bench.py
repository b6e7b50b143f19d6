"""The benchmark counts what the papers count and measures ours and timm's alike."""

import argparse
import json

import pytest

from backbones import InputError, UnknownBackbone
from backbones.cli import bench, main


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("pvt_v2_b0", 0.566),
        ("pvt_v2_b2", 4.027),
        ("pvt_v2_b2_li", 3.889),
        ("vit_small_patch16", 4.599),
        ("vit_base_patch32", 4.409),
        ("deit_tiny_distilled_patch16", 1.261),
    ],
)
def test_gmacs_at_224_equal_the_published_ones(name, gmacs):
    options = {"features_only": False}
    case = bench.Case("ours", name, options, (224, 224), 1, False, "float32", "cpu", False)
    assert bench._gmacs(case) == pytest.approx(gmacs, abs=6e-4)


def test_bench_beside_timm(capsys):  # two processes for the memory figures take most of its time
    assert main(["bench", "vit_tiny_patch16", "--size", "64", "96", "--vs", "timm", "--seconds", "0.1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours, timms = report["results"]
    assert (ours["library"], timms["library"]) == ("ours", "timm")
    assert ours["maps"] == timms["maps"] == "16"
    assert ours["size"] == timms["size"] == "64x96"
    assert ours["gmacs"] == timms["gmacs"] > 0
    assert ours["ratio"] == pytest.approx(timms["latency_ms"] / ours["latency_ms"], abs=0.02)
    assert report["geomean_ratio"] == ours["ratio"]
    assert min(ours["peak_mb"], timms["peak_mb"]) > ours["params_m"] * 4 * 0.9  # weights alone take 4 bytes each
    assert "64 x 96" in report["machine"]


def test_bench_prints_a_table_of_one_training_step(capsys):
    assert main(["bench", "pvt_v2_b0", "--size", "64", "--batch", "2", "--train", "--seconds", "0.1"]) == 0
    machine, header, row = capsys.readouterr().out.splitlines()
    assert "forward and backward, float32, batch 2, 64 x 64" in machine
    assert header.split()[:2] == ["name", "library"]
    assert row.split()[:6] == ["pvt/pvt_v2_b0", "ours", "64x64", "4", "8", "16"]


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("pvt_v2_b0", {}, (96, 128)),  # takes any size as built
        ("vit_tiny_patch16_224", {"img_size": (96, 128)}, (96, 128)),
        ("efficientformer_l1", {}, (224, 224)),  # takes its own size only
    ],
)
def test_timm_is_measured_at_the_size_or_where_it_cannot_at_its_own(name, options, size):
    assert bench._timm_options(name, (96, 128)) == ({"features_only": True} | options, size)


def test_names_and_sizes_are_checked_before_anything_is_timed():
    with pytest.raises(InputError, match="--size takes"):
        run_bench("pvt_v2_b0", "--size", "0")
    with pytest.raises(UnknownBackbone, match="no backbone 'pvt_v2_bo'"):
        run_bench("pvt_v2_b2", "pvt_v2_bo")


def run_bench(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    bench.run(parser.parse_args(arguments))
