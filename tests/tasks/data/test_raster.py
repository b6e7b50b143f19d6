"""Images too large for memory: read in windows, labelled, written as they are done."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.cli import main
from backbones.errors import MissingDependency
from backbones_tasks.data import raster as raster_module
from backbones_tasks.data.images import UnreadableImage, is_large, orientation
from backbones_tasks.data.raster import Raster
from backbones_tasks.data.reading import Reading, read_image
from backbones_tasks.pictures.colours import palette
from backbones_tasks.training.callbacks import AtomicCheckpointIO
from backbones_tasks.training.segmentation import SegmentationTask

rasterio = pytest.importorskip("rasterio", reason="needs rasterio, the extra [large]")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

rng = np.random.default_rng(0)
PIXELS = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((150, 200)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A segmenter of random weights, as a checkpoint of a run."""
    torch.manual_seed(0)
    task = SegmentationTask("pvt_v2_b0", num_classes=4, decoder_options={"decoder_channels": 8})
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "task": task.name}
    content["pytorch-lightning_version"] = "2.6.4"
    file = tmp_path_factory.mktemp("model") / "model.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, file)
    return file


def predict(checkpoint, images, out, *options):
    arguments = ["--ckpt", checkpoint, "--images", images, "--out", out, "--device", "cpu", "--window", 64, *options]
    return main(["predict", "segmentation", *map(str, arguments)])


def bands(array, height):
    return (array[top : top + height] for top in range(0, len(array), height))


@pytest.mark.parametrize("kind", ["tiled.tif", "stripped.tif", "a.png", "a.jpg", "palette.png", "grey.tif", "rgba.png"])
def test_rows_are_those_of_the_whole_image(tmp_path, kind):
    file = tmp_path / kind
    image = Image.fromarray(PIXELS)
    if kind == "tiled.tif":
        profile = {"driver": "GTiff", "width": 150, "height": 200, "count": 3, "dtype": "uint8"}
        with rasterio.open(file, "w", tiled=True, blockxsize=64, blockysize=64, compress="lzw", **profile) as dataset:
            dataset.write(PIXELS.transpose(2, 0, 1))
    else:
        converted = {"palette": image.quantize(16), "grey": image.convert("L"), "rgba": image.convert("RGBA")}
        options = {"quality": 95, "subsampling": 0} if kind == "a.jpg" else {}
        converted.get(file.stem, image).save(file, **options)
    expected = np.asarray(read_image(file))
    with Raster(file) as raster:
        assert (raster.height, raster.width) == (200, 150)
        for top, bottom in ((0, 70), (40, 110), (110, 130), (128, 200)):
            found = raster.rows(top, bottom).astype(int)
            assert found.shape == (bottom - top, 150, 3)
            assert np.abs(found - expected[top:bottom]).max() <= (3 if kind == "a.jpg" else 0), "decoders may round"


@pytest.mark.parametrize("mode", ["I;16", "1"])
def test_other_kinds_of_values_are_scaled_as_in_small_images(tmp_path, mode):
    file = tmp_path / "a.tif"
    grey = Image.fromarray(PIXELS).convert("L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 200)
    (wide if mode == "I;16" else grey.convert(mode)).save(file)
    reading = Reading(range=(0, 60000)) if mode == "I;16" else Reading()
    with Raster(file, reading) as raster:
        assert np.array_equal(raster.rows(0, 200), reading.read(file))


def test_each_row_is_read_once(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    with Raster(tmp_path / "a.png") as raster:
        read, asked = raster.dataset.read, []

        class Counting:
            nodata = None

            def read(self, window):
                asked.append((window.row_off, window.height))
                return read(window=window)

        monkeypatch.setattr(raster, "dataset", Counting())
        monkeypatch.setattr(Raster, "width", 150)
        for top in range(0, 137, 17):
            raster.rows(top, top + 64)
        monkeypatch.undo()
    assert asked[0] == (0, 64)
    assert asked[1:] == [(64 + 17 * i, 17) for i in range(8)]


def test_what_is_written_is_what_was_given_and_keeps_the_georeference(tmp_path):
    transform = rasterio.transform.from_origin(500_000, 5_400_000, 0.2, 0.2)
    profile = {"driver": "GTiff", "width": 700, "height": 1300, "count": 3, "dtype": "uint8", "crs": "EPSG:25832"}
    with rasterio.open(tmp_path / "a.tif", "w", transform=transform, **profile) as dataset:
        dataset.write(np.zeros((3, 1300, 700), np.uint8))
    labels = rng.integers(0, 4, (1300, 700), dtype=np.uint8)
    with Raster(tmp_path / "a.tif") as raster:
        raster.write(tmp_path / "mask.tif", bands(labels, 190), palette(4))
    with rasterio.open(tmp_path / "mask.tif") as dataset:
        assert np.array_equal(dataset.read(1), labels)
        assert (dataset.crs, dataset.transform) == (rasterio.crs.CRS.from_epsg(25832), transform)
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.colormap(1)[3][:3] == palette(4)[3]


def test_ground_control_points_are_kept(tmp_path):
    points = [
        rasterio.control.GroundControlPoint(row=r, col=c, x=c / 10, y=-r / 10) for r, c in ((0, 0), (0, 9), (9, 0))
    ]
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=60, height=50, count=1, dtype="uint8") as dataset:
        dataset.write(np.zeros((1, 50, 60), np.uint8))
        dataset.gcps = (points, rasterio.crs.CRS.from_epsg(4326))
    with Raster(tmp_path / "a.tif") as raster:
        raster.write(tmp_path / "mask.tif", [np.zeros((50, 60), np.uint8)], palette(2))
    with rasterio.open(tmp_path / "mask.tif") as dataset:
        kept, crs = dataset.gcps
    assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]
    assert crs.to_epsg() == 4326


