"""Computed images for tests and benchmarks without files."""

import colorsys

import numpy as np
import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import ImageSet, Splits
from mdistiller.data.registry import register_dataset


@register_dataset("synthetic")
def load_synthetic(config: DataConfig) -> Splits:
    """Computes colored stripes with noise; each class has a color and a direction.

    There are `synthetic_samples` training images and half as many test images, balanced over the classes. A
    small network separates the classes after a few steps. `mean` 0.5 and `std` 0.25 are nominal.
    """
    classes, size, count = config.synthetic_classes, config.image_size or 32, config.synthetic_samples
    return Splits(
        train=_make(classes, count, size, config.seed, 0),
        test=_make(classes, max(count // 2, 1), size, config.seed, 1),
        classes=tuple(f"class {c}" for c in range(classes)),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        image_size=size,
        description="synthetic stripes",
    )


def _make(classes: int, count: int, size: int, seed: int, split: int) -> ImageSet:
    rng = np.random.default_rng([seed, split])
    labels = rng.permutation(np.arange(count) % classes)
    colors = np.array([colorsys.hsv_to_rgb(c / classes, 1.0, 1.0) for c in range(classes)], np.float32)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    angle = np.pi * np.arange(classes, dtype=np.float32) / classes
    images = np.empty((count, size, size, 3), np.uint8)
    for i, c in enumerate(labels):
        along = axis[:, None] * np.sin(angle[c]) + axis[None] * np.cos(angle[c])
        stripes = 0.5 + 0.5 * np.sin(2 * np.pi * (3 * along + rng.random()))
        image = 0.2 + 0.6 * stripes[..., None] * colors[c] + rng.normal(0, 0.1, (size, size, 3))
        images[i] = np.clip(image * 255, 0, 255)
    return ImageSet(images=torch.from_numpy(images), labels=torch.from_numpy(labels.astype(np.int64)))
