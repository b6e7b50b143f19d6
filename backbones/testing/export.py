"""Programs made of a model: `torch.export` and `torch.compile`."""

import torch

from .common import Build, Skipped, random_images, require_close


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
                require_close(b, a, f"the exported program differs from eager at {(batch, *size)}", tolerance=1e-4)


def check_compile(build: Build) -> None:
    """`torch.compile` takes the forward without a graph break and gives the same maps."""
    model = build().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in [(224, 224), (97, 161), (128, 300)]:
            images = random_images(model, *size)
            for a, b in zip(model(images), compiled(images), strict=True):
                require_close(b, a, f"the compiled model differs from eager at {size}", tolerance=1e-4)
