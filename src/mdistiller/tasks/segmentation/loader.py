"""Batches of images with masks: random scale, crop and flip of both, as each image's own draws say."""

from collections.abc import Iterator
from functools import partial
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdistiller.data.dataset import PerChannel
from mdistiller.data.draws import Draws
from mdistiller.tasks.segmentation.config import SegmentationAugmentConfig, SegmentationConfig
from mdistiller.tasks.segmentation.data import IGNORE, Mask, SegmentationSet
from mdistiller.training.dense import DenseLoader
from mdistiller.training.distributed import World
from mdistiller.training.precision import memory_format
from mdistiller.types import IGNORED, Batch


def base_scale(size: tuple[int, int], short_side: int | None) -> float:
    """Returns the factor that scales the short side of a size to a length, 1 without one."""
    return 1.0 if short_side is None else short_side / min(size)


def scaled(image: Image.Image, short_side: int | None) -> Image.Image:
    """Scales an image so that its short side has a length, as in evaluation."""
    factor = base_scale(image.size, short_side)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image) -> Tensor:
    """Returns an RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: Tensor, mean: PerChannel, std: PerChannel) -> Tensor:
    """Scales uint8 [..., 3, H, W] to [0, 1], subtracts mean, divides by std: float32."""
    first, second = (torch.tensor(x, device=images.device)[:, None, None] for x in (mean, std))
    return (images.float() / 255 - first) / second


def change(
    image: Image.Image, mask: Mask, config: SegmentationAugmentConfig, draws: Draws, fill: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Scales image and mask by a random factor, crops them at random, and mirrors half of them.

    Where the scaled image is smaller than the crop, it is padded at the bottom and right: the image with the
    color `fill`, the mask with ignored pixels.

    Args:
        image: RGB image.
        mask: class ids [H, W].
        config: sizes and factors.
        draws: random numbers of this image.
        fill: red, green and blue.

    Returns:
        uint8 [3, h, w] and uint8 [h, w], of the size of the crop.
    """
    u = draws.uniform(4)[:, 0].tolist()
    low, high = config.scale
    factor = base_scale(image.size, config.short_side) * (low + (high - low) * u[0])
    box: list[float] = []
    parts = []
    for length, crop, place in zip(image.size, reversed(config.crop), u[1:3], strict=True):
        whole = max(1, round(length * factor))
        part = min(whole, crop)
        start = min(int(place * (whole - part + 1)), whole - part)
        box += [start * length / whole, (start + part) * length / whole]
        parts.append(part)
    region, size = (box[0], box[2], box[1], box[3]), (parts[0], parts[1])
    pixels = np.array(image.resize(size, Image.Resampling.BILINEAR, box=region))
    labels = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST, box=region))
    height, width = config.crop
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = fill
    target = np.full((height, width), IGNORE, np.uint8)
    canvas[: size[1], : size[0]], target[: size[1], : size[0]] = pixels, labels
    if config.flip and u[3] < 0.5:
        canvas, target = canvas[:, ::-1].copy(), target[:, ::-1].copy()
    return torch.from_numpy(canvas).permute(2, 0, 1), torch.from_numpy(target)


def _read(
    position: int,
    seed: int,
    *,
    images: SegmentationSet,
    config: SegmentationAugmentConfig,
    fill: tuple[int, ...],
    training: bool,
) -> tuple[Tensor, Tensor]:
    image, mask = images.read(position)
    if training:
        return change(image, mask, config, Draws(seed, torch.tensor([position])), fill)
    return to_tensor(scaled(image, config.short_side)), torch.from_numpy(mask)


class SegmentationLoader(DenseLoader[tuple[Tensor, Tensor]]):
    """Batches of a set of images with masks; see `DenseLoader`."""

    def __init__(
        self, images: SegmentationSet, config: SegmentationConfig, world: World, *, training: bool
    ) -> None:
        self.mean, self.std = config.data.mean, config.data.std
        self.layout = memory_format(config.layout) if training else torch.contiguous_format
        fill = tuple(round(255 * value) for value in self.mean)
        read = partial(_read, images=images, config=config.augment, fill=fill, training=training)
        super().__init__(images, config, world, read, training=training)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yields an epoch from batch `first`: image float32 [B, 3, h, w], label int64 [B, H, W].

        In evaluation, neighbors of one size are a batch, and labels have the masks' size.

        Raises:
            DataError: unreadable images, as `on_error` says.
        """
        for samples, position, _ in self._parts(epoch, first):
            rows = [(image, mask, index) for (image, mask), index in zip(samples, position, strict=True)]
            for _, group in groupby(rows, lambda row: (row[0].shape, row[1].shape)):
                images, masks, index = map(self._to_device, map(torch.stack, zip(*group, strict=True)))
                normal = normalize(images, self.mean, self.std).contiguous(memory_format=self.layout)
                yield Batch(normal, class_ids(masks), index)


def class_ids(mask: Tensor) -> Tensor:
    """Returns the class ids of a mask as int64, -100 where a pixel has none."""
    return mask.long().masked_fill(mask == IGNORE, IGNORED)
