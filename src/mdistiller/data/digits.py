"""Handwritten digits of scikit-learn."""

import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import ImageSet, Splits, resize_images
from mdistiller.data.registry import register_dataset

TEST_IMAGES = 500
MEAN, STD = 0.3053, 0.3187


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
