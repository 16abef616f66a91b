"""Decoding of single images, and crops of them that are scaled to squares.

torchcodec, or torchvision in its absence, decodes JPEG files of gray and of RGB colors, Pillow all others.
Images of other channels than RGB keep the precision of their files, which may be NumPy's arrays.
"""

import io
import math
import random
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info

from mdistiller.errors import DataError

VERSION = 3
"""Number of the way from files to pixels; a teacher cache of another one is not read."""

_STRIP = 32  # largest aspect ratio that is scaled whole
_ASPECT = math.log(4 / 3)  # of a random crop, from its reciprocal on
_TRIES = 10
_EXIF = re.compile(rb"\xff\xe1(..Exif\0)", re.DOTALL)  # head of a JPEG file's segment
_ORIENTATION, _SAMPLES = ExifTags.Base.Orientation, ExifTags.Base.SamplesPerPixel
_FAST_FORMATS, _FAST_MODES = ("JPEG", "MPO"), ("RGB", "L")  # names are Pillow's

# Pillow's modes of images without a palette, by the number of their channels.
_MODES = {1: ("L", "I", "I;16", "I;16B", "I;16L", "F"), 2: ("LA",), 4: ("RGBA",)}
_OTHERS = (".tif", ".tiff", ".npy")
_ADVICE = "save images of other channels as .npy, [H, W, C] or [C, H, W], and give data.mean and data.std"

Pixels = npt.NDArray[np.uint8 | np.float32]
P = TypeVar("P", Pixels, Tensor)


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


# Views of an array that lies on its side, by the value of the image's EXIF tag.
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


def read_image(file: Path | BinaryIO, *, upright: bool = True) -> Image.Image:
    """Reads an image in RGB: gray is repeated, transparency dropped, 16-bit gray cut to its high byte.

    With `upright` it is turned as its EXIF orientation says. An unreadable file is a DataError.
    """
    with _opened(file, file) as image:
        rgb = to_rgb(image)
        turn = _UPRIGHT.get(_orientation(image)) if upright else None
    return rgb if turn is None else Image.fromarray(np.ascontiguousarray(turn(np.asarray(rgb))))


def read_pixels(content: Tensor, name: str, channels: int = 3) -> Pixels:
    """Decodes an image as `read_image` does, but faster, and not always to the same bits.

    One of other channels than three is read as it is.

    Args:
        content: the file, uint8 [bytes] on the CPU.
        name: name of the file in the DataError of an unreadable one.
        channels: number of channels that it must have, unless it becomes RGB.

    Returns:
        uint8 [H, W, 3], or float32 as `to_pixels`; perhaps a view of an image that lies on its side.
    """
    data = content.numpy().data
    if channels != 3 and bytes(data[:6]) == b"\x93NUMPY":
        with _named(name):
            return to_pixels(channels_last(np.load(io.BytesIO(data), allow_pickle=False), channels))
    with _opened(io.BytesIO(data), name) as image:
        decoded = bands_of(image, channels) if channels != 3 else None
        if decoded is None and image.format in _FAST_FORMATS and image.mode in _FAST_MODES:
            decoded = _decode_jpeg(content)
        pixels = np.asarray(to_rgb(image)) if decoded is None else decoded
        turn = _UPRIGHT.get(_orientation(image))
    return pixels if turn is None else turn(pixels)


@contextmanager
def _opened(file: Path | BinaryIO, name: object) -> Iterator[Image.Image]:
    """Opens an image that has pixels; raises a DataError with `name` for all errors inside."""
    with _named(name), Image.open(plain(file) if isinstance(file, Path) else file) as image:
        if 0 in image.size:
            raise ValueError("it has no pixels")
        bands = len(image.getbands())
        if (samples := getattr(image, "tag_v2", {}).get(_SAMPLES, bands)) > bands:
            raise ValueError(f"it has {samples} channels, of which Pillow reads {bands}; {_ADVICE}")
        yield image


@contextmanager
def _named(name: object) -> Iterator[None]:
    """Raises a DataError with the name of an image for all errors inside."""
    try:
        yield
    except Exception as error:  # PIL's decoders raise errors of many types
        may_have_more = isinstance(error, UnidentifiedImageError) and str(name).lower().endswith(_OTHERS)
        advice = f"; {_ADVICE}" * may_have_more
        raise DataError(f"image {name} cannot be read: {type(error).__name__}: {error}{advice}") from error


