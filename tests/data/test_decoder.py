"""Decoding of single images: torchvision's pixels against Pillow's, and Pillow where torchvision cannot."""

import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from scipy.stats import ks_2samp
from torchvision import transforms

from mdistiller.data import DataConfig, decoder, identity, load_data
from mdistiller.data.decoder import Box, center_crop, draw_crop, read_image, read_pixels, scale_crop
from mdistiller.errors import DataError


def photograph(size=(200, 150), seed=0):
    """Waves of all frequencies, more of the low ones, in three colors."""
    width, height = size
    noise = np.random.default_rng(seed).normal(size=(3, height, width))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    waves = np.fft.irfft2(np.fft.rfft2(noise) / np.maximum(frequency, 1), s=(height, width))
    return Image.fromarray((128 + 60 * waves / waves.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def pillows(content):
    return np.asarray(read_image(io.BytesIO(content.numpy().tobytes())))


@pytest.fixture
def fast_only(monkeypatch):
    """Pillow reads headers only."""

    def refuse(image):
        raise AssertionError("Pillow decodes")

    monkeypatch.setattr(decoder, "to_rgb", refuse)


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 95},
        {"quality": 60},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"mode": "L"},
        {"size": (33, 17)},
        {"size": (1, 1)},
    ],
    ids=str,
)
def test_jpeg_is_pillows_within_two_levels(options, request):
    image = photograph(options.get("size", (200, 150))).convert(options.get("mode", "RGB"))
    content = encoded(image, **{k: v for k, v in options.items() if k not in ("mode", "size")})
    expected = pillows(content).astype(int)
    request.getfixturevalue("fast_only")
    found = read_pixels(content, "a.jpg")
    assert found.shape == (*image.size[::-1], 3)
    assert found.dtype == np.uint8
    gap = np.abs(found.astype(int) - expected)
    assert gap.max() <= 2
    assert gap.mean() < 0.1
    if options.get("mode") == "L":
        assert (found == found[..., :1]).all()


@pytest.mark.parametrize("orientation", [*range(10), None])
def test_every_orientation(fast_only, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    content = encoded(photograph(), exif=exif)
    with Image.open(io.BytesIO(content.numpy().tobytes())) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    found = read_pixels(content, "a.jpg")
    assert found.shape == expected.shape == ((200, 150, 3) if orientation in (5, 6, 7, 8) else (150, 200, 3))
    assert np.abs(found - expected).max() <= 2
    # A crop of the view is that of the upright image.
    box = Box(30, 10, 90, 70)
    crop = scale_crop(np.ascontiguousarray(found), box, 32)
    assert torch.equal(scale_crop(found, box, 32), crop)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("TIFF", "RGB", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_other_files_are_pillows(monkeypatch, kind, mode, options):
    def refuse(content):
        raise AssertionError("torchvision decodes")

    monkeypatch.setattr(decoder, "_decode_jpeg", refuse)
    image = photograph()
    image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    content = encoded(image, kind, **options)
    assert np.array_equal(read_pixels(content, "a"), pillows(content))


@pytest.mark.parametrize(
    "error", [RuntimeError("not compiled with libjpeg support"), AttributeError("no such")]
)
def test_without_a_fast_decoder_pillow_reads_and_one_warning_says_so(monkeypatch, error):
    def lacking(*_, **__):
        raise error

    content = encoded(photograph())
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", lacking)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    decoder.jpeg_decoder.cache_clear()
    with pytest.warns(UserWarning, match="Pillow decodes JPEG files") as said:
        found = [read_pixels(content, "a.jpg") for _ in range(3)]
    assert all(np.array_equal(pixels, pillows(content)) for pixels in found)
    assert (len(said), decoder.jpeg_decoder()[0]) == (1, "Pillow")
    decoder.jpeg_decoder.cache_clear()


def test_torchcodec_decodes_where_it_is_installed(monkeypatch):
    def decode_jpeg(content):
        assert b"\xff\xe1" not in content, "it turns images by this segment, which is done already"
        return torch.full((3, 2, 4), 7, dtype=torch.uint8)

    found = SimpleNamespace(decode_jpeg=decode_jpeg)
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace(decoders=found))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", found)
    decoder.jpeg_decoder.cache_clear()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = encoded(photograph(), exif=exif)
    assert np.array_equal(read_pixels(content, "a.jpg"), np.full((4, 2, 3), 7))
    assert decoder.jpeg_decoder()[0] == "torchcodec"
    decoder.jpeg_decoder.cache_clear()


def test_values_beyond_bytes_are_cut_alike_or_refused():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    head = b"P5 256 256 65535\n"
    pgm = torch.frombuffer(bytearray(head + values.astype(">u2").tobytes()), dtype=torch.uint8)
    png = encoded(Image.fromarray(values), "PNG")
    for content in (pgm, png):
        assert np.array_equal(read_pixels(content, "a")[..., 0], values >> 8)
    for wrong in (values.astype(np.int32), values.astype(np.float32), np.float32(values / 65535)):
        with pytest.raises(DataError, match=r"it has values from 0 to .*; allowed are 0 to 255, or 16 bits"):
            read_pixels(encoded(Image.fromarray(wrong), "TIFF"), "a")
    assert read_pixels(encoded(Image.fromarray(np.full((8, 8), 200, np.float32)), "TIFF"), "a").mean() == 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match=r"pipe\.jpg cannot be read: OSError: it is no plain file"):
        read_image(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_truncated_file(kind, kept):
    content = encoded(photograph(), kind)
    with pytest.raises(DataError, match=r"image shelf/a cannot be read: \w+: .*(truncated|broken)"):
        read_pixels(content[: int(kept * len(content))], "shelf/a")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"not an image"])
