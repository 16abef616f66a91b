"""Sets of encoded images in files, and their decoding to square ones.

Files that are squares of the right size (`are_squares`) are cropped at random on the device. Of others, each
random crop is taken from the whole image before it is scaled, as usual for ImageNet.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdistiller.data.config import DataConfig
from mdistiller.data.cores import Workers, count_workers
from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet, Splits, StreamSet, pixel_type
from mdistiller.data.decoder import Pixels, plain, read_pixels, to_square
from mdistiller.errors import ConfigError, DataError
from mdistiller.types import IGNORED

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ENDINGS = f"{', '.join(IMAGE_SUFFIXES)}; .npy, where data.mean and data.std have one number for each channel"


class Row(Protocol):
    """Encoded image in a row of a table; its text is the row's name, for messages."""

    def file(self) -> Path | BinaryIO:
        """Returns the encoded image."""


@dataclass(frozen=True, kw_only=True)
class EncodedSet(StreamSet):
    """Encoded images, decoded on reading.

    The short side is scaled to `resize` before the center crop. With `random_crop`, a random crop of
    `crop_scale` of the area of the whole image is scaled instead.
    """

    samples: np.ndarray  # the Path or Row of each image, objects [N]
    image_size: int  # side of the square result in pixels
    resize: int
    channels: int = 3

    def name(self, index: int) -> str:
        """Returns the name of the image's file, or its row, for messages."""
        return str(self.samples[index])

    def file(self, index: int) -> Path | BinaryIO:
        """Returns the encoded image."""
        sample: Path | Row = self.samples[index]
        file = sample if isinstance(sample, Path) else sample.file()
        return plain(file) if isinstance(file, Path) else file

    def of(self, samples: Sequence[Path | Row], labels: Tensor) -> Self:
        """Returns a set of other images that is read in the same way."""
        return replace(self, samples=np.array(samples, dtype=object), labels=labels)

    def select(self, indices: Tensor) -> Self:
        return replace(self, labels=self.labels[indices], samples=self.samples[indices.numpy()])

    def encoded(self, index: int) -> Tensor:
        """Reads the encoded image, uint8 [bytes]."""
        file = self.file(index)
        # A copy of the read bytes, because tensors are of memory that may be written to.
        found = np.fromfile(file, np.uint8) if isinstance(file, Path) else bytearray(file.read())
        return torch.from_numpy(np.frombuffer(found, np.uint8))

    def pixels(self, index: int) -> Pixels:
        """Decodes an image as a whole; DataError if that fails."""
        name = self.name(index)
        try:
            content = self.encoded(index)
        except OSError as error:
            raise DataError(f"image {name} cannot be read: {error}") from error
        return read_pixels(content, name, self.channels)

    def read(self, index: int, seed: int) -> Tensor:
        pixels = self.pixels(index)
        crop_scale = self.crop_scale if self.random_crop else None
        return to_square(pixels, self.resize, self.image_size, crop_scale, seed)


def as_encoded(files: Sequence[Path], channels: int = 3) -> EncodedSet:
    """Returns files as a set without labels, for reading them as they are encoded, or as a whole."""
    samples, labels = np.array(files, dtype=object), torch.full((len(files),), IGNORED)
    return EncodedSet(samples=samples, labels=labels, image_size=1, resize=1, channels=channels)


def sample(images: Sized) -> list[int]:
    """Returns the positions of 64 images, spread evenly, since files are sorted by class."""
    return sorted(set(np.linspace(0, len(images) - 1, 64).round().astype(int).tolist()))


def are_squares(images: EncodedSet) -> bool:
    """Whether files are squares of `image_size` already, so that crops from decoded ones lose nothing.

    At least nine of ten files in a sample of 64 are, and `resize` does not enlarge them. Only headers are
    read; files without a readable one do not count.
    """
    if images.resize != images.image_size or not len(images):
        return False
    found = [size == (images.image_size, images.image_size) for size in _sizes(images)]
    return sum(found) >= 0.9 * len(found)


def small_side(images: EncodedSet) -> int | None:
    """Returns the side of files that all are squares of one size below `image_size`; None for others."""
    found = set(_sizes(images)) if len(images) else set()
    width, height = found.pop() if len(found) == 1 else (0, 1)
    return width if width == height < images.image_size else None


