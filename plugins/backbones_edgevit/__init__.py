"""EdgeViT, as a plugin."""

from pathlib import Path

from backbones import BackboneSpec, hookimpl
from backbones.specs import read_results

BACKBONES_API = 1

_RESULTS = read_results(Path(__file__).with_name("results.csv"))

# variant: dims, depths, heads, parameters in millions (1000 classes), GMACs
_VARIANTS = {
    "xxs": ((36, 72, 144, 288), (1, 1, 3, 2), (1, 2, 4, 8), 4.07, 0.55),
    "xs": ((48, 96, 240, 384), (1, 1, 3, 1), (1, 2, 5, 8), 6.77, 1.13),
    "s": ((48, 96, 240, 384), (1, 2, 5, 3), (1, 2, 5, 8), 13.11, 1.91),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """EdgeViT xxs, xs and s; the authors' checkpoints load from a path."""
    return [
        BackboneSpec(
            name=f"edgevit_{variant}",
            results=_RESULTS.get(f"edgevit_{variant}", ()),
            family="EdgeViT",
            entry="backbones_edgevit.edgevit:EdgeViT",
            channels=dims,
            strides=(4, 8, 16, 32),
            defaults={"dims": dims, "depths": depths, "heads": heads},
            params=params,
            gmacs=gmacs,
            summary="local aggregation by convolutions, attention among sparse cells, propagation back to the rest",
            paper="https://arxiv.org/abs/2205.03436",
            license="Apache-2.0",
        )
        for variant, (dims, depths, heads, params, gmacs) in _VARIANTS.items()
    ]
