"""Data sets from their configuration."""

import warnings
from dataclasses import replace
from typing import Literal

import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import ImageSet, Splits, StreamSet, TensorStream, pixel_type, resize_images
from mdistiller.data.encoded import (
    ENDINGS,
    EncodedSet,
    are_squares,
    as_encoded,
    decode,
    drop_unreadable,
    small_side,
    some,
)
from mdistiller.data.folder import images_below
from mdistiller.data.given import splits_of_objects
from mdistiller.data.identity import COMPARED, count_copies
from mdistiller.data.labels import add_label_noise, balanced_subset, has_class, stratified_cut
from mdistiller.data.memory import free_memory
from mdistiller.data.registry import get_reader
from mdistiller.errors import ConfigError, DataError
from mdistiller.types import IGNORED

Images = ImageSet | StreamSet
Mode = Literal["resident", "stream"]
_HELD_OUT = 5000  # images at most, without labels and without a validation split


def load_data(config: DataConfig, device: torch.device | None = None, *, unlabeled: bool = True) -> Splits:
    """Reads a data set, cuts its splits, and applies limits, placement (`memory`) and label noise.

    Args:
        config: the data set.
        device: device of the batches; its free memory limits resident images. None: the CPU.
        unlabeled: keep training images without a class.

    Raises:
        DataError: The set is missing, unreadable or malformed.
        ConfigError: Settings that contradict each other.
    """
    try:
        splits = get_reader(config.kind)(config)
        if isinstance(splits, tuple) and len(splits) == 2:
            splits = splits_of_objects(splits, config)
        if not isinstance(splits, Splits):
            raise ConfigError(
                f"data set {config.kind!r}: got a {type(splits).__name__}, need Splits or (train, test)"
            )
        if not config.labeled:
            parts = (
                replace(part, labels=torch.full((len(part),), IGNORED))
                for part in (splits.train, splits.test)
            )
            splits = replace(splits, train=next(parts), test=next(parts), classes=())
        count = len(config.mean or splits.mean)
        for part in (splits.train, splits.test):
            found = part.images.shape[-1] if isinstance(part, ImageSet) else getattr(part, "channels", count)
            if found != count:
                raise ConfigError(f"mean: got {count} numbers; the images have {found} channels")
        splits = _cut(splits, config)
        if unlabeled and config.unlabeled is not None:
            splits = replace(splits, train=_add_unlabeled(splits.train, config))
        if not unlabeled:
            splits = replace(splits, train=_with_class(splits.train, config))
        _check_copies(splits, config)
        splits, placement = _place(splits, config, device)
    except OSError as error:  # for example no permission, or a name that is too long
        raise DataError(f"data in {config.root} cannot be read: {error}") from error
    if config.label_noise and splits.multi_label:
        raise ConfigError(
            f"label_noise: got {config.label_noise}; allowed for images of several classes is 0"
        )
    noisy = splits.train.labels
    if not splits.multi_label:
        noisy = add_label_noise(noisy, config.label_noise, splits.num_classes, config.seed)
    changed = int((noisy != splits.train.labels).sum())
    size, train = splits.image_size, len(splits.train)
    others = int((~has_class(splits.train.labels)).sum())
    without = f" ({others:,} of them without a class)" if others and config.labeled else ""
    description = f"{splits.description}: {train:,} training{without} and {len(splits.test):,} test images, "
    shape = f"{size}x{size}" + (f" of {count} channels" if count != 3 else "")
    description += f"{shape}, {splits.num_classes} classes" if config.labeled else shape
    if changed:
        description += f", {changed:,} training labels ({changed / train:.1%}) replaced at random"
    for name in ("mean", "std"):
        if (given := getattr(config, name)) is not None:
            description += f", {name} {' '.join(map(str, given))}"
    return replace(
        splits,
        train=replace(splits.train, labels=noisy),
        mean=config.mean or splits.mean,
        std=config.std or splits.std,
        description=description + placement,
    )


def _cut(splits: Splits, config: DataConfig) -> Splits:
    """Cuts the validation split off the training images, and warns about classes without a test image."""
    labels, fraction = splits.train.labels, config.val_fraction
    if not config.labeled:
        labels = torch.zeros_like(labels)  # as if of one class
        if fraction is None and not len(splits.test):
            fraction = min(0.1, _HELD_OUT / max(len(labels), 1))
    if fraction is not None:
        kept, cut = stratified_cut(labels, fraction, config.seed)
        test = splits.train.select(cut) if config.eval_split == "validation" else splits.test
        splits = replace(splits, train=splits.train.select(kept), test=test)
    if not config.labeled:
        return splits
    known = has_class(splits.test.labels).nonzero()[:, 0]
    if others := len(splits.test) - len(known):
        warnings.warn(f"left out: {others} test images without a class", stacklevel=3)
        splits = replace(splits, test=splits.test.select(known))
    labels = splits.test.labels
    present = set((labels.unique() if labels.ndim == 1 else (labels > 0).any(0).nonzero()).flatten().tolist())
    absent = [name for i, name in enumerate(splits.classes) if i not in present]
    if absent and isinstance(splits.test, EncodedSet):  # of one's own; computed ones may be any part
        warnings.warn(
            f"{len(absent)} of {len(splits.classes)} classes have no test image: {some(absent)}", stacklevel=3
        )
    return splits