def test_many_classes_are_written_in_16_bits(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    labels = rng.integers(0, 400, (200, 150))
    with Raster(tmp_path / "a.png") as raster:
        raster.write(tmp_path / "mask.tif", bands(labels, 64), palette(400))
        raster.overlay(tmp_path / "mask.tif", palette(400))
    with rasterio.open(tmp_path / "mask.tif") as dataset:
        assert np.array_equal(dataset.read(1), labels)


def test_a_mask_that_broke_off_is_not_there(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")

    def breaks_off():
        yield np.zeros((100, 150), np.uint8)
        raise RuntimeError("power cut")

    with Raster(tmp_path / "a.png") as raster, pytest.raises(RuntimeError, match="power cut"):
        raster.write(tmp_path / "mask.tif", breaks_off(), palette(4))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_windows_of_a_file_and_the_whole_image_give_the_same_labels(checkpoint, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    options = ("--overlap", 0.4, "--scales", 0.75, 1, "--flip")
    assert predict(checkpoint, tmp_path / "a.png", tmp_path / "small", *options) == 0
    assert predict(checkpoint, tmp_path / "a.png", tmp_path / "large", *options, "--mask_format", "tif") == 0
    small = np.asarray(Image.open(tmp_path / "small/masks/a.png"))
    large = np.asarray(Image.open(tmp_path / "large/masks/a.tif"))
    assert len(np.unique(small)) > 1
    assert np.array_equal(small, large)
    overlays = [np.asarray(Image.open(tmp_path / kind / "overlays/a.png")).astype(int) for kind in ("small", "large")]
    assert np.array_equal(*overlays)


def test_large_images_are_read_in_windows_and_shown_in_small(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "images" / "large.png")
    Image.fromarray(PIXELS[:50, :50]).save(tmp_path / "images" / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # PIL refuses 30,000 pixels then
    monkeypatch.setattr(raster_module, "PREVIEW", 100)
    with pytest.raises(Image.DecompressionBombError):
        read_image(tmp_path / "images" / "large.png")
    assert predict(checkpoint, tmp_path / "images", tmp_path / "out") == 0
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"masks/large.tif", "overlays/large.png", "masks/small.png", "overlays/small.png", "predict.json"}
    assert Image.open(tmp_path / "out/overlays/large.png").size == (75, 100)
    assert Image.MAX_IMAGE_PIXELS == 10_000


def test_without_rasterio_a_large_image_is_named_with_what_to_install(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "images" / "large.png")
    Image.fromarray(PIXELS[:50, :50]).save(tmp_path / "images" / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert predict(checkpoint, tmp_path / "images", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "1 of 2 images labelled" in printed.out
    assert "large.png" in printed.err
    assert "pip install 'dense-backbones[large]'" in printed.err
    with pytest.raises(MissingDependency, match=r"dense-backbones\[large\]"):
        Raster(tmp_path / "images" / "small.png")
    assert predict(checkpoint, tmp_path / "images", tmp_path / "out", "--mask_format", "tif") != 0


def test_large_images_that_cannot_be_read_are_named(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "images" / "turned.jpg", exif=exif)
    noise = Image.fromarray(rng.integers(0, 256, (400, 300, 3), dtype=np.uint8))
    noise.save(tmp_path / "images" / "cut.png")
    content = (tmp_path / "images" / "cut.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(content[: len(content) // 2])
    profile = {"driver": "GTiff", "width": 150, "height": 200, "count": 6, "dtype": "uint8"}
    with rasterio.open(tmp_path / "images" / "six.tif", "w", **profile) as dataset:
        dataset.write(np.zeros((6, 200, 150), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert orientation(tmp_path / "images" / "turned.jpg") == 6
    assert predict(checkpoint, tmp_path / "images", tmp_path / "out", "--mask_format", "tif") == 1
    printed = capsys.readouterr()
    assert "0 of 3 images labelled" in printed.out
    assert "stored turned" in printed.err
    assert "has 6 bands" in printed.err
    assert "cut.png" in printed.err
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["predict.json"], "no result"


def test_what_is_large_is_told_from_the_head_of_the_file(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(file)
    assert not is_large(file)
    file.write_bytes(file.read_bytes()[:200])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 150 - 1)
    assert is_large(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 150)
    assert not is_large(file)
    with pytest.raises(UnreadableImage), Raster(tmp_path / "none.tif"):
        pass
