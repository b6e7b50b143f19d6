"""MyNet, as a plugin of dense-backbones. This module is read by `backbones list`: it imports no torch."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1

# variant: width, blocks, attention heads, parameters in millions (1000 classes)
_VARIANTS = {
    "s": (192, 4, 3, 2.12),
    "m": (384, 8, 6, 14.88),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """MyNet, small and medium."""
    return [
        BackboneSpec(
            name=f"mynet_{variant}",
            family="MyNet",
            entry="mynet.model:MyNet",
            channels=(dim // 4, dim // 2, dim, dim),
            strides=(4, 8, 16, 32),
            defaults={"dim": dim, "depth": depth, "heads": heads},
            params=params,
            summary="a plain transformer with rotary positions",
        )
        for variant, (dim, depth, heads, params) in _VARIANTS.items()
    ]
