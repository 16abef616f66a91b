"""Encoded images, and their decoding to square ones.

Training images that are decoded once (resident) have the test-time geometry: the short side is scaled and
the centre cropped. Streamed ones get a new random crop each time, as usual for ImageNet.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet, Splits, StreamSet
from mdistiller.errors import ConfigError, DataError

_STRIP = 32  # largest aspect ratio that is scaled whole
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, kw_only=True)
class EncodedSet(StreamSet):
    """Encoded images, decoded on reading.

    The short side is scaled to `resize` before the centre crop. With `random_crop`, a random crop of
    `crop_scale` of the area is scaled instead.
    """

    samples: np.ndarray  # origin of each image, [N]
    image_size: int  # side of the square result in pixels
    resize: int

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns the image's file, and its name inside the file, for messages."""

    @abstractmethod
    def file(self, index: int) -> Path | BinaryIO:
        """Returns the encoded image."""

    def select(self, indices: Tensor) -> Self:
        return replace(self, labels=self.labels[indices], samples=self.samples[indices.numpy()])

    def read(self, index: int, seed: int) -> Tensor:
        name = self.name(index)
        try:
            file = self.file(index)
        except OSError as error:
            raise DataError(f"image {name} cannot be read: {error}") from error
        image = read_image(file, name)
        if not self.random_crop:
            return centre_crop(image, self.resize, self.image_size)
        # Imported here, as loading torchvision takes a second. Its default is bilinear.
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms import functional as TF

        # torchvision draws from torch's global generator, whose state must not change.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            box = RandomResizedCrop.get_params(image, list(self.crop_scale), [3 / 4, 4 / 3])
        return _to_tensor(TF.resized_crop(image, *box, [self.image_size, self.image_size]))


def read_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Reads an image in RGB: grey is repeated, transparency dropped, 16-bit grey cut to its high byte.

    The DataError of an unreadable file has its `name`, or its path.
    """
    try:
        with Image.open(file) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
                raise ValueError("it has pixels that are not finite")
            if image.mode.startswith("I;16"):
                # PIL would clip to 255 and leave the image white.
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            # Without RGBA in between, PIL warns when it drops the transparency of a palette.
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Exception as error:  # PIL's decoders raise errors of many types
        raise DataError(f"image {name or file} cannot be read: {type(error).__name__}: {error}") from error


def centre_crop(image: Image.Image, resize: int, size: int) -> Tensor:
    """Scales the short side to `resize`, bilinear and antialiased, and crops the centre: uint8 [S, S, 3]."""
    from torchvision.transforms import functional as TF

    longest = _STRIP * min(image.size)
    if max(image.size) > longest:  # a scaled thin strip would take gigabytes
        image = TF.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    return _to_tensor(TF.center_crop(TF.resize(image, [resize]), [size, size]))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def read_options(config: DataConfig, default_size: int) -> dict[str, Any]:
    """Returns the fields of an `EncodedSet` from a config; ConfigError for a resize smaller than the crop."""
    size = config.image_size or default_size
    resize = config.resize or size
    if resize < size:
        raise ConfigError(f"resize: got {resize}, need at least image_size {size}")
    return {"image_size": size, "resize": resize, "on_error": config.on_error}


def make_splits(train: EncodedSet, test: EncodedSet, classes: tuple[str, ...], description: str) -> Splits:
    """Combines two sets, with ImageNet's mean and standard deviation."""
    return Splits(
        train=train,
        test=test,
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=train.image_size,
        description=description,
    )


def check_classes(train: set[str], test: set[str], train_from: object, test_from: object) -> None:
    """Raises DataError unless both splits have the same classes, at least two."""
    if train != test:
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


def decode(images: EncodedSet, workers: int) -> ImageSet:
    """Decodes all images with the test-time geometry, in `workers` threads; errors as `_try_each`."""
    pixels = torch.empty(len(images), images.image_size, images.image_size, 3, dtype=torch.uint8)

    def fill(index: int) -> None:
        pixels[index] = images.read(index, 0)

    kept = _try_each(images, fill, workers)
    decoded = ImageSet(images=pixels, labels=images.labels)
    return decoded if len(kept) == len(images) else decoded.select(kept)


def drop_unreadable(images: EncodedSet, workers: int) -> EncodedSet:
    """Leaves out files whose header or checksum is wrong, if on_error is skip.

    The check is quick and does not detect a JPEG with missing pixels; loaders leave it out of its batch.
    """
    if images.on_error == "raise":
        return images

    def verify(index: int) -> None:
        try:
            with Image.open(images.file(index)) as image:
                image.verify()
        except Exception as error:
            raise DataError(str(error)) from error

    return images.select(_try_each(images, verify, workers))


def _try_each(images: EncodedSet, work: Callable[[int], None], workers: int) -> Tensor:
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

    with ThreadPoolExecutor(max(1, workers)) as pool:
        errors = list(pool.map(attempt, range(len(images))))
    kept = torch.tensor([i for i, error in enumerate(errors) if error is None], dtype=torch.int64)
    if len(kept) < len(images):
        bad = [images.name(i) for i, error in enumerate(errors) if error is not None]
        message = f"{len(bad)} of {len(images)} images cannot be read: {some(bad)}"
        if not len(kept):
            raise DataError(message)
        warnings.warn(f"left out: {message}", stacklevel=2)
    return kept
