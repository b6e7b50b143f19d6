"""Images too large for memory: read and written in bands of rows, by rasterio."""

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from backbones.errors import MissingDependency

from ..files import whole
from ..pictures.colours import Colour, overlay
from .images import UnreadableImage, orientation

CACHE = 64 * 2**20  # bytes that GDAL may keep of files; by default it takes a share of the machine's memory
BLOCK = 512  # side of the tiles of what is written
PREVIEW = 2048  # longest side of a preview


class Raster:
    """An image file that is read in bands of rows, as RGB; a context manager.

    Takes what GDAL reads (TIFF, GeoTIFF, PNG, JPEG, JPEG 2000, ...), of 1 to 4 bands: grey, palette, RGB, each with
    or without alpha. Values beyond 8 bits are scaled as `images.read_image` scales them.

    Raises:
        UnreadableImage: it cannot be read, here or later
        MissingDependency: rasterio is not installed
    """

    def __init__(self, file: Path):
        self.file = file
        self._rasterio = _import()

    def __enter__(self) -> "Raster":
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", self._rasterio.errors.NotGeoreferencedWarning)
            stack.enter_context(self._rasterio.Env(GDAL_CACHEMAX=CACHE))
            with self._reading():
                self.dataset = stack.enter_context(self._rasterio.open(self.file))
                self._look()
            self._band = np.empty((0, self.width, 3), np.uint8)
            self._end = 0
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    @property
    def height(self) -> int:
        return self.dataset.height

    @property
    def width(self) -> int:
        return self.dataset.width

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows (bottom - top, W, 3) uint8, whose numbers never fall from call to call: each is read once."""
        self._band = self._band[len(self._band) - max(0, self._end - top) :]
        start = max(top, self._end)
        if bottom > start:
            window = self._rasterio.windows.Window(0, start, self.width, bottom - start)
            with self._reading():
                read = self._rgb(self.dataset.read(window=window))
            self._band = np.concatenate((self._band, read)) if len(self._band) else read
            self._end = bottom
        return self._band[: bottom - top]

    def preview(self) -> np.ndarray:
        """The image (h, w, 3) uint8, its longest side at most `PREVIEW`."""
        with self._reading():
            return self._rgb(self.dataset.read(out_shape=self._preview_shape(), resampling=self._average()))

    def write(self, file: Path, bands: Iterable[np.ndarray], colours: Sequence[Colour]) -> None:
        """Write class indices, given in bands of rows (rows, W), as a tiled TIFF with this image's georeference."""
        profile = {
            "driver": "GTiff",
            "width": self.width,
            "height": self.height,
            "count": 1,
            "dtype": "uint8" if len(colours) <= 256 else "uint16",
            "compress": "deflate",
            "tiled": True,
            "blockxsize": BLOCK,
            "blockysize": BLOCK,
            "bigtiff": "if_safer",
            "crs": self.dataset.crs,
            "transform": self.dataset.transform,
        }
        with whole(file) as unfinished, self._rasterio.open(unfinished, "w", **profile) as result:
            if self.dataset.gcps[0]:
                result.gcps = self.dataset.gcps
            if len(colours) <= 256:
                result.write_colormap(1, dict(enumerate(colours)))
            for top, rows in _whole_tiles(bands):
                window = self._rasterio.windows.Window(0, top, self.width, len(rows))
                result.write(rows.astype(profile["dtype"]), 1, window=window)

    def overlay(self, mask: Path, colours: Sequence[Colour]) -> Image.Image:
        """The preview, tinted by the colours of a mask that `write` wrote."""
        with self._rasterio.open(mask) as dataset:
            labels = dataset.read(1, out_shape=self._preview_shape(), resampling=self._rasterio.enums.Resampling.mode)
        return Image.fromarray(overlay(self.preview(), labels, colours))

    def _look(self) -> None:
        """Find out how values become RGB; each of these is asked of the file once."""
        dataset = self.dataset
        if dataset.count > 4:
            raise ValueError(f"has {dataset.count} bands; an image has 1 (grey) to 4 (RGB and alpha)")
        if orientation(self.file) != 1:
            raise ValueError("is stored turned (EXIF orientation), which windows cannot follow; save it upright")
        self._palette = None
        if dataset.colorinterp[0].name == "palette":
            self._palette = np.zeros((256, 3), np.uint8)
            for value, colour in dataset.colormap(1).items():
                self._palette[value] = colour[:3]
        self._white = 2 ** int(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8)) - 1
        if dataset.dtypes[0] != "uint8":
            bands = ((top, min(top + BLOCK, self.height)) for top in range(0, self.height, BLOCK))
            windows = (self._rasterio.windows.Window(0, top, self.width, end - top) for top, end in bands)
            self._white = 65535 if max(dataset.read(window=w).max() for w in windows) > 255 else 255

    def _rgb(self, values: np.ndarray) -> np.ndarray:
        """Bands (count, h, w) as (h, w, 3) uint8."""
        if self._palette is not None:
            return self._palette[values[0]]
        values = values[:3] if len(values) > 2 else values[[0, 0, 0]]
        if self._white != 255:
            values = (values.astype(np.float32).clip(0, self._white) * np.float32(255 / self._white)).astype(np.uint8)
        return np.ascontiguousarray(values.transpose(1, 2, 0))

    def _preview_shape(self) -> tuple[int, int]:
        factor = max(1, max(self.height, self.width) / PREVIEW)
        return max(1, round(self.height / factor)), max(1, round(self.width / factor))

    def _average(self) -> Any:
        resampling = self._rasterio.enums.Resampling
        return resampling.average if self._palette is None else resampling.nearest

    @contextlib.contextmanager
    def _reading(self):
        try:
            yield
        except (self._rasterio.errors.RasterioError, ValueError) as error:
            raise UnreadableImage(str(error)) from error


def _whole_tiles(bands: Iterable[np.ndarray]) -> Iterable[tuple[int, np.ndarray]]:
    """The first row and the rows of bands that begin where tiles begin, so that no tile is written twice."""
    top, waiting = 0, None
    for band in bands:
        waiting = band if waiting is None else np.concatenate((waiting, band))
        ready = len(waiting) // BLOCK * BLOCK
        if ready:
            yield top, waiting[:ready]
            top, waiting = top + ready, waiting[ready:].copy()
    if waiting is not None and len(waiting):
        yield top, waiting


def _import() -> ModuleType:
    try:
        import rasterio
        import rasterio.windows
    except ImportError as error:
        raise MissingDependency(
            "an image of this size is read in windows, which needs rasterio; run `pip install 'dense-backbones[large]'`"
        ) from error
    return rasterio
