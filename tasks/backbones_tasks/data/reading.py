"""One rule for a data set: which bands of a file a model sees, and which values are black and white."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbones.errors import InputError

from .images import Stored, UnreadableImage, decode

Range = Literal["uint8", "uint16", "dtype"] | tuple[float, float]
Bands = Literal["all"] | list[int]

PAD_COLOUR = (124, 116, 104)  # ImageNet's mean: zero once normalised
RGB = (0, 1, 2)
SHOWN = (2, 98)  # percentiles that are black and white in a picture of what is no photograph


@dataclass(frozen=True)
class Reading:
    """How image files become channels from 0 to 1, in training and in prediction.

    range: the values that become 0 and 1, what lies beyond is cut; "uint8" is 0 to 255, "uint16" 0 to 65535, "dtype"
    what each file's integer type can hold, and 0 to 1 for floating-point numbers. None: files have 8 bits.
    bands: indices, from 0, of the bands to take, in this order. None: an image is RGB, or grey and taken three times.
    nodata: the value, in the files' own units, that stands in where there is none (NaN, infinite, or what the file
    says means "no data"). None: such pixels are an error.
    mean, std: of each channel, from 0 to 1; None leaves them to the backbone's weights.
    """

    range: str | Sequence[float] | None = None
    bands: Sequence[int] | None = None
    nodata: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("range", "bands", "mean", "std"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.range, tuple):
            if len(self.range) != 2 or not all(map(math.isfinite, self.range)) or self.range[0] >= self.range[1]:
                raise InputError(f"range={list(self.range)}: give two numbers, the lower one first")
        elif self.range not in (None, "uint8", "uint16", "dtype"):
            raise InputError(f"range={self.range!r}: give [low, high], or one of uint8, uint16, dtype")
        if self.bands is not None and (not self.bands or min(self.bands) < 0):
            raise InputError(f"bands={list(self.bands)}: give indices of bands, from 0, or 'all'")
        if (self.mean is None) != (self.std is None):
            raise InputError("mean and std are given together, or not at all")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and (len(value) != self.channels or not all(map(math.isfinite, value))):
                raise InputError(f"{name}={list(value)}: give {self.channels} numbers, one per band")
        if self.std is not None and min(self.std) <= 0:
            raise InputError(f"std={list(self.std)}: each must be over 0")

    def plain(self) -> dict[str, Any]:
        """Its options in lists, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @property
    def channels(self) -> int:
        return len(self.bands or RGB)

    @property
    def photographs(self) -> bool:
        """Whether images are what people look at: RGB of 8 bits."""
        return self.range is None and self.channels == 3

    @property
    def fill(self) -> list[float]:
        """A pixel that is zero once normalised, as images are read."""
        colour = [255 * value for value in self.mean] if self.mean else list(PAD_COLOUR)
        if self.channels != len(colour):
            colour = [127.0] * self.channels
        return [round(value) for value in colour] if self.range is None else [value / 255 for value in colour]

    def read(self, path: str | Path) -> np.ndarray:
        """An image file as (H, W, channels): uint8 where no `range` is given, else float32 from 0 to 1.

        Raises:
            one of `images.UNREADABLE`; the message says why, and what to do
        """
        return self.arrange(decode(path))

    def tensor(self, path: str | Path) -> Tensor:
        """The same as (channels, H, W)."""
        return torch.from_numpy(np.array(self.read(path))).permute(2, 0, 1).contiguous()

    def arrange(self, stored: Stored) -> np.ndarray:
        """What `read` returns, of an image that is decoded."""
        values = self._take(stored)
        if values.dtype == np.uint8 and self.range is None:
            return np.ascontiguousarray(values)
        low, high = self._limits(values)
        values = self._fill(values, stored.nodata, low, high)
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(1 / (high - low))
        return scaled.clip(0, 1, out=scaled)

    def picture(self, image: np.ndarray | Tensor) -> np.ndarray:
        """What to show people, (H, W, 3) uint8, of an image (H, W, C) as it is read, or (C, H, W) from 0 to 1.

        The first three bands, or the first alone, in grey, where there are fewer; stretched unless they are
        photographs.
        """
        if isinstance(image, Tensor):
            image = image.permute(1, 2, 0).numpy()
        if self.photographs:
            return image if image.dtype == np.uint8 else (image * 255).astype(np.uint8)
        image = (image[..., :3] if image.shape[-1] > 2 else image[..., [0, 0, 0]]).astype(np.float32)
        low, high = np.percentile(image, SHOWN)
        return ((image - low) * (255 / max(high - low, 1e-6))).clip(0, 255).astype(np.uint8)

    def _take(self, stored: Stored) -> np.ndarray:
        values, count = stored.values, stored.values.shape[-1]
        if self.bands is not None:
            if max(self.bands) >= count:
                raise UnreadableImage(f"has {_count(count)}, counted from 0; --data.bands asks for {max(self.bands)}")
            return values if self.bands == tuple(range(count)) else values[..., list(self.bands)]
        if stored.alpha:
            white = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else 1
            if (values[..., -1] != white).any():
                raise UnreadableImage(
                    "is transparent in places, and what lies below is not told: save it without alpha, or train with "
                    f"--data.bands '{list(range(count - 1))}', which leaves the alpha channel out"
                )
            values, count = values[..., :-1], count - 1
        if count == 1:
            return np.repeat(values, 3, axis=-1)
        if count != 3:
            raise UnreadableImage(
                f"has {_count(count)}, and which to take is not told: --data.bands all, or such as "
                f"'{list(range(min(count, 3)))}'"
            )
        return values

    def _limits(self, values: np.ndarray) -> tuple[float, float]:
        kind = values.dtype
        if self.range is None:
            low, high = _extremes(values)
            suggested = "" if kind.kind == "f" else ", or dtype for all that its type can hold"
            raise UnreadableImage(
                f"holds {kind} from {low:g} to {high:g}, and which values are black and white is not told: "
                f"--data.range '[{low:g}, {high:g}]'{suggested}"
            )
        if self.range == "dtype":
            if kind.itemsize > 2 and kind.kind in "ui":
                raise UnreadableImage(f"holds {kind}, all of whose range no image fills: --data.range '[LOW, HIGH]'")
            limits = (0.0, 1.0) if kind.kind == "f" else (float(np.iinfo(kind).min), float(np.iinfo(kind).max))
            if kind.kind == "f" and not (limits[0] <= _extremes(values)[0] <= _extremes(values)[1] <= limits[1]):
                low, high = _extremes(values)
                raise UnreadableImage(
                    f"holds {kind} from {low:g} to {high:g}, not from 0 to 1: --data.range '[LOW, HIGH]'"
                )
            return limits
        low, high = {"uint8": (0, 255), "uint16": (0, 65535)}.get(self.range, self.range)
        if kind == np.uint8 and high > 255:
            raise UnreadableImage(
                f"holds 8 bits, which reach 255 and not {high:g} as --data.range says: where files of several kinds "
                "are mixed, --data.range dtype takes each by its own"
            )
        if kind.kind in "uif" and self.range == "uint8" and _extremes(values)[1] > 255:
            raise UnreadableImage(f"holds values up to {_extremes(values)[1]:g}, beyond --data.range uint8")
        return float(low), float(high)

    def _fill(self, values: np.ndarray, nodata: float | None, low: float, high: float) -> np.ndarray:
        missing = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        if nodata is not None and math.isfinite(nodata) and not low <= nodata <= high:
            missing |= values.astype(np.float64) == nodata
        if not missing.any():
            return values
        if self.nodata is None:
            share = missing.any(-1).mean()
            raise UnreadableImage(
                f"has no data (NaN, infinite or marked as such) in {share:.2%} of its pixels: --data.nodata VALUE says "
                "what stands in for it"
            )
        return np.where(missing, np.array(self.nodata, dtype=np.float32), values)


