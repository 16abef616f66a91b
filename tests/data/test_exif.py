"""EXIF orientation: images are turned upright wherever they are decoded."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from mdistiller.data import DataConfig, load_data
from mdistiller.data.decoder import center_crop, read_image


def oriented(path, orientation, mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(tmp_path, suffix, orientation):
    path = oriented(tmp_path / f"a.{suffix}", orientation)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    found = read_image(path)
    assert found.size == expected.size == ((30, 40) if orientation > 4 else (40, 30))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_gray_of_sixteen_bits_is_turned(tmp_path):
    path = oriented(tmp_path / "a.png", 6, mode="I;16")
    assert read_image(path).size == (30, 40)
    assert read_image(path, upright=False).size == (40, 30)


@pytest.mark.parametrize("orientation", [0, 9])
def test_orientations_that_do_not_exist(tmp_path, orientation):
    assert read_image(oriented(tmp_path / "a.jpg", orientation)).size == (40, 30)


def test_damaged_metadata_leave_an_image_readable(tmp_path):
    path = oriented(tmp_path / "a.jpg", 6)
    blob = path.read_bytes()
    start = blob.index(b"Exif\0\0") + 6
    path.write_bytes(blob[:start] + b"\xff" * 12 + blob[start + 12 :])
    assert read_image(path).size == (40, 30)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_set_is_turned_in_every_mode(tmp_path, memory):
    for split in ("train", "val"):
        for name in "ab":
            oriented(tmp_path / split / name / "0.png", 6)
    config = DataConfig(kind="folder", root=tmp_path, image_size=16, resize=20, memory=memory, workers=0)
    test = load_data(config).test
    with Image.open(tmp_path / "val" / "a" / "0.png") as image:
        expected = center_crop(ImageOps.exif_transpose(image), 20, 16)
    found = test.images[0] if memory == "resident" else test.read(0, 0)
    assert torch.equal(found, expected)
