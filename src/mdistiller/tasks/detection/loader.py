"""Batches of images with objects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mdistiller.seeding import derive_seed
from mdistiller.tasks.detection.coco import DetectionSet, Target, Transform, train_transform
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.training.dense import DenseLoader
from mdistiller.training.distributed import World


class DetectionBatch(NamedTuple):
    """A batch of images with objects.

    image: B images, float [3, H, W] in [0, 1], each of its own size.
    target: B dicts: `boxes` float [N, 4] (x1, y1, x2, y2 in pixels), `labels` int64 [N] from 1, and for
        masks `masks` uint8 [N, H, W]. Empty for an image whose objects are not known.
    index: int64 [B], each image's position in its set.
    """

    image: list[Tensor]
    target: list[Target]
    index: Tensor  # type: ignore[assignment]  # the field's name; tuple.index is not missed

    def split(self, count: int, num_views: int = 1) -> list[DetectionBatch]:
        """Splits the batch into at most `count` parts; detection methods have one view."""
        size = math.ceil(len(self.image) / count)
        parts = [slice(i, i + size) for i in range(0, len(self.image), size)]
        return [DetectionBatch(self.image[p], self.target[p], self.index[p]) for p in parts]


def _read(
    position: int, seed: int, *, images: DetectionSet, transform: Transform | None
) -> tuple[Tensor, Target]:
    image, target = images.read(position)
    if transform is not None:
        # torchvision draws from torch's global generator, which others use too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, position))
            image, target = transform(image, target)
    if not images.images[position].is_labeled:
        target = {}
    return image.as_subclass(Tensor), {key: value.as_subclass(Tensor) for key, value in target.items()}


class DetectionLoader(DenseLoader[tuple[Tensor, Target]]):
    """Batches of a detection set; see `DenseLoader`."""

    def __init__(
        self, images: DetectionSet, config: DetectionConfig, world: World, *, training: bool
    ) -> None:
        transform = train_transform(config.augment) if training else None
        read = partial(_read, images=images, transform=transform)
        super().__init__(images, config, world, read, training=training)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[DetectionBatch]:
        """Yields an epoch from batch `first`; raises DataError for unreadable images, as `on_error` says."""
        for samples, position, _ in self._parts(epoch, first):
            yield DetectionBatch(
                [self._to_device(image).float() / 255 for image, _ in samples],
                [{key: self._to_device(value) for key, value in target.items()} for _, target in samples],
                self._to_device(position),
            )
