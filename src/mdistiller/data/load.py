"""Data sets from their configuration."""

from dataclasses import replace

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import ImageSet, Splits, StreamSet, TensorStream, resize_images
from mdistiller.data.encoded import EncodedSet, decode, drop_unreadable
from mdistiller.data.labels import add_label_noise, balanced_subset
from mdistiller.data.registry import get_reader
from mdistiller.errors import ConfigError, DataError


def load_data(config: DataConfig) -> Splits:
    """Reads a data set and applies its limits, placement (resident or streamed) and label noise.

    Raises:
        DataError: The set is missing, unreadable or malformed.
        ConfigError: Settings that contradict each other.
    """
    try:
        splits = get_reader(config.kind)(config)
        if not isinstance(splits, Splits):
            raise ConfigError(f"data set {config.kind!r}: got a {type(splits).__name__}, need Splits")
        splits = _place(splits, config)
    except OSError as error:  # for example no permission, or a name that is too long
        raise DataError(f"data in {config.root} cannot be read: {error}") from error
    noisy = add_label_noise(splits.train.labels, config.label_noise, splits.num_classes, config.seed)
    changed = int((noisy != splits.train.labels).sum())
    size, train = splits.image_size, len(splits.train)
    description = f"{splits.description}: {train:,} training and {len(splits.test):,} test images, "
    description += f"{size}x{size}, {splits.num_classes} classes"
    if changed:
        description += f", {changed:,} training labels ({changed / train:.1%}) replaced at random"
    for name in ("mean", "std"):
        if (given := getattr(config, name)) is not None:
            description += f", {name} {' '.join(map(str, given))}"
    if isinstance(splits.train, StreamSet):
        description += ", streamed"
    return replace(
        splits,
        train=replace(splits.train, labels=noisy),
        mean=config.mean or splits.mean,
        std=config.std or splits.std,
        description=description,
    )


def _place(splits: Splits, config: DataConfig) -> Splits:
    """Applies limits and image size, then decodes the images or leaves them to be streamed."""
    train, test = (
        images if limit is None else images.select(balanced_subset(images.labels, limit, config.seed))
        for images, limit in ((splits.train, config.train_limit), (splits.test, config.test_limit))
    )
    size = config.image_size or splits.image_size
    decoded = (len(train) + len(test)) * size * size * 3
    stream = config.memory == "stream" or (config.memory == "auto" and decoded > config.memory_limit_gb * 1e9)

    def prepare(images: ImageSet | StreamSet, random_crop: bool) -> ImageSet | StreamSet:
        if isinstance(images, ImageSet):
            if stream:
                return TensorStream(images=images.images, labels=images.labels, image_size=size)
            return replace(images, images=resize_images(images.images, size))
        if isinstance(images, EncodedSet):
            if stream:
                return drop_unreadable(replace(images, random_crop=random_crop), config.workers)
            return decode(images, config.workers)
        if config.memory == "resident":
            raise ConfigError(f"memory: data set {config.kind!r} is a stream; allowed are auto and stream")
        return images

    return replace(splits, train=prepare(train, True), test=prepare(test, False), image_size=size)
