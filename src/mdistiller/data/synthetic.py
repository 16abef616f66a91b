"""Sets without files: computed images for tests and benchmarks, and handwritten digits of scikit-learn."""

import colorsys

import numpy as np
import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import ImageSet, Splits, resize_images
from mdistiller.data.registry import register_dataset

TEST_IMAGES = 500
MEAN, STD = 0.3053, 0.3187


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


@register_dataset("digits")
def load_digits(config: DataConfig) -> Splits:
    """Reads 1,797 grayscale digits of 8x8 pixels in ten classes: 1,297 for training, 500 for testing.

    The split is stratified and follows `config.seed`. Images are scaled up to `image_size` (16) and repeated
    over the three color channels; `mean` and `std` are those of all 16x16 images. A mirrored digit is a
    different sign or none, so turn the flip augmentation off.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    size = config.image_size or 16
    everything = ImageSet(images=resize_images(images[..., None].repeat(1, 1, 1, 3), size), labels=labels)
    positions = torch.arange(len(labels)).numpy()
    train, test = train_test_split(
        positions, test_size=TEST_IMAGES, stratify=digits.target, random_state=config.seed
    )
    return Splits(
        train=everything.select(torch.from_numpy(train)),
        test=everything.select(torch.from_numpy(test)),
        classes=tuple(str(name) for name in digits.target_names),
        mean=(MEAN, MEAN, MEAN),
        std=(STD, STD, STD),
        image_size=size,
        description="scikit-learn digits",
    )
