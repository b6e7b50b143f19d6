"""Images too large for memory: read and written in bands of rows, by rasterio."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import whole
from ..pictures.colours import Colour, overlay
from .images import Stored, UnreadableImage, find_rasterio, orientation
from .reading import Reading

CACHE = 64 * 2**20  # bytes that GDAL may keep of files; by default it takes a share of the machine's memory
BLOCK = 512  # side of the tiles of what is written
PREVIEW = 2048  # longest side of a preview


class Raster:
    """An image file that is read in bands of rows, as `reading` says; a context manager.

    Takes what GDAL reads: TIFF, GeoTIFF, PNG, JPEG, JPEG 2000, ...

    Raises:
        UnreadableImage: it cannot be read, here or later
        MissingDependency: rasterio is not installed
    """

    def __init__(self, file: Path, reading: Reading = Reading()):  # noqa: B008  (never changed)
        self.file, self.reading = file, reading
        self._rasterio = find_rasterio("an image of this size is read in windows, which")

    def __enter__(self) -> "Raster":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._rasterio.Env(GDAL_CACHEMAX=CACHE))
            with self._reading():
                self.dataset = stack.enter_context(self._rasterio.open(self.file))
                self._look()
            self._band = None
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
        """Rows (bottom - top, W, C), whose numbers never fall from call to call: each is read once."""
        kept = max(0, self._end - top)
        self._band = None if self._band is None or not kept else self._band[-kept:]
        start = max(top, self._end)
        if bottom > start:
            window = self._rasterio.windows.Window(0, start, self.width, bottom - start)
            with self._reading():
                read = self.reading.arrange(self._stored(self.dataset.read(window=window)))
            self._band = read if self._band is None else np.concatenate((self._band, read))
            self._end = bottom
        return self._band[: bottom - top]

    def preview(self) -> np.ndarray:
        """The image (h, w, 3) uint8, its longest side at most `PREVIEW`."""
        with self._reading():
            values = self.dataset.read(out_shape=self._preview_shape(), resampling=self._average())
            return self.reading.picture(self.reading.arrange(self._stored(values)))

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
        """Find out what values are; each of these is asked of the file once."""
        dataset = self.dataset
        if orientation(self.file) != 1:
            raise ValueError("is stored turned (EXIF orientation), which windows cannot follow; save it upright")
        self._palette = None
        if dataset.colorinterp[0].name == "palette":
            self._palette = np.zeros((256, 3), np.uint8)
            for value, colour in dataset.colormap(1).items():
                self._palette[value] = colour[:3]
        self._white = 2 ** int(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8)) - 1
        self._alpha = dataset.count > 1 and dataset.colorinterp[-1].name == "alpha"

    def _stored(self, values: np.ndarray) -> Stored:
        """Bands (count, h, w) as `images.decode` has them."""
        if self._palette is not None:
            return Stored(self._palette[values[0]])
        if self._white < 255:  # bits, as most of what has fewer than 8
            values = values * np.uint8(255 // self._white)
        return Stored(values.transpose(1, 2, 0), self._alpha, self.dataset.nodata)

    def _preview_shape(self) -> tuple[int, int]:
        factor = max(1, max(self.height, self.width) / PREVIEW)
        return max(1, round(self.height / factor)), max(1, round(self.width / factor))

    def _average(self) -> Any:
        resampling = self._rasterio.enums.Resampling
        return resampling.average if self._palette is None else resampling.nearest

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (self._rasterio.errors.RasterioError, ValueError, UnreadableImage) as error:
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
