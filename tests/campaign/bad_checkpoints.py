"""Small models of five families, and checkpoints that are wrapped, damaged or another's: for `test_checkpoints.py`."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from backbones import build_backbone

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16": {"dim": 48, "depth": 3, "heads": 3, "img_size": 64},
    "swin_tiny": {"dims": [16, 32, 64, 128], "depths": [2, 2, 2, 2], "heads": [1, 2, 4, 8]},
    "pvt_v2_b0": {"dims": [16, 32, 64, 128], "depths": [2, 2, 2, 2], "heads": [1, 2, 4, 8]},
    "convnext_tiny": {"dims": [16, 32, 64, 128], "depths": [1, 1, 2, 1]},
    "timm/test_resnet": {},
}
MAIN = ("vit_tiny_patch16", "swin_tiny", "pvt_v2_b0")

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what must become of it.

    Args:
        kind: for the counts.
        name: what was done to it.
        family: whose model it is loaded into.
        make: the checkpoint: a mapping, or a file that is written into the folder given.
        truth: the weights that the model must then have, all of them; None where it must be refused.
        options: of the model that takes it, beside the family's.
    """

    kind: str
    name: str
    family: str
    make: Callable[[Path], Any]
    truth: Callable[[], State] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def build(family: str, **options: Any) -> torch.nn.Module:
    return build_backbone(family, **{**FAMILIES[family], **options}).eval()


