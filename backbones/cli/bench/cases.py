"""What is measured: a model, what is done to it before it runs, and the load."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from backbones.errors import InputError
from backbones.registry import backbone_info, build_backbone

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Runtimes that timm's model is exported to.
RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model under one load; plain data, so that a fresh process can build it for the memory figure.

    Args:
        name: in the library.
        library: "ours" or "timm".
        options: of the library's builder.
        size: height and width of the images.
        batch: images at a time.
        train: forward and backward instead of forward.
        dtype: of weights with `for_inference` and `cast`, and else by autocast.
        device: where it runs.
        cast: weights and images to the dtype.
        channels_last: lay weights and images out so.
        for_inference: what `backbones.for_inference` makes of the model.
        compile: by `torch.compile`, for this one size.
        runtime: "torch", or one of RUNTIMES.
    """

    #: Where to build it if it shall only be counted.
    counted_on: ClassVar[str] = "meta"

    name: str
    library: str = "ours"
    options: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (512, 512)
    batch: int = 1
    train: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    cast: bool = False
    channels_last: bool = False
    for_inference: bool = False
    compile: bool = False
    runtime: str = "torch"

    @property
    def column(self) -> str:
        """How tables call it, beside its name and dtype."""
        parts = (
            (self.library == "timm", "timm"),
            (self.cast, "cast"),
            (self.library != "timm" and not self.for_inference, "plain"),
            (self.for_inference, "for_inference"),
            (self.channels_last and not self.compile, "channels-last"),
            (self.compile, "compiled"),
            (self.runtime != "torch", self.runtime),
        )
        return " ".join(part for holds, part in parts if holds)

    def build(self, device: str | None = None) -> "tuple[nn.Module, Tensor]":
        """The model, in float32 and as its library builds it, and images, on a device, by default its own."""
        import torch

        device = device or self.device
        if self.library == "timm":
            import timm

            model = timm.create_model(self.name, **self.options)
        else:
            model = build_backbone(self.name, **self.options)
        return model.to(device).train(self.train), torch.randn(self.batch, 3, *self.size, device=device)

    def faster(self, model: "nn.Module") -> "nn.Module":
        """What `for_inference` makes of the model."""
        import torch

        import backbones

        dtype = None if self.dtype == "float32" else getattr(torch, self.dtype)
        return backbones.for_inference(model, dtype=dtype, compile=self.compile)

    def strides(self, model: "nn.Module") -> list[int]:
        """Strides of the maps that the model, or the backbone in it, returns."""
        info: Any = model.feature_info
        return info.reduction()


def columns(name: str, load: Case, versus: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Case]:
    """All that is measured of one name: timm's model, if asked for, and ours, returning maps of the same strides.

    Args:
        name: as `build_backbone` takes it.
        load: whose size, batch, device and kind of step all of them get.
        versus: "timm", "compile" and RUNTIMES, as on the command line.
        dtypes: each makes columns of its own.

    Raises:
        UnknownBackbone: no plugin has the name.
    """
    info = backbone_info(name)
    ours = replace(load, name=info.canonical_name)
    timms = None
    if set(versus) & {"timm", *RUNTIMES}:
        timms, ours = _counterparts(info, load, ours)
    cases = []
    for dtype in dtypes:
        if timms is not None:
            theirs = replace(timms, dtype=dtype)
            best = replace(theirs, channels_last=True)
            cases += [theirs, best]
            if dtype != "float32" and not load.train:  # quicker than autocast, which casts weights at each call
                best = replace(best, cast=True)
                cases.append(best)
            if "compile" in versus:
                cases.append(replace(best, compile=True))
            if dtype == "float32" and not load.train:
                cases += [replace(theirs, runtime=runtime) for runtime in RUNTIMES if runtime in versus]
        plain = replace(ours, dtype=dtype)
        other = replace(plain, channels_last=True) if load.train else replace(plain, for_inference=True)
        cases += [plain, other]
        if "compile" in versus:
            cases.append(replace(other, compile=True))
    return cases


def counterpart(name: str) -> str | None:
    """What timm calls a backbone; None if it has it under none of its names."""
    import timm

    info = backbone_info(name)
    return next((n for n in (info.name, *info.aliases) if timm.is_model(n)), None)


def _counterparts(info: Any, load: Case, ours: Case) -> tuple[Case | None, Case]:
    """timm's and ours, with the options under which they return the same maps."""
    import timm

    known = counterpart(info.canonical_name)
    if known is None:
        return None, ours
    options, size = timm_options(known, load.size)
    ours = replace(ours, size=size)
    info_of_timm: Any = timm.create_model(known, **options).feature_info
    levels = info_of_timm.info
    last = {level["reduction"]: i for i, level in enumerate(levels)}  # timm lists every block of a plain ViT
    shared = [stride for stride in info.strides if stride in last]
    if not shared:
        raise InputError(f"timm's {known} yields maps of strides {sorted(last)}, and {info.name} of {info.strides}")
    options["out_indices"] = tuple(last[stride] for stride in shared)
    ours = replace(ours, options={"out_indices": tuple(info.strides.index(stride) for stride in shared)})
    return replace(ours, library="timm", name=known, options=options), ours


def timm_options(name: str, size: tuple[int, int]) -> tuple[dict[str, Any], tuple[int, int]]:
    """Options under which timm's model takes images of `size`; where there are none, a size that it takes."""
    import timm
    import torch

    cfg = timm.get_pretrained_cfg(name)
    native = cfg.input_size[1:] if cfg else (224, 224)
    tried: list[tuple[dict[str, Any], tuple[int, int]]] = [({}, size), ({"img_size": size}, size), ({}, native)]
    for options, side in tried:
        try:
            with torch.device("meta"), torch.no_grad():
                timm.create_model(name, features_only=True, **options).eval()(torch.empty(1, 3, *side))
        except Exception:  # whatever a model raises for a size it was not built for
            continue
        return {"features_only": True, **options}, side
    raise InputError(f"timm's {name} yields maps neither at {size[0]} x {size[1]} nor at its own {native}")
