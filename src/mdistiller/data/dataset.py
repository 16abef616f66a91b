"""Data sets in memory or streamed, and the two splits that a run trains and tests on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller.errors import ConfigError

PerChannel = tuple[float, ...]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Decoded images [N, H, W, C], contiguous, see `pixel_type`, and their labels, as `Batch.label`."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...] | None = None  # the images' files; None if they are not of files

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        check_pixels(images, "images", images.shape[-1] if images.is_floating_point() else 3)
        kind = {1: torch.int64, 2: torch.float32}.get(labels.ndim)
        if labels.dtype != kind or len(labels) != len(images):
            raise ValueError(
                f"labels: got {labels.dtype} {tuple(labels.shape)}, need int64 [{len(images)}], or float32 "
                f"[{len(images)}, classes] of several classes each"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Self:
        """Returns the images at `indices` (int64 [M]), in that order."""
        names = None if self.names is None else tuple(self.names[i] for i in indices.tolist())
        return replace(self, images=self.images[indices], labels=self.labels[indices], names=names)


@dataclass(frozen=True, kw_only=True)
class StreamSet(ABC):
    """Images that are read on demand; a loader raises for an unreadable one, or skips it and warns."""

    labels: Tensor  # class ids, int64 [N], or of several classes each, float32 [N, classes]
    random_crop: bool = False  # whether `read` crops at random, which replaces the crop of the augmentation
    crop_scale: tuple[float, float] = (0.08, 1.0)  # smallest and largest area of a random crop, as fractions
    on_error: Literal["raise", "skip"] = "raise"

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int, seed: int) -> Tensor:
        """Reads an image [S, S, C] see `ImageSet`; `seed` fixes all that is random. DataError if it fails."""

    def select(self, indices: Tensor) -> Self:
        """Returns the images at `indices` (int64 [M]), in that order; the limits need it."""
        raise ConfigError(f"train_limit, test_limit: {type(self).__name__} has no method select(indices)")


@dataclass(frozen=True, kw_only=True)
class TensorStream(StreamSet):
    """Decoded images in host memory, as in an `ImageSet`, scaled to `image_size` on reading."""

    images: Tensor
    image_size: int

    def read(self, index: int, seed: int) -> Tensor:
        return resize_images(self.images[index : index + 1], self.image_size)[0]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Data set ready for training."""

    train: ImageSet | StreamSet
    test: ImageSet | StreamSet
    classes: tuple[str, ...]  # names, in the order of the class ids
    mean: PerChannel  # of each channel, for images scaled to [0, 1]
    std: PerChannel
    image_size: int  # side of the square images in pixels
    description: str  # name of the set; `load_data` adds counts, size and label noise, on one line
    crop: Literal["padded", "resized"] = "padded"  # random crops that suit the set: `augment.crop` auto
    named: bool = True  # whether the classes' names came with the data; otherwise they are the ids as text

    @property
    def multi_label(self) -> bool:
        """Whether an image has several classes."""
        return self.train.labels.is_floating_point()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return len(self.mean), self.image_size, self.image_size


def resize_images(images: Tensor, size: int) -> Tensor:
    """Scales [N, H, W, C] to [N, size, size, C] of the same type, bilinear, antialiased when shrinking."""
    if images.shape[1:3] == (size, size):
        return images
    out = images.new_empty(len(images), size, size, images.shape[-1])
    for part, target in zip(images.split(1024), out.split(1024), strict=True):
        part = part.permute(0, 3, 1, 2).float()
        scaled = F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)
        target.copy_(as_pixels(scaled, images.dtype).permute(0, 2, 3, 1))
    return out


def as_pixels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns scaled float32 pixels in the type of their images; `values` are changed."""
    return values.round_().clamp_(0, 255).to(dtype) if dtype == torch.uint8 else values


def pixel_type(channels: int) -> torch.dtype:
    """Returns the type of decoded images: uint8 for RGB, float32 from 0 to 255 for other channels."""
    return torch.uint8 if channels == 3 else torch.float32


def check_pixels(images: Tensor, name: str, channels: int) -> None:
    """Raises ValueError unless images are [B, H, W, C] with so many channels, of their type."""
    need = pixel_type(channels)
    if images.ndim != 4 or images.dtype != need or images.shape[-1] != channels:
        got = f"{name}: got {images.dtype} {tuple(images.shape)}"
        raise ValueError(f"{got}, need {str(need).removeprefix('torch.')} [B, H, W, {channels}]")