@torch.no_grad()
def drawn(model: torch.nn.Module, seed: int = 0) -> State:
    """Random weights for a model, of about the size that trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            state[name] = value.clone()
        elif value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) * max(1, value[0].numel()) ** -0.5
        else:
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
    return state


def all_cases() -> list[Case]:
    return [
        case
        for make in (wrapped, prefixed, of_other_dtypes, damaged, parts, files, variants, strangers)
        for case in make()
    ]


def states(names: tuple[str, ...] = MAIN) -> Iterator[tuple[str, State, State]]:
    """A family with weights, and noise under the same names."""
    for family in names:
        model = build(family)
        yield family, drawn(model), drawn(model, seed=1)


# What loads: the same weights otherwise packed


def wrapped() -> Iterator[Case]:
    names = (
        *("state_dict", "state_dict_ema", "model", "model_ema", "model_state", "model_state_dict", "module", "ema"),
        *("net", "network", "params", "params_ema", "student", "teacher", "backbone", "encoder", "weights", "mine"),
    )
    for family, state, noise in states():
        packed = {name: {name: state} for name in names}
        packed |= {
            "model.state_dict": {"epoch": 1, "model": {"state_dict": state}},
            "ema.module": {"model": noise, "ema": {"decay": 0.9, "module": state}},
            "an empty state_dict_ema": {"state_dict_ema": {}, "state_dict": state},
            "an averaged half": {"ema": dict(list(state.items())[::2]), "model": state},
            "a teacher beside its student": {"student": noise, "teacher": state},
            "averages beside the weights": {"params": noise, "params_ema": state},
            "moments of an optimizer": {"optimizer": {"exp_avg": noise}, "net": state},
            "what holds itself": holding_itself(state),
            "numbers beside it": {"weights": state, "step": torch.tensor(3), "best": 0.5},
        }
        for name, content in packed.items():
            yield Case("container", name, family, lambda _, c=content: c, lambda s=state: s)
        two = {"one": state, "other": noise}
        yield Case("container", "two that nothing tells apart", family, lambda _, c=two: c)


def holding_itself(state: State) -> dict[str, Any]:
    content: dict[str, Any] = {"state_dict": state}
    content["model"] = content
    return content


def prefixed() -> Iterator[Case]:
    around = {"decode_head.conv_seg.weight": torch.ones(2, 3), "neck.fpn.0.bias": torch.ones(2)}
    for family, state, noise in states():

        def under(prefix: str, content: State = state) -> State:
            return {prefix + key: value for key, value in content.items()}

        packed = {
            prefix: under(prefix)
            for prefix in ("module.", "backbone.", "model.backbone.", "_orig_mod.", "encoder.", "model.", "a.b.c.d.")
        }
        packed |= {
            "backbone. of a segmenter": under("backbone.") | around,
            "student. and teacher.": under("student.backbone.", noise) | under("teacher.backbone."),
            "in state_dict": {"state_dict": under("module.model.")},
        }
        for name, content in packed.items():
            yield Case("prefix", name, family, lambda _, c=content: c, lambda s=state: s)
        two = under("left.") | under("right.", noise)
        yield Case("prefix", "two that nothing tells apart", family, lambda _, c=two: c)
        half = {("backbone." if i % 2 else "") + k: v for i, (k, v) in enumerate(state.items())}
        yield Case("prefix", "half of it under backbone.", family, lambda _, c=half: c)


def of_other_dtypes() -> Iterator[Case]:
    for family, state, _ in states():
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
            kept = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in cast.items()}
            yield Case("dtype", str(dtype), family, lambda _, c=cast: c, lambda s=kept: s)
        for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64):
            cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
            yield Case("dtype", str(dtype), family, lambda _, c=cast: c)


def parts() -> Iterator[Case]:
    for family in MAIN:
        whole = build(family, features_only=False, num_classes=10)
        state = drawn(whole)
        if family != "vit_tiny_patch16":  # whose pyramid is new
            for name, options in {"a classifier": {}, "pruned": {"out_indices": (0, 1)}}.items():
                truth = {key: state[key] for key in build(family, **options).state_dict()}
                yield Case("part", name, family, lambda _, s=state: s, lambda t=truth: t, options)
        broken = {k: v for k, v in state.items() if k != "head.bias"}
        options = {"features_only": False, "num_classes": 10}
        yield Case("part", "half a head", family, lambda _, s=broken: s, None, options)


# What is refused


def damaged() -> Iterator[Case]:
    for family, state, _ in states():
        weight = next(k for k, v in state.items() if k.endswith(("qkv.weight", "attn.q.weight")))
        bias = weight.replace("weight", "bias")

        def but(state: State = state, **changes: Any) -> State:
            return state | {k.replace("__", "."): v for k, v in changes.items()}

        def poisoned(number: float, dtype: torch.dtype, state: State = state, weight: str = weight) -> State:
            value = state[weight].to(dtype, copy=True)
            value[0, 0] = number
            return state | {weight: value}

        faults: dict[str, Any] = {
            "NaN": poisoned(float("nan"), torch.float32),
            "infinite": poisoned(float("inf"), torch.float32),
            "negative infinite": poisoned(float("-inf"), torch.float16),
            "beyond float32": poisoned(1e300, torch.float64),
            "meta": {k: v.to("meta") for k, v in state.items()},
            "one meta": state | {weight: state[weight].to("meta")},
            "sparse": state | {weight: state[weight].to_sparse()},
            "sparse rows": state | {weight: state[weight].to_sparse_csr()},
            "quantised": state | {weight: torch.quantize_per_tensor(state[weight], 0.1, 0, torch.qint8)},
            "one of integers": state | {bias: state[bias].to(torch.int32)},
            "one complex": state | {bias: state[bias].to(torch.complex64)},
            "one missing": {k: v for k, v in state.items() if k != weight},
            "biases missing": {k: v for k, v in state.items() if not k.endswith("bias")},
            "one too many": state | {weight.replace("weight", "extra"): torch.ones(3)},
            "renamed": {("x" + k if k == weight else k): v for k, v in state.items()},
            "all renamed": {f"{k}_": v for k, v in state.items()},
            "in capitals": {k.upper(): v for k, v in state.items()},
            "transposed": {k: v.T.reshape(-1, v.shape[0]) if k == weight else v for k, v in state.items()}
            if state[weight].shape[0] != state[weight].shape[1]
            else state | {weight: state[weight].T[:-1]},
            "a row short": state | {weight: state[weight][:-1]},
            "empty": state | {weight: torch.empty(0)},
            "a number": state | {weight: torch.tensor(1.0)},
            "flattened": state | {weight: state[weight].flatten()},
            "shuffled": dict(zip(state, [*list(state.values())[1:], next(iter(state.values()))], strict=True)),
            "the first half": dict(list(state.items())[: len(state) // 2]),
            "names that are numbers": dict(enumerate(state.values())),
            "some names that are numbers": dict(list(state.items())[:-1]) | {7: list(state.values())[-1]},
            "arrays": {k: v.numpy() for k, v in state.items()},
            "lists": {k: v.tolist() for k, v in list(state.items())[:3]},
            "nothing": {},
            "no tensors": {"epoch": 1, "args": {"lr": 0.1}},
            "in a list": {"models": [state, state]},
        }
        for name, content in faults.items():
            yield Case("damage", name, family, lambda _, c=content: c)


def files() -> Iterator[Case]:
    family = "pvt_v2_b0"
    state = drawn(build(family))

    def saved(suffix: str, share: float = 1.0, content: Any = state) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            path = folder / f"checkpoint{suffix}"
            save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
            with path.open("r+b") as file:
                file.truncate(int(path.stat().st_size * share))
            return path

        return write

    def written(suffix: str, content: bytes) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            (folder / f"checkpoint{suffix}").write_bytes(content)
            return folder / f"checkpoint{suffix}"

        return write

    def flipped(folder: Path) -> Path:
        path = saved(".safetensors")(folder)
        content = bytearray(path.read_bytes())
        content[20:40] = b"\xff" * 20  # in the header
        path.write_bytes(content)
        return path

    for suffix in (".pth", ".safetensors", ".bin"):
        yield Case("file", f"good {suffix}", family, saved(suffix), lambda: state)
        for share in (0.0, 0.01, 0.5, 0.99):
            yield Case("file", f"{share} of a {suffix}", family, saved(suffix, share))
        for name, content in {"text": b"404", "page": b"<!DOCTYPE html>", "zip": b"PK\x03\x04junk" * 9}.items():
            yield Case("file", f"{name} as {suffix}", family, written(suffix, content))
    yield Case("file", "a damaged header", family, flipped)
    yield Case("file", "a pickle of arrays", family, written(".pkl", pickle.dumps({"w": np.ones(3)})))
    yield Case("file", "a list", family, saved(".pth", content=[state]))
    yield Case("file", "a whole model", family, saved(".pth", content=torch.nn.Linear(2, 2)))
    yield Case("file", "none", family, lambda folder: folder / "gone.pth")
    yield Case("file", "a folder", family, lambda folder: folder)
    yield Case("file", "safetensors called .pth", family, lambda f: saved(".safetensors")(f).rename(f / "x.pth"))


def variants() -> Iterator[Case]:
    others: dict[str, list[dict[str, Any]]] = {
        "vit_tiny_patch16": [
            *({"depth": 4}, {"depth": 2}, {"dim": 96}, {"patch_size": 8}, {"mlp_ratio": 2}, {"class_token": False}),
            *({"init_values": 1e-5}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}, {"qk_norm": True}),
            *(
                {"distilled": True},
                {"conv_stem": [8, 16, 24, 48]},
                {"in_chans": 4},
                {"in_chans": 1},
            ),
            {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
        ],
        "swin_tiny": [
            *({"depths": [2, 2, 4, 2]}, {"depths": [2, 2, 1, 2]}, {"heads": [2, 4, 8, 16]}, {"in_chans": 4}),
            *({"dims": [32, 64, 128, 256]}, {"dims": [16, 32, 64, 64]}, {"out_norm": True}),
        ],
        "pvt_v2_b0": [
            *({"depths": [2, 2, 4, 2]}, {"depths": [1, 2, 2, 2]}, {"sr_ratios": [4, 4, 2, 1]}, {"linear": True}),
            *({"mlp_ratios": [4, 8, 4, 4]}, {"in_chans": 5}, {"dims": [16, 32, 64, 64]}, {"out_norm": True}),
        ],
        "convnext_tiny": [{"depths": [1, 1, 3, 1]}, {"dims": [16, 32, 64, 96]}, {"out_norm": True}, {"in_chans": 2}],
    }
    for family, rows in others.items():
        for options in rows:
            state = drawn(build(family, **options))
            yield Case("variant", str(options), family, lambda _, s=state: s)
            if (
                options.keys() & {"in_chans", "out_norm", "class_token", "distilled", "pyramid"}
                or "conv_stem" in options
            ):
                continue  # the other way round it is adapted, new, or a part
            plain = drawn(build(family))
            yield Case("variant", f"plain into {options}", family, lambda _, s=plain: s, None, options)


def strangers() -> Iterator[Case]:
    drawn_of = {family: drawn(build(family)) for family in FAMILIES}
    for family in FAMILIES:
        for other, state in drawn_of.items():
            if other != family:
                yield Case("stranger", other, family, lambda _, s=state: s)
