"""The benchmark counts what the papers count and measures ours and timm's alike."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

import backbones
from backbones import InputError, UnknownBackbone
from backbones.cli import bench, main
from backbones.cli.bench import Case, cases, timing


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
    case = Case(name=name, options={"features_only": False}, size=(224, 224))
    assert timing._gmacs(case) == pytest.approx(gmacs, abs=6e-4)


@pytest.fixture
def no_memory(monkeypatch):
    """Peak memory takes a process of its own."""
    monkeypatch.setattr(timing, "_peak_memory", lambda case: 12.5)


def reported(capsys, *arguments):
    assert main(["bench", *arguments, "--seconds", "0.1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    return report, {(row["column"], row["dtype"]): row for row in report["results"]}


def test_bench_beside_timm(capsys, no_memory):
    report, rows = reported(capsys, "vit_tiny_patch16", "--size", "64", "96", "--vs", "timm", "--rounds", "3")
    ours, timms = rows["plain", "float32"], rows["timm", "float32"]
    assert (ours["library"], timms["library"]) == ("ours", "timm")
    assert ours["maps"] == timms["maps"] == "16"
    assert ours["size"] == timms["size"] == "64x96"
    assert ours["gmacs"] == timms["gmacs"] > 0
    assert ours["rounds"] == timms["rounds"] >= 3
    assert ours["least_ms"] <= ours["latency_ms"]
    ratio = report["ratios"]["vit/vit_tiny_patch16"]["plain float32 / timm"]
    assert ratio == pytest.approx(timms["latency_ms"] / ours["latency_ms"], abs=0.01)
    assert report["geomeans"]["plain float32 / timm"] == ratio
    assert ours["peak_mb"] == timms["peak_mb"] == 12.5
    assert "64 x 96" in report["machine"]
    assert f"{torch.get_num_threads()} thread" in report["machine"]


def test_peak_memory_holds_the_weights_at_least():
    case = Case(name="vit_tiny_patch16", size=(32, 32))
    assert timing._peak_memory(case) > 5.5 * 4 * 0.9, "MB of 5.5 million weights"


def test_a_model_that_cannot_be_built_anew_keeps_its_latency(capsys, monkeypatch):
    def ends(case):
        raise MemoryError("no more")

    monkeypatch.setattr(timing, "_peak_memory", ends)
    result = timing.measure([Case(name="mobilevitv2_050", size=(32, 32))], seconds=0.01)[0]
    assert result.latency_ms > 0
    assert result.error == "peak memory: MemoryError: no more"


def test_every_dtype_has_its_columns_and_is_held_against_float32(capsys, no_memory):
    names = ["--size", "32", "--dtype", "float32", "bfloat16"]
    report, rows = reported(capsys, "mobilevitv2_050", *names)
    assert list(rows) == [(way, d) for d in ("float32", "bfloat16") for way in ("plain", "for_inference")]
    rates = report["ratios"]["mobilevit/mobilevitv2_050"]
    assert list(rates) == ["plain bfloat16 / float32", "for_inference bfloat16 / float32"]


def test_the_columns_of_all_that_timm_can_have():
    load = Case(name="", size=(64, 64))
    every = cases.columns("pvt_v2_b0", load, ("timm", "compile", "onnxruntime", "openvino"), ("float32", "bfloat16"))
    timms = ["timm", "timm channels-last", "timm compiled", "timm onnxruntime", "timm openvino"]
    ours = ["plain", "for_inference", "for_inference compiled"]
    assert [c.column for c in every if c.dtype == "float32"] == timms + ours
    cast = ["timm cast channels-last", "timm cast compiled"]
    assert [c.column for c in every if c.dtype == "bfloat16"] == timms[:2] + cast + ours
    training = cases.columns("pvt_v2_b0", replace(load, train=True), ("timm", "compile", "onnxruntime"), ("float32",))
    assert [c.column for c in training] == [*timms[:3], "plain", "plain channels-last", "plain compiled"]


def test_ratios_are_to_timm_as_built_and_at_its_best():
    latencies = {
        ("timm", "float32"): 100.0,
        ("timm compiled", "float32"): 60.0,
        ("timm onnxruntime", "float32"): None,
        ("plain", "float32"): 50.0,
        ("for_inference", "float32"): 40.0,
        ("timm", "bfloat16"): 90.0,
        ("for_inference", "bfloat16"): 20.0,
    }
    row = [
        bench.Result("n", "", column, dtype, "", latency_ms=ms, error="" if ms else "no such runtime")
        for (column, dtype), ms in latencies.items()
    ]
    rates = bench.ratios(row)
    assert rates == {
        "plain float32 / timm": 2.0,
        "for_inference float32 / best of timm": 1.5,
        "for_inference bfloat16 / best of timm": 4.5,
        "for_inference bfloat16 / float32": 2.0,
    }
    assert bench.geomeans([rates, {"plain float32 / timm": 0.5}])["plain float32 / timm"] == 1.0


def test_a_column_that_fails_says_so_and_harms_no_other(capsys, no_memory, monkeypatch):
    def refuses(case, model, images):
        raise RuntimeError("operator unknown")

    monkeypatch.setitem(timing._RUNTIMES, "onnxruntime", refuses)
    options = ["--size", "64", "--vs", "timm", "onnxruntime", "--seconds", "0.1"]
    assert main(["bench", "edgevit_xxs", "pvt_v2_b0", *options]) == 0
    out, err = capsys.readouterr()
    assert "pvt/pvt_v2_b0, timm onnxruntime float32: RuntimeError: operator unknown" in err
    assert "edgevit/edgevit_xxs: timm has no such model" in err
    latencies = out.split("median (least) ms")[1].splitlines()
    assert "failed" not in latencies[2], "edgevit"
    assert latencies[3].count("failed") == 1
    assert latencies[3].count("(") == 4, "timm twice, ours twice"


def test_bench_fails_where_one_of_ours_does(capsys, monkeypatch):
    monkeypatch.setattr(backbones, "for_inference", None, raising=False)
    assert main(["bench", "mobilevitv2_050", "--size", "32", "--seconds", "0.1", "--no-memory"]) == 1
    assert "for_inference float32: TypeError" in capsys.readouterr().err


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_take_a_step_of_timms_model(runtime):
    pytest.importorskip(runtime)
    case = Case(name="resnet10t", library="timm", options={"features_only": True}, size=(32, 32), runtime=runtime)
    model, images = case.build()
    maps = timing._RUNTIMES[runtime](case, model, images)()
    maps = maps if isinstance(maps, list) else list(maps.values())
    with torch.no_grad():
        for theirs, ours in zip(maps, model(images), strict=True):
            torch.testing.assert_close(torch.as_tensor(theirs), ours, rtol=1e-3, atol=1e-4)


def test_bench_prints_tables_of_one_training_step(capsys):
    options = ["--size", "64", "--batch", "2", "--train", "--seconds", "0.1", "--no-memory"]
    assert main(["bench", "pvt_v2_b0", *options]) == 0
    out, err = capsys.readouterr()
    machine, _, header, row, _, what, columns, times = out.splitlines()
    assert err.startswith("measured pvt/pvt_v2_b0, ms: plain float32 "), "said as soon as it is known"
    assert "forward and backward, float32, batch 2, 64 x 64" in machine
    assert header.split()[:2] == ["name", "library"]
    assert row.split()[:6] == ["pvt/pvt_v2_b0", "ours", "64x64", "4", "8", "16"]
    assert what == "float32, median (least) ms"
    assert columns.split() == ["name", "plain", "plain", "channels-last"]
    assert times.count("(") == 2


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("pvt_v2_b0", {}, (96, 128)),  # takes any size as built
        ("vit_tiny_patch16_224", {"img_size": (96, 128)}, (96, 128)),
        ("efficientformer_l1", {}, (224, 224)),  # takes its own size only
    ],
)
def test_timm_is_measured_at_the_size_or_where_it_cannot_at_its_own(name, options, size):
    assert cases.timm_options(name, (96, 128)) == ({"features_only": True} | options, size)


def test_names_and_sizes_are_checked_before_anything_is_timed():
    with pytest.raises(InputError, match="--size takes"):
        run_bench("pvt_v2_b0", "--size", "0")
    with pytest.raises(UnknownBackbone, match="no backbone 'pvt_v2_bo'"):
        run_bench("pvt_v2_b2", "pvt_v2_bo")
    with pytest.raises(InputError, match="run on a CPU"):
        run_bench("pvt_v2_b2", "--vs", "onnxruntime", "--device", "cuda")


def run_bench(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    bench.run(parser.parse_args(arguments))
