"""Programs made of a model: `torch.jit.trace`, `torch.export` and `torch.compile`."""

import warnings

import torch

from .common import Build, Skipped, fail, random_images, require_close

_SAME_PROGRAM = "compute from the images alone: what Python decides by their values is decided once for a program"


def check_trace(build: Build) -> None:
    """`torch.jit.trace` of a fresh model passes its own check, and gives the same maps for other images."""
    model = build().eval()
    images, others = random_images(model, 64, 96), random_images(model, 64, 96)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes are constants of a trace, and that torch.jit is old
        try:
            traced = torch.jit.trace(model, images)
        except torch.jit.TracingCheckError as error:
            reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), "")
            fail(
                f"torch.jit.trace of a fresh model gives another graph the second time: {reason}",
                "let no call leave something behind that the next one takes, such as a table in a cache",
            )
        for a, b in zip(traced(others), model(others), strict=True):
            require_close(a, b, "the traced model differs from eager", _SAME_PROGRAM, tolerance=1e-4)


def check_export(build: Build) -> None:
    """`torch.export` gives one program for any batch, height and width."""
    model = build().eval()
    if model.size_divisor > 1 and not hasattr(torch.compiler, "is_exporting"):
        raise Skipped("torch 2.6 cannot prove that a symbolic padding is not negative")
    height, width = (torch.export.Dim(n, min=65, max=2048) for n in ("height", "width"))
    shapes = {"images": {0: torch.export.Dim("batch", max=64), 2: height, 3: width}}
    program = torch.export.export(model, (random_images(model, 200, 333),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for batch, *size in [(1, 224, 224), (3, 97, 161), (2, 128, 300)]:
            images = torch.randn(batch, model.in_chans, *size)
            for a, b in zip(model(images), program(images), strict=True):
                what = f"the exported program differs from eager at {(batch, *size)}"
                require_close(b, a, what, _SAME_PROGRAM, tolerance=1e-4)


def check_compile(build: Build) -> None:
    """`torch.compile` takes the forward without a graph break and gives the same maps."""
    model = build().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in [(97, 161), (224, 224), (128, 300)]:  # a square first would stand for squares alone
            images = random_images(model, *size)
            for a, b in zip(model(images), compiled(images), strict=True):
                what = f"the compiled model differs from eager at {size}"
                require_close(b, a, what, _SAME_PROGRAM, tolerance=1e-4)
