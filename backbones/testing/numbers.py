"""The values of maps: what they depend on, and in which dtype and where they are computed."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..backbone import Backbone
from .common import Build, called_in_eval, fail, random_images, require, require_close, require_near


def check_batch_independence(build: Build) -> None:
    """An image's maps do not depend on what else is in the batch."""
    model, images, maps = called_in_eval(build, 65, 80)
    with torch.no_grad():
        alone = model(images[1:])
    without = [n for n, m in model.named_modules() if _is_batch_norm(m) and m.running_mean is None]
    remedy = "in eval mode, compute nothing over the batch: "
    if without:
        remedy += f"{without[0]} is a batch norm without running statistics, build it with track_running_stats=True"
    else:
        remedy += (
            "look for a mean or a maximum that takes in dimension 0, a reshape that mixes it with others, and a norm "
            "that uses statistics of the batch where self.training is false"
        )
    for i, (both, one) in enumerate(zip(maps, alone, strict=True)):
        require_close(both[1:], one, f"map {i} of an image alone and in a batch differ", remedy, tolerance=1e-4)


def check_calls_are_independent(build: Build) -> None:
    """In eval mode the same images give the same maps; no call changes its images or what an earlier one returned."""
    model = build().eval()
    images = random_images(model, 64, 64)
    kept = images.clone()
    with torch.no_grad():
        first = model(images)
        copies = [m.clone() for m in first]
        require(torch.equal(images, kept), "the images were overwritten", "do not write in place to what comes in")
        model(torch.randn_like(images))
        for i, (a, b) in enumerate(zip(first, copies, strict=True)):
            require(
                torch.equal(a, b),
                f"the next call changed map {i} of the first",
                "return a new tensor each time, and no buffer that is used again",
            )
        for i, (b, c) in enumerate(zip(copies, model(images), strict=True)):
            require(
                torch.equal(b, c),
                f"the same images gave another map {i}, in eval mode",
                "draw nothing at random where self.training is false, and let no call change what the next one uses",
            )


def check_own_memory(build: Build) -> None:
    """Each map has memory of its own: what a head writes into it is seen in no other map, and by no later call."""
    model, images, maps = called_in_eval(build)
    kept, expected = images.clone(), [m.clone() for m in maps]
    for i, m in enumerate(maps):
        require(
            all(stride or side == 1 for stride, side in zip(m.stride(), m.shape, strict=True)),
            f"map {i} has stride 0: {tuple(m.stride())} of {tuple(m.shape)}, so that many of its cells are one number",
            "return what expand() gives by way of .contiguous()",
        )
        with torch.no_grad():
            m.fill_(7.0)
        written = [j for j in range(i + 1, len(maps)) if not torch.equal(maps[j], expected[j])]
        require(
            not written,
            f"map {i} shares memory with maps {written}",
            "return tensors of their own: clone() what is a view of another map",
        )
        require(
            torch.equal(images, kept),
            f"map {i} is a view of the images",
            "clone() what is returned of them",
        )
    with torch.no_grad():
        again = model(images)
    changed = [i for i, (a, b) in enumerate(zip(again, expected, strict=True)) if not torch.equal(a, b)]
    require(
        not changed,
        f"after a head has written into all maps, the next call gives other maps {changed}",
        "return no parameter, buffer or kept table as a map, nor a view of one: clone() it",
    )


def check_sizes_are_independent(build: Build) -> None:
    """What a model was called with before changes no map: other sizes, batches, dtypes and modes."""
    fresh = build().eval()
    model = copy.deepcopy(fresh)
    # As many cells in another shape, the same after padding, another size and batch, and the first again.
    sizes = [(2, 64, 96), (2, 96, 64), (2, 61, 90), (1, 128, 48), (3, 64, 96)]
    batches = [torch.randn(batch, model.in_chans, *size) for batch, *size in sizes]
    expected = []
    with torch.no_grad(), _forgotten(model):
        for images in batches:
            with _forgotten(model):
                expected.append(copy.deepcopy(fresh)(images))
        for size, images, alone in zip(sizes, batches, expected, strict=True):
            try:
                maps = model(images)
            except Exception as error:  # whatever a stale table leads to
                fail(
                    f"images of {size} (B, H, W) are taken by a fresh model, and raise {type(error).__name__} in one "
                    f"that was called with other sizes: {error}",
                    _KEPT,
                )
            for i, (a, b) in enumerate(zip(maps, alone, strict=True)):
                what = f"map {i} of images of {size} (B, H, W) depends on the sizes of earlier calls"
                require_close(a, b, what, _KEPT, tolerance=1e-4)


