"""What a data set is once it is read: two sets of images and what describes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Decoded images.

    images: uint8 [N, H, W, 3], contiguous.
    labels: int64 [N] class ids.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, need uint8 [N, H, W, 3]")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels: got {labels.dtype} {tuple(labels.shape)}, need int64 [{len(images)}]")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (int64 [M]), in that order."""
        return ImageSet(images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class StreamSet(ABC):
    """Images that are read when they are needed.

    labels: int64 [N] class ids.
    on_error: what a loader does when `read` fails: raise, or leave the image out of its batch and warn.
    random_crop: whether `read` crops at random, so that no other crop is wanted.
    """

    labels: Tensor
    random_crop: bool = False
    on_error: Literal["raise", "skip"] = "raise"

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int, seed: int) -> Tensor:
        """One image, uint8 [S, S, 3]. What is random about it depends on `seed` alone.

        Raises:
            DataError: the image cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class TensorStream(StreamSet):
    """Decoded images in host memory (uint8 [N, H, W, 3]), scaled to `image_size` when read."""

    images: Tensor
    image_size: int

    def read(self, index: int, seed: int) -> Tensor:
        """One image, uint8 [S, S, 3]; nothing about it is random."""
        return resize_images(self.images[index : index + 1], self.image_size)[0]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set ready for training.

    classes: names, in the order of the class ids.
    mean, std: of each colour channel, for images scaled to [0, 1].
    image_size: side of the square images in pixels.
    description: one line for people: name, counts, size, label noise.
    """

    train: ImageSet | StreamSet
    test: ImageSet | StreamSet
    classes: tuple[str, ...]
    mean: Triple
    std: Triple
    image_size: int
    description: str

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def resize_images(images: Tensor, size: int) -> Tensor:
    """Scale uint8 [N, H, W, 3] to uint8 [N, size, size, 3], bilinear, antialiased when shrinking."""
    if images.shape[1:3] == (size, size):
        return images
    out = torch.empty(len(images), size, size, 3, dtype=torch.uint8)
    for part, target in zip(images.split(1024), out.split(1024), strict=True):
        scaled = F.interpolate(
            part.permute(0, 3, 1, 2).float(),
            (size, size),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        target.copy_(scaled.round_().clamp_(0, 255).permute(0, 2, 3, 1))
    return out