def test_no_image(content):
    with pytest.raises(DataError, match=r"image a cannot be read: UnidentifiedImageError"):
        read_pixels(torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8), "a")


@pytest.mark.parametrize("box", [(0, 0, 150, 200), (20, 31, 100, 75), (140, 190, 10, 10), (7, 7, 32, 32)])
@pytest.mark.parametrize("size", [32, 64])
def test_crops_are_scaled_as_pillow_does(box, size):
    image = photograph()
    box = Box(*box)
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    found = scale_crop(np.asarray(image), box, size)
    assert found.shape == (size, size, 3)
    assert found.is_contiguous()
    assert np.abs(found.numpy() - expected).max() <= 1


@pytest.mark.parametrize("size", [(200, 150), (150, 201), (64, 64), (31, 97)])
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (40, 33), (64, 64), (256, 224)])
def test_the_center_is_torchvisions(size, resize, crop):
    image = photograph(size)
    geometry = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])
    expected = np.asarray(geometry(image)).astype(int)
    assert np.abs(center_crop(image, resize, crop).numpy() - expected).max() <= 1


@pytest.mark.parametrize("size", [(200, 150), (50, 150), (9, 7)])
def test_drawn_crops_are_torchvisions(size):
    width, height = size
    scale = (0.08, 1.0)
    ours = np.array([draw_crop(height, width, scale, seed) for seed in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    for i, name in enumerate(Box._fields):
        assert ks_2samp(ours[:, i], theirs[:, i]).pvalue > 1e-3, name
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    assert draw_crop(height, width, scale, 5) == draw_crop(height, width, scale, 5)


@pytest.mark.parametrize("size", [(400, 10), (10, 400), (1, 3), (3, 1)])
def test_where_no_crop_fits_it_is_the_center(size):
    width, height = size
    expected = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), [1, 1], [3 / 4, 4 / 3])
    found = draw_crop(height, width, (1.0, 1.0), 0)
    assert found[2:] == expected[2:]
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))  # half a pixel is rounded


def test_another_decoder_is_another_set(tmp_path, monkeypatch):
    """Stored outputs of a teacher belong to the pixels that it saw."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                photograph(seed=i).save(tmp_path / split / name / f"{i}.jpg")

    def found(memory="stream"):
        config = DataConfig(kind="folder", root=tmp_path, image_size=32, memory=memory, workers=0)
        return identity.identity(load_data(config).train)

    first = found()
    assert found() == first
    with monkeypatch.context() as patch:
        patch.setattr(identity, "VERSION", decoder.VERSION + 1)
        assert found() != first
    with monkeypatch.context() as patch:  # a libjpeg that rounds otherwise
        decode = decoder._decode_jpeg
        patch.setattr(decoder, "_decode_jpeg", lambda content: decode(content) ^ 1)
        assert found() != first
    with monkeypatch.context() as patch:  # another drawing of crops
        draw = decoder.draw_crop
        patch.setattr("mdistiller.data.decoder.draw_crop", lambda *a: draw(*a[:3], a[3] + 1))
        assert found() != first
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(b"broken")
    assert found() != first