@contextmanager
def _forgotten(model: Backbone) -> Iterator[None]:
    """Afterwards, what was added to dicts of the layers' classes and files is taken out; lru_cache's are empty."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if not _is_torchs(kind)}
    owners = [*kinds, *(sys.modules[name] for name in {kind.__module__ for kind in kinds} & sys.modules.keys())]
    values = [value for owner in owners for name, value in vars(owner).items() if not name.startswith("__")]
    kept = [(value, set(value)) for value in values if type(value) is dict]
    try:
        yield
    finally:
        for value in values:
            getattr(value, "cache_clear", lambda: None)()
        for value, was in kept:
            for key in value.keys() - was:
                del value[key]


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


_KEPT = (
    "key whatever is kept between calls by all that it depends on: height and width, not their product, and the size "
    "before padding where it matters, and nothing of the batch; backbones.layers.TableCache keeps several"
)


def check_modes_are_independent(build: Build) -> None:
    """A model that was called in inference mode can be trained, step after step."""
    model = build()
    images = random_images(model, 64, 64)
    with torch.inference_mode():
        model.eval()(images)
    model.train()
    for step in ("the first step of training after a call in inference mode", "the second step of training"):
        try:
            torch.stack([m.square().mean() for m in model(images)]).sum().backward()
        except RuntimeError as error:
            if not any(word in str(error) for word in ("nference", "second time")):
                raise
            fail(
                f"{step} raises: {error}",
                "keep no tensor that one call has computed, or compute it as backbones.layers.TableCache does: outside "
                "of inference mode and without gradients",
            )


def check_dtypes(build: Build) -> None:
    """bfloat16, float16 and float64 models return finite maps of their dtype, also where they were float32 before."""
    called, images, _ = called_in_eval(build)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = copy.deepcopy(called).to(dtype) if dtype != torch.float64 else called.to(dtype)
        with torch.no_grad():
            maps = model(images.to(dtype))
        kinds = {str(m.dtype) for m in maps}
        require(
            kinds == {str(dtype)},
            f"a model in {dtype} returns {', '.join(sorted(kinds))}",
            "make tensors with the dtype of the images, tables included, and cast back what is computed in float32",
        )
        require(
            all(bool(m.isfinite().all()) for m in maps),
            f"in {dtype} maps are not finite",
            "keep what overflows or underflows it, such as sums over many cells and epsilons, in float32",
        )


def check_devices(build: Build) -> None:
    """The model runs where it is moved to, and nothing of it is left behind."""
    model, images, expected = called_in_eval(build, 97, 161)
    with torch.no_grad():
        devices = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]
        for device in devices:
            maps = copy.deepcopy(model).to(device)(images.to(device))
            kinds = {m.device.type for m in maps}
            require(kinds == {device}, f"on {device} the maps are on {kinds}", "make tensors on the images' device")
            if device == "cuda":
                for a, b in zip(expected, maps, strict=True):  # convolutions may run in TF32
                    what = "maps on the GPU differ from those on the CPU"
                    require_near(b.cpu(), a, 1e-2, what, "look for what is drawn, or chosen, by the device")


def check_autocast(build: Build) -> None:
    """Under autocast to bfloat16, maps have one dtype, and stay close to those in float32."""
    model, images, maps = called_in_eval(build, 128, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    kinds = [str(m.dtype).removeprefix("torch.") for m in mixed]
    require(
        len(set(kinds)) == 1,
        f"under autocast to bfloat16, maps are of {', '.join(kinds)}",
        "let all maps leave by the same kind of layer, or cast those that differ to the dtype of the others",
    )
    for i, (a, b) in enumerate(zip(maps, mixed, strict=True)):
        what = f"under autocast map {i} is far from that in float32"
        require_near(b.float(), a, 0.1, what, "compute in float32 what needs it, under autocast(enabled=False)")


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
