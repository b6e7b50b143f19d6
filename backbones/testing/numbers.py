"""The values of maps: what they depend on, and in which dtype and where they are computed."""

import copy

import torch

from .common import Build, random_images, require, require_close, require_near


def check_batch_independence(build: Build) -> None:
    """An image's maps do not depend on what else is in the batch."""
    model = build().eval()
    images = random_images(model, 65, 80)
    with torch.no_grad():
        for both, alone in zip(model(images), model(images[1:]), strict=True):
            require_close(both[1:], alone, "maps of an image alone and in a batch differ", tolerance=1e-4)


def check_calls_are_independent(build: Build) -> None:
    """In eval mode the same images give the same maps; no call changes its images or what an earlier one returned."""
    model = build().eval()
    images = random_images(model, 64, 64)
    kept = images.clone()
    with torch.no_grad():
        first = model(images)
        copies = [m.clone() for m in first]
        model(torch.randn_like(images))
        again = model(images)
    require(torch.equal(images, kept), "the images were overwritten", "do not write in place to what comes in")
    for a, b, c in zip(first, copies, again, strict=True):
        require(torch.equal(a, b), "a second call changed the maps of the first", "return no buffer that is used again")
        require(torch.equal(b, c), "the same images gave different maps", "draw nothing at random in eval mode")


def check_dtypes(build: Build) -> None:
    """bfloat16, float16 and float64 models return finite maps of their dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = build().eval().to(dtype)
        with torch.no_grad():
            maps = model(random_images(model, 64, 64).to(dtype))
        kinds = {m.dtype for m in maps}
        require(kinds == {dtype}, f"a model in {dtype} returns {kinds}", "make tensors with the dtype of the images")
        require(all(bool(m.isfinite().all()) for m in maps), f"in {dtype} maps are not finite", "")


def check_devices(build: Build) -> None:
    """The model runs where it is moved to, and nothing of it is left behind."""
    model = build().eval()
    images = random_images(model, 97, 161)
    with torch.no_grad():
        expected = model(images)
        devices = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]
        for device in devices:
            maps = copy.deepcopy(model).to(device)(images.to(device))
            kinds = {m.device.type for m in maps}
            require(kinds == {device}, f"on {device} the maps are on {kinds}", "make tensors on the images' device")
            if device == "cuda":
                for a, b in zip(expected, maps, strict=True):  # convolutions may run in TF32
                    require_near(b.cpu(), a, 1e-2, "maps on the GPU differ from those on the CPU")


def check_autocast(build: Build) -> None:
    """Under autocast to bfloat16, maps stay close to those in float32."""
    model = build().eval()
    images = random_images(model, 128, 128)
    with torch.no_grad():
        maps = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
    for a, b in zip(maps, mixed, strict=True):
        require_near(b.float(), a, 0.1, "under autocast the maps are far from those in float32")