def read_image(path: str | Path) -> Image.Image:
    """A photograph as RGB, upright: palettes and grey included, but nothing that needs a rule."""
    return Image.fromarray(Reading().read(path))


def to_unit(image: Tensor) -> Tensor:
    """An image as it is read, uint8 or float32, as float32 from 0 to 1."""
    image = image.as_subclass(Tensor)
    return image.float() / 255 if image.dtype == torch.uint8 else image


def statistics(reading: Reading, files: Sequence[Path], most: int = 100) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over images, at most so many, evenly spread."""
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)]
    total = np.zeros((2, reading.channels))
    pixels = 0
    for file in chosen:
        image = reading.read(file).reshape(-1, reading.channels).astype(np.float64)
        image = image / 255 if reading.range is None else image
        total += [image.sum(0), (image**2).sum(0)]
        pixels += len(image)
    mean = total[0] / pixels
    std = np.sqrt(np.maximum(total[1] / pixels - mean**2, 0))
    std[std < 1e-6] = 1.0  # a band of one value says nothing, at any scale
    return mean.round(5).tolist(), std.round(5).clip(1e-5).tolist()


def doubts(reading: Reading, files: Sequence[Path], most: int = 20) -> str | None:
    """What may not be meant by a range, by at most so many of the files: that it cuts values off, or is hardly used."""
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)]
    images = [reading.read(file) for file in chosen]
    pixels = sum(image.size for image in images)
    black, white = (sum(int((image == end).sum()) for image in images) / pixels for end in (0, 1))
    highest = max(float(image.max()) for image in images)
    told = reading.range if isinstance(reading.range, str) else list(reading.range)
    if highest < 0.1:
        return f"no value of {len(images)} images reaches more than {highest:.1%} of --data.range {told}: all is dark"
    if max(black, white) > 0.2:
        return (
            f"{black:.0%} of the values of {len(images)} images are black and {white:.0%} white by --data.range {told}"
        )
    return None


def in_channels(backbone: Any, reading: Reading) -> Any:
    """A backbone's name or options, made to take images as they are read: `in_chans`, mean and std; modules as is.

    Raises:
        InputError: its options have another number of channels
    """
    if not isinstance(backbone, str | dict):
        return backbone
    options = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    if options.get("in_chans", reading.channels) != reading.channels:
        raise InputError(
            f"model.backbone: in_chans={options['in_chans']}, but images are read with {_count(reading.channels)}; "
            "--data.bands says which, and in_chans follows"
        )
    if reading.channels != 3:
        options["in_chans"] = reading.channels
    if reading.mean is not None:
        told = {"mean": list(reading.mean), "std": list(reading.std)}
        options["pretrained_cfg"] = {**(options.get("pretrained_cfg") or {}), **told}
    return backbone if options == {"name": backbone} else options


def _extremes(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return (float(finite.min()), float(finite.max())) if finite.size else (math.nan, math.nan)


def _count(bands: int) -> str:
    return f"{bands} band{'s'[: bands != 1]}"