def plain(path: Path) -> Path:
    """Returns the path of a plain file; OSError for a pipe or device, whose reading may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no plain file")
    return path


def _orientation(image: Image.Image) -> int:
    """Returns the value of the EXIF tag; 1, upright, without one."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata do not make an image unreadable
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB as `read_image` does; ValueError for values of unknown meaning."""
    if _is_sixteen(image):  # PIL would clip to 255 and leave the image white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 255 or (image.mode == "F" and 0 < high <= 1):
            raise ValueError(f"it has values from {low:g} to {high:g}; allowed are 0 to 255, or 16 bits")
    # Without RGBA in between, PIL warns when it drops the transparency of a palette.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _is_sixteen(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def bands_of(image: Image.Image, channels: int) -> Pixels:
    """Returns an image of other channels than three as `to_pixels`; ValueError if it has not so many."""
    if image.mode not in _MODES.get(channels, ()):
        raise ValueError(f"it is {image.mode}, and mean and std are of {channels} channels; {_ADVICE}")
    values = np.asarray(image).reshape(image.height, image.width, channels)
    return to_pixels(values.astype(np.uint16) if _is_sixteen(image) else values)


def channels_last(values: npt.NDArray[Any], channels: int, ndim: int = 3) -> npt.NDArray[Any]:
    """Returns an image, or with `ndim` 4 a batch, with its channels last.

    ValueError where neither its first nor its last axis, or both, are so many; one channel may have no axis.
    """
    values = values[..., None] if values.ndim == ndim - 1 and channels == 1 else values
    found = [axis for axis in (-3, -1) if values.ndim == ndim and values.shape[axis] == channels]
    if len(found) != 1:
        forms = f"[H, W, {channels}] and [{channels}, H, W]".replace("[", "[N, " if ndim == 4 else "[")
        hint = " (a Dataset's tensors are [C, H, W])" if len(found) > 1 else ""
        raise ValueError(f"it is an array {list(values.shape)}; allowed: one of {forms}, not both{hint}")
    return np.moveaxis(values, found[0], -1)


def to_pixels(values: npt.NDArray[Any]) -> Pixels:
    """Scales uint8, uint16 or floats in [0, 1] to float32 from 0 to 255; ValueError for other values."""
    if values.dtype in (np.uint8, np.uint16):
        return np.divide(values, 257 if values.dtype == np.uint16 else 1, dtype=np.float32)
    low, high = values.min(), values.max()
    if values.dtype.kind != "f" or not 0 <= low <= high <= 1:
        found = f"it has {values.dtype} values from {low} to {high}"
        raise ValueError(f"{found}; allowed: uint8, uint16, or float in [0, 1]")
    return np.multiply(values, 255, dtype=np.float32)


@cache
def jpeg_decoder() -> tuple[str, Callable[[Tensor], Tensor] | None]:
    """Returns the name of the package that decodes JPEG files here, and its function; None for Pillow's."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG")
    for name, find in (("torchcodec", _torchcodec), ("torchvision", _torchvision)):
        with suppress(ImportError, AttributeError, RuntimeError, OSError):  # missing, older, built without
            decode = find()
            decode(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
            return name, decode
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        warnings.warn("Pillow decodes JPEG files, slowly; to change this, install torchcodec", stacklevel=2)
    return "Pillow", None


def _torchcodec() -> Any:
    from torchcodec.decoders import decode_jpeg

    # It would turn an image as its EXIF tag says, which `read_pixels` does; so the segment gets another mark.
    return lambda content: decode_jpeg(_EXIF.sub(b"\xff\xef\\1", content.numpy().tobytes()))


def _torchvision() -> Any:
    from torchvision.io import ImageReadMode  # takes a second

    # Not torchvision.io.decode_jpeg, which warns of its deprecation from 0.29 on.
    return lambda content: torch.ops.image.decode_jpeg(content, ImageReadMode.RGB.value, False)


def _decode_jpeg(content: Tensor) -> Pixels | None:
    """Decodes a JPEG file; None if only Pillow can."""
    decode = jpeg_decoder()[1]
    try:
        decoded = None if decode is None else decode(content)
    except RuntimeError:  # a bad file
        return None
    # The colors of a pixel are neighbors in memory already.
    return None if decoded is None else decoded.permute(1, 2, 0).numpy()


def draw_crop(height: int, width: int, scale: tuple[float, float], seed: int) -> Box:
    """Draws a crop with the distribution of torchvision's `RandomResizedCrop`, aspect ratio 3:4 to 4:3.

    Args:
        height: of the image in pixels, as `width`.
        width: see `height`.
        scale: smallest and largest area of the crop, as fractions of the image's.
        seed: fixes the crop.
    """
    draw = random.Random(seed).random
    for _ in range(_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw())
        aspect = math.exp(_ASPECT * (2 * draw() - 1))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return Box(int(draw() * (height - tall + 1)), int(draw() * (width - wide + 1)), tall, wide)
    # The largest one with an allowed aspect ratio.
    return _center(height, width, min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3)))


def to_square(
    pixels: Pixels, resize: int, size: int, crop_scale: tuple[float, float] | None, seed: int
) -> Tensor:
    """Crops and scales an image to [S, S, C]: at random, or its center where `crop_scale` is None."""
    if crop_scale is None:
        return center_crop(pixels, resize, size)
    height, width = pixels.shape[:2]
    return scale_crop(pixels, draw_crop(height, width, crop_scale, seed), size)


def scale_crop(pixels: Pixels, box: Box, size: int) -> Tensor:
    """Scales a part of an image to a square, bilinear and antialiased: [S, S, C]."""
    return _scale(_cut(pixels, box), size, size)


def center_crop(image: Image.Image | Pixels, resize: int, size: int) -> Tensor:
    """Scales the short side to `resize`, bilinear and antialiased, and crops the center: [S, S, C]."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    longest = _STRIP * min(height, width)  # a scaled thin strip would take gigabytes
    pixels = _cut(pixels, _center(height, width, min(height, longest), min(width, longest)))
    height, width = pixels.shape[:2]
    short = min(height, width)
    tall, wide = resize * height // short, resize * width // short
    return _cut(_scale(pixels, tall, wide), _center(tall, wide, size, size)).contiguous()


def _center(height: int, width: int, tall: int, wide: int) -> Box:
    return Box(round((height - tall) / 2), round((width - wide) / 2), tall, wide)


def _cut(pixels: P, box: Box) -> P:
    """Returns a view of a part of an array or tensor [H, W, C]."""
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def _scale(pixels: Pixels, height: int, width: int) -> Tensor:
    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    if image.shape[:2] == (height, width):
        return image
    # In this order, the strides are those of channels last, which the result then has too.
    batch = image[None].permute(0, 3, 1, 2)
    scaled = F.interpolate(batch, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].permute(1, 2, 0).contiguous()