def _sizes(images: EncodedSet) -> Iterator[tuple[int, int]]:
    """Yields width and height of a sample of 64 files with a readable header."""
    for index in sample(images):
        try:
            if images.channels != 3:  # an array has no header for Pillow
                height, width = images.pixels(index).shape[:2]
                yield width, height
                continue
            with Image.open(images.file(index)) as image:
                yield image.size
        except Exception:  # PIL's errors are of many types; reading reports them
            continue


def empty_set(config: DataConfig, default_size: int) -> EncodedSet:
    """Returns a set without images that is read as a config says; ConfigError for a resize below the crop."""
    size = config.image_size or default_size
    resize = config.resize or size
    if resize < size:
        raise ConfigError(f"resize: got {resize}, need at least image_size {size}")
    images = as_encoded([], config.channels)
    return replace(images, image_size=size, resize=resize, on_error=config.on_error)


def make_splits(train: EncodedSet, test: EncodedSet, classes: tuple[str, ...], description: str) -> Splits:
    """Combines two sets, with ImageNet's mean and standard deviation and random resized crops."""
    return Splits(
        train=train,
        test=test,
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=train.image_size,
        description=description,
        crop="resized",
    )


def check_classes(train: set[str], test: set[str], train_from: object, test_from: object) -> None:
    """Raises DataError unless there are two classes or more, and none is in the test images alone."""
    if test - train:
        parts = [
            f"only in {source}: {some(sorted(names))}"
            for source, names in ((train_from, train - test), (test_from, test - train))
            if names
        ]
        raise DataError("training and test classes differ; " + "; ".join(parts))
    if len(train) < 2:
        raise DataError(f"got one class, {train.pop()!r}, in {train_from}; need at least two")


def some(names: list[str]) -> str:
    """Joins the first five names and the number of the others."""
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def decode(images: EncodedSet, workers: Workers) -> ImageSet:
    """Decodes all images with the test-time geometry, in `workers` threads; errors as `_try_each`."""
    shape = (len(images), images.image_size, images.image_size, images.channels)
    pixels = torch.empty(shape, dtype=pixel_type(images.channels))

    def fill(index: int) -> None:
        pixels[index] = images.read(index, 0)

    kept = _try_each(images, fill, workers)
    names = tuple(images.name(index) for index in range(len(images)))
    decoded = ImageSet(images=pixels, labels=images.labels, names=names)
    return decoded if len(kept) == len(images) else decoded.select(kept)


def drop_unreadable(images: EncodedSet, workers: Workers) -> EncodedSet:
    """Leaves out files that cannot be read, if on_error is skip.

    Files that are cropped at random are checked quickly, by header and checksum. That does not detect a JPEG
    with missing pixels; loaders leave it out of its batch. Others are decoded, as `decode` does, so that a
    set has the same images wherever it is kept.
    """
    if images.on_error == "raise":
        return images

    def verify(index: int) -> None:
        if not images.random_crop or images.channels != 3:
            images.read(index, 0)
            return
        try:
            with Image.open(images.file(index)) as image:
                image.verify()
        except Exception as error:
            raise DataError(str(error)) from error

    return images.select(_try_each(images, verify, workers))


def _try_each(images: EncodedSet, work: Callable[[int], None], workers: Workers) -> Tensor:
    """Returns the positions (int64) for which `work` succeeds; failures give one warning.

    Raises:
        DataError: An unreadable file; with on_error=skip, only if no image is left.
    """

    def attempt(index: int) -> DataError | None:
        try:
            work(index)
        except DataError as error:
            if images.on_error == "raise":
                raise
            return error
        return None

    with ThreadPoolExecutor(max(1, count_workers(workers))) as pool:
        errors = list(pool.map(attempt, range(len(images))))
    kept = torch.tensor([i for i, error in enumerate(errors) if error is None], dtype=torch.int64)
    if len(kept) < len(images):
        bad = [images.name(i) for i, error in enumerate(errors) if error is not None]
        message = f"{len(bad)} of {len(images)} images cannot be read: {some(bad)}"
        if not len(kept):
            raise DataError(message)
        warnings.warn(f"left out: {message}", stacklevel=2)
    return kept
