"""From a configuration to a data set."""

from __future__ import annotations

from dataclasses import replace

from mdistiller.data.cifar import load_cifar
from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import ImageSet, Splits, StreamSet, TensorStream, resize_images
from mdistiller.data.digits import load_digits
from mdistiller.data.folder import load_folder
from mdistiller.data.labels import add_label_noise, balanced_subset
from mdistiller.data.shards import find_shards, load_shards
from mdistiller.data.synthetic import load_synthetic
from mdistiller.errors import DataError


def load_data(config: DataConfig) -> Splits:
    """Read the data set that `config` describes, with its limits and label noise applied.

    Raises:
        DataError: absent, unreadable, or not what it claims to be.
        ConfigError: settings that contradict each other.
    """
    try:
        splits = _read(config)
    except OSError as error:  # no permission, a name that is too long, a link in circles
        raise DataError(f"data in {config.root} cannot be read: {error}") from error
    noisy = add_label_noise(splits.train.labels, config.label_noise, splits.num_classes, config.seed)
    changed = int((noisy != splits.train.labels).sum())
    return replace(
        splits,
        train=replace(splits.train, labels=noisy),
        mean=config.mean or splits.mean,
        std=config.std or splits.std,
        description=_describe(splits, changed),
    )


def _read(config: DataConfig) -> Splits:
    # These limit themselves, before they decode anything.
    if config.kind == "folder" and (shards := find_shards(config.root)) is not None:
        return load_shards(config, *shards)
    if config.kind in ("folder", "tiny-imagenet"):
        return load_folder(config)
    if config.kind in ("cifar10", "cifar100"):
        return _place(load_cifar(config), config)
    if config.kind == "digits":
        return _place(load_digits(config), config)
    return _place(load_synthetic(config), config)


def _place(splits: Splits, config: DataConfig) -> Splits:
    """Apply limits, image size and memory to a set that was read as a whole."""
    assert isinstance(splits.train, ImageSet)
    assert isinstance(splits.test, ImageSet)
    size = config.image_size or splits.image_size
    train = splits.train.select(balanced_subset(splits.train.labels, config.train_limit, config.seed))
    test = splits.test.select(balanced_subset(splits.test.labels, config.test_limit, config.seed))
    decoded = (len(train) + len(test)) * size * size * 3
    stream = config.memory == "stream" or (config.memory == "auto" and decoded > config.memory_limit_gb * 1e9)

    def place(images: ImageSet) -> ImageSet | StreamSet:
        if stream:
            return TensorStream(images=images.images, labels=images.labels, image_size=size)
        return replace(images, images=resize_images(images.images, size))

    return replace(splits, train=place(train), test=place(test), image_size=size)


def _describe(splits: Splits, changed: int) -> str:
    train, test = len(splits.train), len(splits.test)
    line = (
        f"{splits.description}: {train:,} training and {test:,} test images, "
        f"{splits.image_size}x{splits.image_size}, {splits.num_classes} classes"
    )
    if changed:
        line += f", {changed:,} training labels ({changed / train:.1%}) replaced at random"
    return line + (", streamed" if isinstance(splits.train, StreamSet) else "")
