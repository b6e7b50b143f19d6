"""Visual Attention Network, as a plugin of dense-backbones. This module imports no torch."""

from backbones import BackboneSpec, hookimpl

BACKBONES_API = 1

# variant: widths, blocks per stage, parameters (M), multiply-adds (G)
_VARIANTS = {
    "b0": ((32, 64, 160, 256), (3, 3, 5, 2), 4.11, 0.86),
    "b1": ((64, 128, 320, 512), (2, 2, 4, 2), 13.86, 2.5),
    "b2": ((64, 128, 320, 512), (3, 3, 12, 3), 26.58, 4.99),
    "b3": ((64, 128, 320, 512), (3, 5, 27, 3), 44.77, 8.93),
    "b4": ((64, 128, 320, 512), (3, 6, 40, 3), 60.28, 12.14),
    "b5": ((96, 192, 480, 768), (3, 3, 24, 3), 89.97, 17.13),
    "b6": ((96, 192, 384, 768), (6, 6, 90, 6), 199.83, 38.71),
}


@hookimpl
def register_backbones() -> list[BackboneSpec]:
    """VAN-B0 to VAN-B6."""
    return [
        BackboneSpec(
            name=f"van_{variant}",
            family="VAN",
            entry="backbones_van.van:VisualAttentionNetwork",
            channels=dims,
            strides=(4, 8, 16, 32),
            defaults={"dims": dims, "depths": depths},
            params=params,
            gmacs=gmacs,
            summary="large kernels as attention, in four stages of convolutions",
            paper="https://arxiv.org/abs/2202.09741",
            license="Apache-2.0",
        )
        for variant, (dims, depths, params, gmacs) in _VARIANTS.items()
    ]
