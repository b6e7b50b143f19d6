"""Specs are checked when they are made, cannot be changed, and can be copied, pickled and printed as JSON."""

import copy
import dataclasses
import json
import pickle
import re

import pytest

from backbones import BackboneInfo, BackboneSpec, InvalidSpec, Result, Weights
from backbones.specs import read_results

WEIGHTS = {"tag": "in1k", "source": "hf-hub:timm/pvt_v2_b0.in1k"}
RESULT = {
    "method": "UPerNet",
    "task": "segmentation",
    "dataset": "ADE20K val",
    "metrics": {"miou": 44.5},
    "source": "its paper",
}
SPEC = {"name": "net_s", "family": "Net", "entry": "pkg.model:Net", "channels": (8, 16), "strides": (4, 8)}


def full_spec():
    return BackboneSpec(
        **SPEC,
        defaults={"dims": [8, 16]},
        weights=[Weights(**WEIGHTS, metrics={"imagenet_top1": 70.5})],
        aliases=["net_small"],
        params=3.4,
        gmacs=0.5,
        options=["window_size"],
        layer_decay=0.75,
        requires=("einops>=0.7",),
        results=[Result(**RESULT)],
    )


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("name", "ns/", "use letters"),
        ("name", "", "use letters"),
        ("name", "two words", "use letters"),
        ("family", "", "name the architecture"),
        ("entry", "pkg.model.Net", "write it as 'package.module:callable'"),
        ("entry", "pkg/model.py:Net", "write it as 'package.module:callable'"),
        ("channels", (), "one positive integer per map"),
        ("channels", (8, 16.0), "one positive integer per map"),
        ("channels", (8, True), "one positive integer per map"),
        ("channels", 8, "one positive integer per map"),
        ("strides", (4,), "give as many as channels=(8, 16)"),
        ("strides", (8, 4), "put the finest map first"),
        ("strides", (4, 4), "put the finest map first"),
        ("strides", (0, 4), "one positive integer per map"),
        ("defaults", ("dims", 8), "mapping of option name to value"),
        ("defaults", {1: 2}, "mapping of option name to value"),
        ("weights", ("in1k",), "tuple of Weights"),
        ("weights", (Weights(**WEIGHTS), Weights(**WEIGHTS)), "each tag once"),
        ("results", ("44.5 mIoU",), "tuple of Result"),
        ("aliases", "net_small", "tuple of names"),
        ("aliases", ("timm/net",), "tuple of names"),
        ("params", "3.4", "millions of parameters"),
        ("params", -1, "millions of parameters"),
        ("gmacs", 0, "billions of multiply-adds"),
        ("options", "window_size", "tuple of option names"),
        ("options", ("window size",), "tuple of option names"),
        ("layer_decay", 0, "over 0 and at most 1"),
        ("layer_decay", 1.1, "over 0 and at most 1"),
        ("layer_decay", "0.75", "over 0 and at most 1"),
        ("layer_decay", True, "over 0 and at most 1"),
        ("summary", None, "give a string"),
        ("requires", "einops", "as pip takes them"),
        ("requires", ("einops; rm -rf /",), "as pip takes them"),
        ("requires", ("--index-url=https://example.org",), "as pip takes them"),
    ],
)
def test_a_wrong_field_is_named_with_its_spec_and_what_to_do(field, value, remedy):
    with pytest.raises(InvalidSpec, match=re.escape(remedy)) as caught:
        BackboneSpec(**(SPEC | {field: value}))
    owner = value if field == "name" else "net_s"
    assert str(caught.value).startswith(f"BackboneSpec {owner!r}: {field}={value!r} is wrong; ")


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("tag", "", "use letters"),
        ("source", "timm/pvt_v2_b0.in1k", "start it with 'hf-hub:' or 'https://' or 'file://'"),
        ("layout", "", "name the key layout"),
        ("input_size", (224, 224), "(channels, height, width)"),
        ("input_size", (3, 224, 0), "(channels, height, width)"),
        ("mean", (0.5,), "give 3 numbers"),
        ("std", 0.5, "give 3 numbers"),
        ("interpolation", "bicubik", "use one of nearest, bilinear, bicubic"),
        ("license", None, "give a string"),
        ("metrics", (70.5,), "mapping of metric to value"),
        ("classes", -1, "0 for features alone"),
        ("options", ("img_size", 384), "mapping of option name to value"),
        ("aliases", "net_384", "tuple of names"),
    ],
)
def test_a_wrong_field_of_weights_is_named_with_its_tag(field, value, remedy):
    with pytest.raises(InvalidSpec, match=re.escape(remedy)) as caught:
        Weights(**(WEIGHTS | {field: value}))
    assert f"{field}={value!r} is wrong" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("task", "seg", "use 'detection' or 'segmentation'"),
        ("metrics", {}, "box_ap, mask_ap, miou, miou_ms to numbers"),
        ("metrics", {"mIoU": 44.5}, "box_ap, mask_ap, miou, miou_ms to numbers"),
        ("metrics", {"miou": "44.5"}, "box_ap, mask_ap, miou, miou_ms to numbers"),
        ("source", "", "give a string"),
    ],
)
def test_a_wrong_field_of_a_result_is_named_with_its_method(field, value, remedy):
    with pytest.raises(InvalidSpec, match=re.escape(remedy)) as caught:
        Result(**(RESULT | {field: value}))
    assert str(caught.value).startswith(f"Result 'UPerNet': {field}={value!r} is wrong")


