"""Twins-SVT and Twins-PCPVT, as a plugin."""

from pathlib import Path

from backbones import BackboneSpec, Weights, hookimpl
from backbones.specs import read_results

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# variant: dims, depths, heads, parameters in millions (1000 classes), GMACs at 224 x 224, ImageNet top-1 where known
_SVT = {
    "small": ((64, 128, 256, 512), (2, 2, 10, 4), (2, 4, 8, 16), 24.06, 2.93, 81.7),
    "base": ((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24), 56.07, 8.56, None),
    "large": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32), 99.27, 15.11, 83.7),
}
_PCPVT = {
    "small": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), 24.11, 3.81, 81.2),
    "base": ((64, 128, 320, 512), (3, 4, 18, 3), (1, 2, 5, 8), 43.83, 6.65, 82.7),
    "large": ((64, 128, 320, 512), (3, 8, 27, 3), (1, 2, 5, 8), 60.99, 9.81, None),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """Twins-SVT and Twins-PCPVT, small to large."""
    svt = {"window_size": 7, "mlp_ratios": (4, 4, 4, 4)}
    pcpvt = {"window_size": None, "mlp_ratios": (8, 8, 4, 4)}
    return [
        *(
            _spec("svt", size, row, svt, "attention within windows, then to a reduced map")
            for size, row in _SVT.items()
        ),
        *(_spec("pcpvt", size, row, pcpvt, "attention to a reduced map") for size, row in _PCPVT.items()),
    ]


def _spec(kind: str, size: str, row: tuple, defaults: dict, how: str) -> BackboneSpec:
    dims, depths, heads, params, gmacs, top1 = row
    name = f"twins_{kind}_{size}"
    return BackboneSpec(
        name=name,
        results=_RESULTS.get(name, ()),
        family=f"Twins-{kind.upper()}",
        entry="backbones_twins.twins:Twins",
        channels=dims,
        strides=(4, 8, 16, 32),
        defaults={"dims": dims, "depths": depths, "heads": heads, **defaults},
        weights=(
            Weights(
                tag="in1k",
                source=f"hf-hub:timm/{name}.in1k",
                license="Apache-2.0",
                classes=1000,
                metrics={"imagenet_top1": top1} if top1 else {},
            ),
        ),
        options=("window_size",) if kind == "svt" else (),
        params=params,
        gmacs=gmacs,
        summary=f"pyramid of transformer stages: {how}; convolutional position encodings",
        paper="https://arxiv.org/abs/2104.13840",
        license="Apache-2.0",
    )
