"""One rule reads the images of a data set: range, bands, no data; files are found or told."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.cli import main
from backbones.errors import InputError
from backbones_tasks.data.classification import ClassificationData
from backbones_tasks.data.folders import DataError
from backbones_tasks.data.images import UNREADABLE, find_files, read_array
from backbones_tasks.data.raster import Raster
from backbones_tasks.data.reading import Reading, doubts, in_channels, statistics, to_unit
from backbones_tasks.data.segmentation import SegmentationData
from backbones_tasks.files import read_checkpoint
from backbones_tasks.training.tasks import find_task, load_model

rasterio = pytest.importorskip("rasterio", reason="needs rasterio, the extra [large]")

RAMP = np.linspace(0, 4095, 24, dtype=np.uint16).reshape(4, 6)  # 12 bits in 16


def write_bands(file, bands, **profile):
    """Bands (B, H, W) as a TIFF, or whatever `driver` says."""
    count, height, width = bands.shape
    options = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype, **profile}
    with rasterio.open(file, "w", **options) as dataset:
        dataset.write(bands)


def four_bands(dtype=np.uint16):
    return np.stack([RAMP, RAMP[::-1], RAMP // 2, RAMP // 4]).astype(dtype)


# Range


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("a.png", np.uint16, r"uint16 from 0 to 4095.*--data.range '\[0, 4095\]', or dtype"),
        ("a.tif", np.float32, r"float32 from 0 to 4095.*--data.range"),
        ("a.npy", np.int32, r"int32 from 0 to 4095.*--data.range"),
    ],
)
def test_what_is_not_of_8_bits_needs_a_rule(tmp_path, name, dtype, message):
    values = RAMP.astype(dtype)
    if name.endswith("npy"):
        np.save(tmp_path / name, values)
    else:
        Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(UNREADABLE, match=message):
        Reading().read(tmp_path / name)
    image = Reading(range=(0, 4095)).read(tmp_path / name)
    assert image.dtype == np.float32
    assert np.abs(image[..., 1] - RAMP / 4095).max() < 1e-6, "as the rule says, whatever this file's largest value is"


def test_one_range_holds_for_all_files_of_a_data_set(tmp_path):
    """A frame whose largest value is 260 was 250 times darker than one of 255, and [0, 1] was black."""
    reading = Reading(range=(0, 1000))
    for top in (200, 260):
        np.save(tmp_path / f"{top}.npy", np.full((2, 2), top, np.uint16))
    dark, bright = (reading.read(tmp_path / f"{top}.npy").max() for top in (200, 260))
    assert (round(float(dark), 6), round(float(bright), 6)) == (0.2, 0.26)
    np.save(tmp_path / "unit.npy", np.full((2, 2), 0.5, np.float32))
    assert Reading(range="dtype").read(tmp_path / "unit.npy").max() == 0.5


def test_a_range_that_is_hardly_used_or_cuts_much_off_is_told(tmp_path):
    np.save(tmp_path / "a.npy", RAMP)
    files = [tmp_path / "a.npy"]
    assert doubts(Reading(range=(0, 4095)), files) is None
    assert "reaches more than 6.2% of --data.range uint16: all is dark" in doubts(Reading(range="uint16"), files)
    assert "75% white by --data.range [0, 1000]" in doubts(Reading(range=(0, 1000)), files)


def test_files_of_several_kinds_go_by_their_type_or_are_refused(tmp_path):
    Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "a.png")
    write_bands(tmp_path / "b.png", np.full((3, 4, 4), 51 * 257, np.uint16), driver="PNG")
    by_type = [Reading(range="dtype").read(tmp_path / name) for name in ("a.png", "b.png")]
    assert all(np.allclose(image, 0.2) for image in by_type)
    with pytest.raises(UNREADABLE, match=r"holds 8 bits, which reach 255 and not 65535.*dtype"):
        Reading(range="uint16").read(tmp_path / "a.png")
    np.save(tmp_path / "c.npy", np.full((2, 2), 3.0, np.float32))
    with pytest.raises(UNREADABLE, match="from 3 to 3, not from 0 to 1"):
        Reading(range="dtype").read(tmp_path / "c.npy")


def test_rgb_of_16_bits_keeps_all_of_them(tmp_path):
    write_bands(tmp_path / "a.png", four_bands()[:3], driver="PNG")
    write_bands(tmp_path / "b.tif", four_bands()[:3])
    for name in ("a.png", "b.tif"):
        image = Reading(range=(0, 4095)).read(tmp_path / name)
        assert len(np.unique(image[..., 0])) == 24, "PIL would leave 16 grey levels"
        assert np.allclose(image, four_bands()[:3].transpose(1, 2, 0) / 4095)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range": (5, 5)}, "lower one first"),
        ({"range": "float"}, "dtype"),
        ({"bands": ()}, "indices of bands"),
        ({"bands": (-1,)}, "indices of bands"),
        ({"mean": (0.5,) * 3}, "given together"),
        ({"bands": (0, 1), "mean": (0.5,) * 3, "std": (0.5,) * 3}, "give 2 numbers"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0, 0.5)}, "over 0"),
    ],
)
def test_rules_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Reading(**options)


# Bands


def test_no_band_is_dropped_or_taken_for_alpha_unless_told(tmp_path):
    write_bands(tmp_path / "four.tif", four_bands(np.uint8), photometric="MINISBLACK")
    write_bands(tmp_path / "two.tif", four_bands(np.uint8)[:2], photometric="MINISBLACK")
    for name, count in (("four.tif", 4), ("two.tif", 2)):
        with pytest.raises(UNREADABLE, match=f"has {count} bands.*--data.bands all"):
            Reading().read(tmp_path / name)
        image = Reading(bands=range(count)).read(tmp_path / name)
        assert np.array_equal(image.transpose(2, 0, 1), four_bands(np.uint8)[:count])
    chosen = Reading(bands=(3, 0)).read(tmp_path / "four.tif")
    assert np.array_equal(chosen.transpose(2, 0, 1), four_bands(np.uint8)[[3, 0]])
    with pytest.raises(UNREADABLE, match=r"has 2 bands, counted from 0; --data\.bands asks for 3"):
        Reading(bands=(3, 0)).read(tmp_path / "two.tif")


def test_alpha_is_left_out_where_it_says_nothing_or_by_word(tmp_path):
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 255))
    image.save(tmp_path / "opaque.png")
    assert Reading().read(tmp_path / "opaque.png").shape == (4, 4, 3)
    image.putpixel((0, 0), (1, 2, 3, 0))
    image.save(tmp_path / "hole.png")
    with pytest.raises(UNREADABLE, match=r"transparent.*--data.bands '\[0, 1, 2\]'"):
        Reading().read(tmp_path / "hole.png")
    assert Reading(bands=(0, 1, 2)).read(tmp_path / "hole.png").shape == (4, 4, 3)
    assert Reading(bands=(0, 1, 2, 3)).read(tmp_path / "hole.png")[0, 0].tolist() == [1, 2, 3, 0]


def test_arrays_are_images_with_their_bands_last(tmp_path):
    bands = four_bands().transpose(1, 2, 0)
    np.save(tmp_path / "a.npy", bands)
    np.savez(tmp_path / "a.npz", image=bands)
    for name in ("a.npy", "a.npz"):
        image = Reading(range=(0, 4095), bands=range(4)).read(tmp_path / name)
        assert np.allclose(image, bands / 4095)
    np.savez(tmp_path / "b.npz", one=bands, two=bands)
    with pytest.raises(ValueError, match="holds the arrays one, two"):
        read_array(tmp_path / "b.npz")
    np.save(tmp_path / "first.npy", np.tile(four_bands(), (1, 2, 1)))
    with pytest.raises(UNREADABLE, match="bands last"):
        Reading(range="uint16").read(tmp_path / "first.npy")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_array(tmp_path / "object.npy")


def test_several_images_in_one_file_are_refused(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 9)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(UNREADABLE, match="holds 2 images"):
        Reading().read(tmp_path / "a.tif")


def test_pixels_without_data_are_an_error_or_filled_as_told(tmp_path):
    values = RAMP.astype(np.float32)
    values[0, 0] = np.nan
    np.save(tmp_path / "nan.npy", values)
    values[0, 0] = -9999
    write_bands(tmp_path / "marked.tif", values[None], nodata=-9999)
    for name in ("nan.npy", "marked.tif"):
        with pytest.raises(UNREADABLE, match=r"has no data.*in 4.17% of its pixels: --data.nodata VALUE"):
            Reading(range=(0, 4095)).read(tmp_path / name)
        image = Reading(range=(0, 4095), nodata=819).read(tmp_path / name)
        assert image[0, 0, 0] == pytest.approx(0.2)
        assert np.isfinite(image).all()


@pytest.mark.parametrize("bands", [None, (0, 1, 2, 3), (3, 1)])
def test_windows_are_read_by_the_same_rule(tmp_path, bands):
    many = np.tile(four_bands(), (1, 20, 10))
    write_bands(tmp_path / "a.tif", many if bands else many[:3])
    reading = Reading(range=(0, 4095), bands=bands)
    whole = reading.read(tmp_path / "a.tif")
    with Raster(tmp_path / "a.tif", reading) as raster:
        assert np.array_equal(raster.rows(0, 50), whole[:50])
        assert np.array_equal(raster.rows(30, 80), whole[30:80])
        assert raster.preview().shape == (80, 60, 3)


def test_pictures_show_the_first_three_bands_stretched(tmp_path):
    image = np.stack([np.full((4, 4), v, np.float32) for v in (0.01, 0.02, 0.03, 0.9)], axis=2)
    shown = Reading(range="uint16", bands=range(4)).picture(image)
    assert (shown.shape, shown.dtype) == ((4, 4, 3), np.uint8)
    assert shown[0, 0].tolist() == [0, 127, 255]
    assert Reading(bands=(0,)).picture(np.zeros((4, 4, 1), np.uint8)).shape == (4, 4, 3)
    photograph = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(Reading().picture(photograph), photograph)


def test_a_backbone_takes_the_bands_that_are_read():
    reading = Reading(bands=(0, 1), mean=(0.1, 0.2), std=(0.3, 0.4))
    assert in_channels("pvt_v2_b0", reading) == {
        "name": "pvt_v2_b0",
        "in_chans": 2,
        "pretrained_cfg": {"mean": [0.1, 0.2], "std": [0.3, 0.4]},
    }
    assert in_channels("pvt_v2_b0", Reading()) == "pvt_v2_b0"
    with pytest.raises(InputError, match="in_chans=4, but images are read with 3 bands"):
        in_channels({"name": "pvt_v2_b0", "in_chans": 4}, Reading())


def test_mean_and_std_are_those_of_all_pixels(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", four_bands().transpose(1, 2, 0) * (i + 1))
    reading = Reading(range=(0, 16380), bands=range(4))
    files = sorted(tmp_path.iterdir())
    mean, std = statistics(reading, files)
    pixels = np.concatenate([reading.read(file).reshape(-1, 4) for file in files])
    assert np.allclose(mean, pixels.mean(0), atol=1e-5)
    assert np.allclose(std, pixels.std(0), atol=1e-5)


def test_images_are_what_they_were_before_there_were_rules(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    unit = to_unit(Reading().tensor(tmp_path / "a.png"))
    assert torch.equal(unit, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


# Through the command line


def test_bands_train_and_predict_by_the_rule_in_the_checkpoint(workplace, capsys):
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (workplace / "data" / kind / split).mkdir(parents=True)
        for i in range(2):
            bands = np.random.default_rng(i + 9 * (split == "val")).integers(0, 4096, (4, 32, 40)).astype(np.uint16)
            write_bands(workplace / f"data/images/{split}/{i}.tif", bands, photometric="MINISBLACK")
            Image.fromarray((bands[3] > 2000).astype(np.uint8)).save(workplace / f"data/labels/{split}/{i}.png")
    (workplace / "data/classes.json").write_text(json.dumps({"classes": ["low", "high"]}))
    options = ["--data.num_workers", "0", "--data.crop_size", "32", "--data.batch_size", "2"]
    options += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--out", "run"]
    assert main(["fit", "segmentation", "--data", "data", *options]) != 0
    assert "--data.bands" in capsys.readouterr().err
    rule = ["--data.bands", "all", "--data.range", "[0, 4095]"]
    assert main(["fit", "segmentation", "--data", "data", *rule, *options]) == 0
    options = read_checkpoint(workplace / "run/checkpoints/last.ckpt")["hyper_parameters"]
    reading = Reading(**options["reading"])
    assert (reading.range, reading.bands) == ((0, 4095), (0, 1, 2, 3))
    assert all(0.4 < value < 0.6 for value in reading.mean), "computed from the training images"
    assert (options["backbone"]["in_chans"], options["backbone"]["pretrained_cfg"]["mean"]) == (4, list(reading.mean))
    shared = load_model(workplace / "run/checkpoints/last.ckpt").metadata["reading"]
    assert Reading(**shared) == reading, "who shares the model tells how its images are read"
    assert main(["validate", "segmentation", "--ckpt_path", "last", "--out", "run"]) == 0
    checkpoint = ["--ckpt", "run/checkpoints/last.ckpt"]
    assert main(["predict", "segmentation", *checkpoint, "--images", "data/images/val", "--out", "out"]) == 0
    assert Image.open("out/masks/0.png").size == Image.open("out/overlays/0.png").size == (40, 32)
    Image.new("RGB", (40, 32)).save("photo.png")
    assert main(["predict", "segmentation", *checkpoint, "--images", "photo.png", "--out", "out2"]) == 1
    assert "has 3 bands, counted from 0; --data.bands asks for 3" in capsys.readouterr().err


# Files


def test_files_are_found_or_told(tmp_path):
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (root, elsewhere, root / ".ipynb_checkpoints", root / "__MACOSX"):
        folder.mkdir()
    for file in ("a.jfif", "b.JPG", ".hidden.png", "._a.jfif", "Thumbs.db", "notes.txt", ".ipynb_checkpoints/a.png"):
        (root / file).write_bytes(b"")
    (elsewhere / "c.png").write_bytes(b"")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(root, target_is_directory=True)  # round and round
    found = find_files(root, {".jfif", ".jpg", ".png"})
    assert [file.relative_to(root).as_posix() for file in found.files] == ["a.jfif", "b.JPG", "linked/c.png"]
    assert set(found.others) == {
        ".hidden.png",
        "._a.jfif",
        "Thumbs.db",
        "notes.txt",
        ".ipynb_checkpoints/",
        "__MACOSX/",
    }


def test_what_is_not_read_is_told_by_the_data(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 0, ord(name))).save(tmp_path / name / f"{i}.jfif", format="JPEG")
    (tmp_path / "a" / ".2.png").write_bytes(b"")
    data = ClassificationData(str(tmp_path), num_workers=0)
    with pytest.warns(UserWarning, match=r"not read are a/\.2\.png"):
        data.setup("fit")
    assert sum(map(len, data.datasets.values())) == 4


@pytest.mark.parametrize(
    ("orientation", "stored"), [*((i, True) for i in range(2, 9)), *((i, False) for i in range(5, 9))]
)
def test_exif_turns_a_mask_with_its_image_unless_it_is_upright(tmp_path, orientation, stored):
    """A mask as large as the stored image is turned with it; one of another size was drawn on what is seen."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    values = np.random.default_rng(0).integers(0, 2, (8, 12), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in "ab":
        Image.fromarray(values * 255).convert("RGB").save(tmp_path / f"images/{name}.png", exif=exif)
    seen = Reading().read(tmp_path / "images/a.png")[..., 0] // 255
    for name in "ab":
        Image.fromarray(values if stored else np.ascontiguousarray(seen)).save(tmp_path / f"masks/{name}.png")
    data = SegmentationData(str(tmp_path), classes=["black", "white"], num_workers=0)
    data.setup("fit")
    image, mask = data.datasets["val"][0]
    assert torch.equal(image[0].long(), mask)


