"""MyNet, as a plugin of dense-backbones. This module is read by `backbones list`: it imports no torch."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1

# variant: widths of the maps, blocks per stage, parameters in millions
_VARIANTS = {
    "s": ((32, 64, 128, 256), (1, 1, 2, 1), 1.25),
    "m": ((48, 96, 192, 384), (2, 2, 4, 2), 4.68),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """MyNet, small and medium."""
    return [
        BackboneSpec(
            name=f"mynet_{variant}",
            family="MyNet",
            entry="mynet.model:mynet",
            channels=dims,
            strides=(4, 8, 16, 32),
            defaults={"dims": dims, "depths": depths},
            params=params,
            summary="a network that returns maps, wrapped",
        )
        for variant, (dims, depths, params) in _VARIANTS.items()
    ]