def _check_copies(splits: Splits, config: DataConfig) -> None:
    """Warns about test images that are byte copies of training images; sets of many files are not read."""
    train, test = splits.train, splits.test
    if not isinstance(train, EncodedSet) or not isinstance(test, EncodedSet):
        return
    if len(train) + len(test) <= COMPARED and (copies := count_copies(train, test, config.workers)):
        warnings.warn(f"{copies} of {len(test)} test images are copies of training images", stacklevel=3)


def _add_unlabeled(images: Images, config: DataConfig) -> Images:
    """Adds the images of the folder `unlabeled`, which have no class."""
    folder = config.unlabeled
    if folder is None or not folder.is_dir():
        raise DataError(f"data.unlabeled: {folder} is no folder")
    files = list(images_below(folder, config.channels))
    if not files:
        raise DataError(f"data.unlabeled: {folder} has no images, which end in {ENDINGS}")
    labels = torch.full((len(files), *images.labels.shape[1:]), IGNORED, dtype=images.labels.dtype)
    if isinstance(images, EncodedSet):
        return images.of([*images.samples, *files], torch.cat([images.labels, labels]))
    if not isinstance(images, ImageSet):
        raise ConfigError(
            f"data.unlabeled: data set {config.kind!r} is a stream of its own; allowed are image files, "
            "kind hf and arrays"
        )
    size = images.images.shape[1]
    added = replace(
        as_encoded(files, config.channels),
        labels=labels,
        image_size=size,
        resize=size,
        on_error=config.on_error,
    )
    decoded = decode(added, config.workers)
    return ImageSet(
        images=torch.cat([images.images, decoded.images]), labels=torch.cat([images.labels, decoded.labels])
    )


def _with_class(images: Images, config: DataConfig) -> Images:
    """Selects the images that have a class."""
    known = has_class(images.labels).nonzero()[:, 0]
    if not len(known):
        raise DataError(
            f"no training image in {config.root} has a class, which a run without a teacher needs"
        )
    return images if len(known) == len(images) else images.select(known)


def _place(splits: Splits, config: DataConfig, device: torch.device | None) -> tuple[Splits, str]:
    """Applies limits and image size, then keeps the images in memory or leaves them to be streamed.

    Returns the placed splits, and words about the training images for the description. Files alone decide
    whether random crops come from decoded squares or whole images (`are_squares`); memory decides between
    modes that have the same bits.
    """
    train, test = (
        images if limit is None else images.select(balanced_subset(images.labels, limit, config.seed))
        for images, limit in ((splits.train, config.train_limit), (splits.test, config.test_limit))
    )
    size, kept = config.image_size or splits.image_size, ""
    is_open = config.image_size is None and config.resize is None
    side = small_side(train) if is_open and isinstance(train, EncodedSet) else None
    if side is not None and isinstance(train, EncodedSet) and isinstance(test, EncodedSet):
        size, kept = side, ", the size of the files (data.image_size changes it)"
        train, test = (replace(images, image_size=side, resize=side) for images in (train, test))
    if isinstance(train, EncodedSet):
        train = replace(train, random_crop=not are_squares(train))
    given = config.memory_limit_gb
    # Decoded images pass through the host.
    room = min(free_memory(), free_memory(device)) / 2 if given is None else given * 1e9
    # Test images first: they are never cropped at random, and are read again in every evaluation.
    each = size**2 * config.channels * pixel_type(config.channels).itemsize
    test_mode = _mode(test, config, room, each)
    room -= len(test) * each if test_mode == "resident" else 0
    train_mode = _mode(train, config, room, each)
    placed = replace(
        splits,
        train=_prepare(train, train_mode, config, size),
        test=_prepare(test, test_mode, config, size),
        image_size=size,
    )
    if train_mode == "stream":
        return placed, f"{kept}, streamed"
    if not isinstance(train, EncodedSet):
        return placed, ""
    shrunk = (
        f" and shrunk to {size}x{size}, from which random crops are enlarged" if train.random_crop else ""
    )
    return placed, f"{kept}, decoded in memory{shrunk}"


def _mode(images: Images, config: DataConfig, room: float, each: int) -> Mode:
    """Returns where images of so many bytes `each` are kept; `room` is in bytes."""
    if isinstance(images, StreamSet) and not isinstance(images, EncodedSet):
        if config.memory == "resident":
            raise ConfigError(f"memory: data set {config.kind!r} is a stream; allowed are auto and stream")
        return "stream"
    if config.memory != "auto":
        return config.memory
    is_cropped = isinstance(images, EncodedSet) and images.random_crop
    return "resident" if not is_cropped and len(images) * each <= room else "stream"


def _prepare(images: Images, mode: Mode, config: DataConfig, size: int) -> Images:
    if isinstance(images, ImageSet):
        if mode == "resident":
            return replace(images, images=resize_images(images.images, size))
        return TensorStream(images=images.images, labels=images.labels, image_size=size)
    if not isinstance(images, EncodedSet):
        return images
    if mode == "resident":
        return decode(replace(images, random_crop=False), config.workers)
    return drop_unreadable(images, config.workers)