def test_masks_that_are_turned_are_told(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in "ab":
        Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / f"images/{name}.png", exif=exif)
        Image.new("L", (8, 8)).save(tmp_path / f"masks/{name}.png")
    with pytest.warns(UserWarning, match="2 images are turned upright.*masks.*are turned with them"):
        SegmentationData(str(tmp_path), classes=["x", "y"], num_workers=0).setup("fit")


def test_a_rule_without_a_folder_is_refused():
    with pytest.raises(DataError, match=r"give --data\.root as well"):
        SegmentationData(bands=[0])


@pytest.mark.parametrize("task", ["classification", "detection", "multitask"])
def test_every_task_predicts_on_the_bands_that_it_was_built_for(task, tmp_path):
    reading = Reading(range=(0, 4095), bands=range(4), mean=(0.4,) * 4, std=(0.2,) * 4).plain()
    options = {"backbone": "pvt_v2_b0", "num_classes": 3, "class_names": ["background", "a", "b"], "reading": reading}
    if task == "multitask":
        facts = {name: {k: options[k] for k in ("num_classes", "class_names", "reading")} for name in ("det", "seg")}
        options = {"backbone": "pvt_v2_b0", "facts": facts}
    model = find_task(task)(**options).eval()
    assert model.model.inner_backbone.in_chans == 4
    assert list(model.model.inner_backbone.pretrained_cfg["mean"]) == [0.4] * 4
    write_bands(tmp_path / "a.tif", np.tile(four_bands(), (1, 16, 10)))
    options = argparse.ArgumentParser()
    model.add_predict_options(options)
    with torch.inference_mode():
        model.predict_file(tmp_path / "a.tif", lambda folder, suffix: tmp_path / f"out{suffix}", options.parse_args([]))


def test_heads_that_read_images_differently_are_refused():
    facts = {"det": {"reading": {"range": (0, 9)}}, "seg": {"reading": {}}}
    with pytest.raises(InputError, match="the heads read images differently"):
        find_task("multitask")(facts=facts)
