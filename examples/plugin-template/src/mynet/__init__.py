"""MyNet, as a plugin of dense-backbones. This module is read by `backbones list`: it imports no torch."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1

# variant: widths of the maps, blocks per stage, parameters in millions (1000 classes)
_VARIANTS = {
    "s": ((32, 64, 128, 256), (1, 1, 2, 1), 1.52),
    "m": ((48, 96, 192, 384), (2, 2, 4, 2), 5.11),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """MyNet, small and medium."""
    return [
        BackboneSpec(
            name=f"mynet_{variant}",
            family="MyNet",
            entry="mynet.model:MyNet",
            channels=dims,
            strides=(4, 8, 16, 32),
            defaults={"dims": dims, "depths": depths},
            params=params,
            summary="residual blocks of depth-wise convolutions",
        )
        for variant, (dims, depths, params) in _VARIANTS.items()
    ]
