"""Find image files, decode them to bands as they are stored, and read masks as class values."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from backbones.errors import MissingDependency

from ..options import require

ARRAYS = {".npy", ".npz"}
LOSSY = {".jfif", ".jpe", ".jpeg", ".jpg", ".webp"}  # of which no pixel's value can be relied upon
IMAGE_SUFFIXES = {".bmp", ".png", ".ppm", ".tif", ".tiff", *LOSSY, *ARRAYS}
UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)
JUNK = {".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir"}  # folders that tools leave behind
EXIF_TURNS = {  # what makes an image of this orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

T = TypeVar("T")
R = TypeVar("R")


class UnreadableImage(OSError):
    """An image that cannot be read, for the reason that the message gives."""


@dataclass(frozen=True)
class Stored:
    """An image as it is stored, upright.

    values: (H, W, B), of the file's own type. alpha: whether the last band says how opaque a pixel is.
    nodata: the value that the file says stands for no data, if it does.
    """

    values: np.ndarray
    alpha: bool = False
    nodata: float | None = None


@dataclass
class Found:
    """The files below a folder that were looked for, sorted, and what else was there by its path in the folder."""

    files: list[Path]
    others: list[str] = field(default_factory=list)


def find_files(folder: Path, suffixes: Iterable[str]) -> Found:
    """Files with one of the suffixes, in any depth, links to folders followed; hidden files and `JUNK` are others."""
    suffixes, found, seen = set(suffixes), Found([]), set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to where one has been
            folders.clear()
            continue
        seen.add(real)
        here = Path(place)
        junk = [name for name in folders if name in JUNK or name.startswith(".")]
        found.others += [f"{(here / name).relative_to(folder).as_posix()}/" for name in junk]
        folders[:] = sorted(set(folders) - set(junk))
        for name in files:
            file = here / name
            if file.suffix.lower() in suffixes and not name.startswith("."):
                found.files.append(file)
            else:
                found.others.append(file.relative_to(folder).as_posix())
    found.files.sort()
    return found


def is_large(path: str | Path) -> bool:
    """Whether an image has more pixels than PIL opens without a warning, `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        width, height = stored_size(path)
        return limit is not None and width * height > limit
    except UNREADABLE:
        return False  # whoever reads it says why it cannot be


def stored_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image as it is stored, whatever its orientation; only the head of the file is read."""
    if Path(path).suffix.lower() in ARRAYS:
        values = decode(path).values
        return values.shape[1], values.shape[0]
    try:
        with _any_size(), Image.open(path) as image:
            return image.size
    except UNREADABLE:
        with _open_raster(path) as dataset:
            return dataset.width, dataset.height


def orientation(path: str | Path) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 is upright, and what is not told."""
    try:
        with _any_size(), Image.open(path) as image:
            return image.getexif().get(0x0112, 1)
    except UNREADABLE:
        return 1


@contextmanager
def _any_size() -> Iterator[None]:
    """Within, PIL opens files of any size, of which only the head is read."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def decode(path: str | Path) -> Stored:
    """An image file with all its bands and bits, turned upright by its EXIF orientation.

    PIL reads what it reads without loss; what it would cut to 8 bits or to three bands is read by rasterio.

    Raises:
        one of `UNREADABLE`; the message says why
    """
    if Path(path).suffix.lower() in ARRAYS:
        return Stored(_channels_last(read_array(path)))
    try:
        file = Image.open(path)
    except UnidentifiedImageError:
        if Path(path).suffix.lower() not in (".tif", ".tiff"):
            raise
        return _decode_raster(path)
    with file:
        _check_pages(file)
        if _loses_in_pil(file):
            stored = _decode_raster(path)
            turn = EXIF_TURNS.get(file.getexif().get(0x0112, 1))
            return stored if turn is None else Stored(turned(stored.values, turn), stored.alpha, stored.nodata)
        nodata = _nodata(file)
        image = ImageOps.exif_transpose(file)
        if image.mode in ("P", "PA", "La", "RGBa") or "transparency" in image.info:
            transparent = image.mode != "P" or "transparency" in image.info
            image = image.convert("RGBA" if transparent else "RGB")
        elif image.mode == "1":
            image = image.convert("L")
        elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        values = np.asarray(image)
        return Stored(values if values.ndim == 3 else values[..., None], image.mode in ("LA", "RGBA"), nodata)


def read_array(path: str | Path) -> np.ndarray:
    """The array in an .npy or .npz file; nothing in it is run."""
    with open(path, "rb") as stream:
        try:
            content = np.load(stream, allow_pickle=False)
            if isinstance(content, np.lib.npyio.NpzFile):
                if len(content.files) != 1:
                    raise ValueError(f"holds the arrays {', '.join(content.files) or 'none'}; one is expected")
                content = content[content.files[0]]
        except (EOFError, KeyError) as error:
            raise ValueError(f"is no NumPy array: {error}") from error
    if content.dtype == bool:
        content = content.astype(np.uint8) * 255
    if content.dtype.kind not in "uif":
        raise ValueError(f"holds values of {content.dtype}; numbers are expected")
    return content


def _channels_last(values: np.ndarray) -> np.ndarray:
    if values.ndim == 2:
        return values[..., None]
    if values.ndim != 3 or not values.size:
        raise ValueError(f"is an array of shape {values.shape}; (H, W) or (H, W, bands) are expected")
    if values.shape[0] < min(values.shape[1:]) and values.shape[2] > 4:
        raise ValueError(f"is an array of shape {values.shape}; save it as (H, W, bands), bands last")
    return values


def read_mask(path: str | Path, coloured: bool = False) -> np.ndarray:
    """Read a mask as an (H, W) int64 array of class values, as it is stored.

    A palette image's values are its indices, or its colours if the mask is `coloured`: then each value is
    `colour_value` of a pixel's colour.
    """
    suffix = Path(path).suffix.lower()
    if suffix in LOSSY:
        raise ValueError("is compressed with loss, so that its values are not those that were drawn; save it as PNG")
    if suffix in ARRAYS:
        values = read_array(path)
    else:
        with Image.open(path) as image:
            _check_pages(image)
            if coloured:
                values = _opaque(image)
            elif len(image.getbands()) > 1:
                raise ValueError(
                    f"is a {image.mode} image; a mask has one channel, whose values are the class indices, unless "
                    'classes.json tells their "colours"'
                )
            else:
                values = np.asarray(image)
    if coloured:
        if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8:
            raise ValueError(f"is of shape {values.shape} and {values.dtype}; colours are (H, W, 3) uint8")
        red, green, blue = np.moveaxis(values.astype(np.int64), 2, 0)
        return (red << 16) + (green << 8) + blue
    if values.ndim != 2:
        raise ValueError(f"is of shape {values.shape}; a mask is (H, W)")
    whole = values.astype(np.int64) if np.isfinite(values).all() else None
    if whole is None or not np.array_equal(whole, values):
        raise ValueError(f"holds values of {values.dtype} that are no whole numbers")
    return whole


def _opaque(image: Image.Image) -> np.ndarray:
    """Colours (H, W, 3) uint8 of a mask without transparency."""
    if image.mode not in ("1", "L", "P", "LA", "PA", "RGB", "RGBA"):
        raise ValueError(f"is a {image.mode} image; colours are expected")
    values = np.asarray(image.convert("RGBA"))
    if (values[..., 3] != 255).any():
        raise ValueError("is transparent in places, where its colour is not told")
    return values[..., :3]


def turned(values: np.ndarray, turn: Image.Transpose) -> np.ndarray:
    """An array (H, W, ...) transposed as PIL transposes an image."""
    swapped = np.swapaxes(values, 0, 1)
    return {
        Image.Transpose.FLIP_LEFT_RIGHT: values[:, ::-1],
        Image.Transpose.FLIP_TOP_BOTTOM: values[::-1],
        Image.Transpose.ROTATE_180: values[::-1, ::-1],
        Image.Transpose.TRANSPOSE: swapped,
        Image.Transpose.TRANSVERSE: swapped[::-1, ::-1],
        Image.Transpose.ROTATE_90: swapped[::-1],
        Image.Transpose.ROTATE_270: swapped[:, ::-1],
    }[turn]


def each_in_threads(function: Callable[[T], R], items: Sequence[T], what: str) -> list[R]:
    """What a function that reads files returns for each item; a terminal shows how far it is, called `what`."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(function, items), what, len(items), delay=3, leave=False, disable=None))


def find_rasterio(what: str) -> ModuleType:
    """rasterio, which does not warn of images that lie nowhere on Earth; MissingDependency says `what` needs it."""
    require(what, "large", "rasterio")
    import rasterio
    import rasterio.windows

    # once and for all: what is set for a while is not for one thread alone
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def _check_pages(file: Image.Image) -> None:
    """Refuse what holds several images, of which one would be taken; overviews and a phone's second view are none."""
    pages = getattr(file, "n_frames", 1)
    if pages == 1 or file.format == "MPO":
        return
    if file.format == "TIFF":
        kinds = []
        for page in range(1, pages):
            file.seek(page)
            kinds.append(int(file.tag_v2.get(254, 0)))
        file.seek(0)
        pages = 1 + sum(not kind & 0b101 for kind in kinds)  # reduced copies, and masks of transparency
    if pages > 1:
        raise ValueError(f"holds {pages} images in one file; save one image, its bands side by side, per file")


def _loses_in_pil(file: Image.Image) -> bool:
    """Whether PIL would cut values to 8 bits, or take bands for something else than they are."""
    if file.format == "TIFF":
        samples = file.tag_v2.get(277, 1)
        deep = max(np.atleast_1d(file.tag_v2.get(258, 1))) > 8
        return samples > 1 and (deep or 338 in file.tag_v2)  # 338: what samples beyond the colours are
    if file.format == "PNG":
        return len(file.getbands()) > 1 and any(";16" in str(tile[3]) for tile in file.tile)
    if file.format == "PPM":
        return len(file.getbands()) > 1 and any(
            isinstance(tile[3], tuple) and isinstance(tile[3][-1], int) and tile[3][-1] > 255 for tile in file.tile
        )
    return False


def _nodata(file: Image.Image) -> float | None:
    """What a GeoTIFF says stands for no data."""
    if file.format != "TIFF":
        return None
    try:
        return float(file.tag_v2.get(42113, "").strip("\0 "))
    except ValueError:
        return None


def _decode_raster(path: str | Path) -> Stored:
    with _open_raster(path) as dataset:
        values = np.moveaxis(dataset.read(), 0, 2)
        alpha = dataset.count > 1 and dataset.colorinterp[-1].name == "alpha"
        return Stored(np.ascontiguousarray(values), alpha, dataset.nodata)


@contextmanager
def _open_raster(path: str | Path) -> Iterator:
    """A file opened by rasterio; what goes wrong, its absence included, is an `UnreadableImage`."""
    try:
        rasterio = find_rasterio("an image of more than three bands, or of several bands of more than 8 bits,")
    except MissingDependency as error:
        raise UnreadableImage(str(error)) from error
    try:
        with rasterio.open(path) as dataset:
            yield dataset
    except rasterio.errors.RasterioError as error:
        raise UnreadableImage(str(error)) from error