def test_results_are_read_from_a_table_by_backbone(tmp_path):
    (tmp_path / "results.csv").write_text(
        "backbone,method,task,dataset,miou,params,checked,source\n"
        "net_s,UPerNet,segmentation,ADE20K val,44.5,,no,its paper\n"
        "net_s,FPN,segmentation,ADE20K val,40.25,12.5,yes,its paper\n"
    )
    first, second = read_results(tmp_path / "results.csv")["net_s"]
    assert first == Result(**RESULT, checked=False)
    assert (second.metrics, second.params, second.checked) == ({"miou": 40.25}, 12.5, True)


def test_an_alias_of_weights_puts_them_first_and_is_one_of_the_specs():
    rows = [Weights(**WEIGHTS), Weights(**(WEIGHTS | {"tag": "large"}), aliases=["net_s_384"])]
    spec = BackboneSpec(**SPEC, weights=rows, aliases=["net_small"])
    assert spec.aliases == ("net_small", "net_s_384")
    assert [row.tag for row in spec.under("net_s_384").weights] == ["large", "in1k"]
    assert spec.under("net_small") == spec


@pytest.mark.parametrize("name", ["facebook/dinov2-small", "./weights/dinov2", "/data/dinov2", "~/dinov2"])
def test_a_name_may_be_the_id_of_a_hub_or_a_path(name):
    assert BackboneSpec(**(SPEC | {"name": name})).name == name


def test_specs_take_keywords_only():
    with pytest.raises(TypeError):
        BackboneSpec(*SPEC.values())


def test_specs_cannot_be_changed():
    given = {"dims": [8, 16]}
    spec = BackboneSpec(**SPEC, defaults=given)
    given["dims"] = None
    assert spec.defaults == {"dims": [8, 16]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"
    with pytest.raises(TypeError):
        spec.defaults["dims"] = None


def test_lists_become_tuples():
    spec = BackboneSpec(**(SPEC | {"channels": [8, 16], "strides": [4, 8]}))
    assert spec == BackboneSpec(**SPEC)
    assert isinstance(full_spec().weights, tuple)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))])
def test_specs_can_be_copied_and_pickled_as_the_models_that_carry_them_are(clone):
    spec = full_spec()
    twin = clone(spec)
    assert twin == spec
    assert hash(twin) == hash(spec)
    with pytest.raises(TypeError):
        twin.weights[0].metrics["imagenet_top1"] = 100.0


def test_specs_are_json():
    data = json.loads(json.dumps(full_spec().as_dict()))
    assert data["channels"] == [8, 16]
    assert data["defaults"] == {"dims": [8, 16]}
    assert data["weights"][0]["metrics"] == {"imagenet_top1": 70.5}
    rebuilt = data | {"weights": [Weights(**row) for row in data["weights"]]}
    rebuilt |= {"results": [Result(**row) for row in data["results"]]}
    assert BackboneSpec(**rebuilt) == full_spec()


def test_info_is_a_spec_that_knows_its_owner():
    info = BackboneInfo(**SPEC, canonical_name="nets/net_s", plugin="nets", distribution="some-nets", version="1.0")
    assert isinstance(info, BackboneSpec)
    assert pickle.loads(pickle.dumps(info)) == info
    assert info.as_dict()["canonical_name"] == "nets/net_s"
