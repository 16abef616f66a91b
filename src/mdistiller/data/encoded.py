"""Images that are still encoded: how they are decoded and cut to size, and sets of them.

Training images that are decoded once (resident) get the test-time geometry: short side scaled, centre
cropped. Only streamed ones get a new random crop each time, as usual for ImageNet.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, Self, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet, Splits, StreamSet
from mdistiller.data.labels import balanced_subset
from mdistiller.errors import ConfigError, DataError

_BILINEAR = InterpolationMode.BILINEAR
_CROP_SCALE, _CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_STRIP = 32  # times as long as wide


@dataclass(frozen=True, kw_only=True)
class EncodedSet(StreamSet):
    """Encoded images, decoded when they are read.

    image_size: side of the square result in pixels.
    resize: length to which the short side is scaled before the centre crop.
    random_crop: instead take a random crop of 8 % to 100 % of the area and scale that.
    """

    image_size: int
    resize: int

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image lies, for people."""

    @abstractmethod
    def file(self, index: int) -> Path | BinaryIO:
        """The encoded image."""

    @abstractmethod
    def select(self, indices: Tensor) -> Self:
        """The images at `indices` (int64 [M]), in that order."""

    def load(self, index: int) -> Image.Image:
        """The image at full size, in RGB.

        Raises:
            DataError: it cannot be read or decoded.
        """
        name = self.name(index)
        try:
            file = self.file(index)
        except OSError as error:
            raise DataError(f"image {name} cannot be read: {error}") from error
        return read_image(file, name)

    def read(self, index: int, seed: int) -> Tensor:
        """One image, uint8 [S, S, 3]; with random_crop, `seed` fixes the crop."""
        image = self.load(index)
        if not self.random_crop:
            return centre_crop(image, self.resize, self.image_size)
        # torchvision draws from torch's global generator; nobody else's numbers may change for that.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            box = RandomResizedCrop.get_params(image, list(_CROP_SCALE), list(_CROP_RATIO))
        return _to_tensor(TF.resized_crop(image, *box, [self.image_size, self.image_size], _BILINEAR))


def read_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """The image in `file` in RGB: grey is repeated, transparency dropped, 16-bit grey cut to 8.

    name: what errors call it; None: the file's path.

    Raises:
        DataError: the file cannot be read or decoded.
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
            # PIL warns when it drops the transparency of a palette directly.
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    # PIL's decoders raise anything: OSError, SyntaxError, ValueError, struct.error, DecompressionBombError.
    except Exception as error:
        where = file if name is None else name
        raise DataError(f"image {where} cannot be read: {type(error).__name__}: {error}") from error


def centre_crop(image: Image.Image, resize: int, size: int) -> Tensor:
    """Scale the short side to `resize` (bilinear, antialiased), cut out the centre: uint8 [size, size, 3]."""
    longest = _STRIP * min(image.size)
    if max(image.size) > longest:  # scaled whole, a thin strip would take gigabytes
        image = TF.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    return _to_tensor(TF.center_crop(TF.resize(image, [resize], _BILINEAR), [size, size]))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


class Settings(TypedDict):
    """What `EncodedSet`s take from a configuration."""

    image_size: int
    resize: int
    on_error: Literal["raise", "skip"]


def settings_of(config: DataConfig) -> Settings:
    """Geometry and the treatment of errors.

    Raises:
        ConfigError: a resize that is smaller than the crop.
    """
    size = config.image_size or (64 if config.kind == "tiny-imagenet" else 224)
    resize = config.resize or size
    if resize < size:
        raise ConfigError(f"resize: got {resize}, need at least image_size {size}")
    return {"image_size": size, "resize": resize, "on_error": config.on_error}


def place(
    train: EncodedSet, test: EncodedSet, classes: tuple[str, ...], description: str, config: DataConfig
) -> Splits:
    """Apply limits, then decode the images or leave them to be streamed.

    Raises:
        DataError: an unreadable image that has to be decoded, unless `on_error` is skip.
    """
    train = train.select(balanced_subset(train.labels, config.train_limit, config.seed))
    test = test.select(balanced_subset(test.labels, config.test_limit, config.seed))
    decoded = (len(train) + len(test)) * train.image_size**2 * 3
    stream = config.memory == "stream" or (config.memory == "auto" and decoded > config.memory_limit_gb * 1e9)
    train = replace(train, random_crop=stream)
    prepare: Callable[[EncodedSet, int], ImageSet | EncodedSet] = _verified if stream else decode
    return Splits(
        train=prepare(train, config.workers),
        test=prepare(test, config.workers),
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=train.image_size,
        description=description,
    )


def check_same_classes(train: set[str], test: set[str], train_from: object, test_from: object) -> None:
    """Raise DataError unless both splits have the same classes, at least two."""
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
    """The first five, and how many more."""
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def decode(images: EncodedSet, workers: int) -> ImageSet:
    """Every image with the test-time geometry, read by `workers` threads.

    Raises:
        DataError: the first unreadable file; with on_error=skip only when no image is left.
    """
    pixels = torch.empty(len(images), images.image_size, images.image_size, 3, dtype=torch.uint8)

    def fill(index: int) -> None:
        pixels[index] = centre_crop(images.load(index), images.resize, images.image_size)

    kept = _try_each(images, fill, workers)
    if len(kept) == len(images):
        return ImageSet(images=pixels, labels=images.labels)
    return ImageSet(images=pixels, labels=images.labels).select(kept)


def _verified(images: EncodedSet, workers: int) -> EncodedSet:
    """With on_error=skip, leave out files whose header or checksum is wrong.

    That is quick but cannot see a JPEG whose pixels are cut short: such an image is left out of its
    batch when it is read.
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
    """Positions (int64) for which `work` succeeded; failures raise or are counted in one warning."""

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
