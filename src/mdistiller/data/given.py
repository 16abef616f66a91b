"""Data sets from objects: torch's `Dataset`s of images, and tensors."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import IMAGENET_MEAN, IMAGENET_STD, ImageSet, Splits, StreamSet, pixel_type
from mdistiller.data.decoder import Pixels, bands_of, channels_last, to_pixels, to_rgb, to_square
from mdistiller.data.encoded import sample, some
from mdistiller.data.memory import free_memory
from mdistiller.data.registry import GIVEN, Reader
from mdistiller.errors import ConfigError, DataError
from mdistiller.types import IGNORED

_TWICE = 8  # images of a sample that are read twice
_FILE_SIZE = 224  # of images of several sizes, as of image files
_SEVERAL = f"1, 0 or {IGNORED} (unknown) for each class"
_ALLOWED = "a PIL image, or a tensor [3, H, W] or [1, H, W], uint8 or float in [0, 1]"
_OTHERS = (
    "; for images of other channels, give mean and std with one number per channel, as in "
    '{"train": …, "mean": …, "std": …}'
)


class Items(Protocol):
    """A `Dataset` with a length, whose items are images with their labels, or images alone."""

    def __getitem__(self, index: int, /) -> object: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class ItemStream(StreamSet):
    """Items of a `Dataset` on reading; sizes and crops are those of image files (see `EncodedSet`)."""

    items: Items
    indices: Tensor  # int64 [N]
    image_size: int
    resize: int
    split: str  # name in messages
    channels: int = 3

    def select(self, indices: Tensor) -> Self:
        return replace(self, labels=self.labels[indices], indices=self.indices[indices])

    def read(self, index: int, seed: int) -> Tensor:
        item = int(self.indices[index])
        pixels = _read_pixels(self.items, item, self.split, self.channels)
        crop_scale = self.crop_scale if self.random_crop else None
        return to_square(pixels, self.resize, self.image_size, crop_scale, seed)


def read_given(
    train: object, test: object, classes: Sequence[str] | None = None, channels: int = 3
) -> tuple[str, Reader]:
    """Checks splits that are given as objects, and returns a name for them and their reader.

    A split is a `Dataset` whose items are (image, label), or a pair of tensors (images, labels): images
    [N, H, W, 3], [N, 3, H, W] or gray [N, H, W], uint8 or float in [0, 1], and class ids [N] or, of images
    of several classes each, 1, 0 or -100 (unknown) [N, classes]. A label may be None, or absent from the
    pair. Items that are squares of one size are kept in memory; others are read again in each epoch, and
    cropped at random from the whole image. The name follows from the labels and from 64 images of each split.

    Args:
        train: the images to train on.
        test: the images to evaluate on. None: some of `train` (`val_fraction`).
        classes: names of the classes. None: the `classes` of the `Dataset`, or numbers.
        channels: number of the images' channels. Those of others than three keep their precision.

    Raises:
        ConfigError: a split of another form, or labels that are no class ids.
    """
    found, names, named = _read_splits(train, test, classes, channels)
    digest = hashlib.sha256()
    for images in found.values():
        digest.update(images.labels.numpy().tobytes())
        for i in sample(images):
            pixels = images.images[i] if isinstance(images, ImageSet) else images.read(i, 0)
            digest.update(pixels.numpy().tobytes())

    def reader(config: DataConfig) -> Splits:
        return _make_splits(found, names, named, config, "images given as objects")

    return f"{GIVEN}{digest.hexdigest()[:8]}", reader


def splits_of_objects(pair: tuple[object, object], config: DataConfig) -> Splits:
    """Returns the splits of a pair (train, test) of objects, as `read_given` takes them."""
    return _make_splits(*_read_splits(*pair, None, config.channels), config, f"images of {config.kind}")


Found = dict[str, ImageSet | ItemStream]


def _read_splits(
    train: object, test: object, classes: Sequence[str] | None, channels: int
) -> tuple[Found, tuple[str, ...], bool]:
    """Returns both splits, the names of the classes, and whether the names were given."""
    found = {"train": _read_split(train, "train", channels)}
    found["test"] = found["train"] if test is None else _read_split(test, "test", channels)
    own = [[*map(str, names)] for names in map(_own_names, (train, test)) if names is not None]
    if len(own) > 1 and own[0] != own[1]:
        raise ConfigError(
            f"data: classes of train are {some(own[0])}, of test {some(own[1])}; allowed: one order"
        )
    given = _own_names(train) if classes is None else classes
    return found, _class_names(given, found), given is not None


def _own_names(split: object) -> Iterable[object] | None:
    columns = getattr(split, "features", None)  # of a Hugging Face set
    label = columns.get("label") if isinstance(columns, Mapping) else None
    return getattr(split, "classes", getattr(label, "names", None))


def _make_splits(
    found: Found, classes: tuple[str, ...], named: bool, config: DataConfig, description: str
) -> Splits:
    train, test = (_as_asked(found[split], config) for split in ("train", "test"))
    if isinstance(train, ItemStream):
        train, size = replace(train, random_crop=True), train.image_size
    else:
        size = train.images.shape[1]
    return Splits(
        train=train,
        test=test,
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=config.image_size or size,
        description=description,
        crop="resized" if isinstance(train, ItemStream) else "padded",
        named=named,
    )


def _check_fixed(items: Items, split: str, channels: int) -> None:
    """Checks that items are the same each time, without which no run could be repeated."""
    for i in sample(items)[:_TWICE]:
        one, other = (_read_pixels(items, i, split, channels) for _ in range(2))
        if not np.array_equal(one, other):
            raise ConfigError(
                f"data: {split}[{i}] is another image each time; allowed: a Dataset without random "
                "transforms, since the run augments (field augment)"
            )


def _as_asked(images: ImageSet | ItemStream, config: DataConfig) -> ImageSet | ItemStream:
    if isinstance(images, ImageSet):
        return images
    size = config.image_size or images.image_size
    return replace(images, image_size=size, resize=config.resize or size, on_error=config.on_error)


def _are_items(given: object) -> TypeGuard[Items]:
    return hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, Tensor | str)


def _read_split(given: object, split: str, channels: int) -> ImageSet | ItemStream:
    if isinstance(given, tuple | list) and len(given) == 2 and hasattr(given[0], "dtype"):
        return _read_tensors(given[0], given[1], split, channels)
    if not _are_items(given):
        raise ConfigError(
            f"data: {split} is a {type(given).__name__}; allowed: a Dataset with a length, or a pair "
            "(images, labels) of tensors"
        )
    if not len(given):
        raise ConfigError(f"data: {split} has no images")
    _check_fixed(given, split, channels)
    sizes = {_read_pixels(given, i, split, channels).shape[:2] for i in sample(given)}
    height, width = next(iter(sizes))
    kind = pixel_type(channels)
    size_in_memory = len(given) * height * width * channels * kind.itemsize
    if len(sizes) > 1 or height != width or size_in_memory > free_memory() / 2:
        found = [_label(_read_item(given, i, split)[1], f"{split}[{i}]") for i in range(len(given))]
        labels = _as_labels(found, len(given), split)
        size = height if len(sizes) == 1 and height == width else _FILE_SIZE
        indices = torch.arange(len(given))
        sides = partial(ItemStream, image_size=size, resize=size, channels=channels)
        return sides(items=given, indices=indices, labels=labels, split=split)
    images = torch.empty(len(given), height, width, channels, dtype=kind)
    found = []
    for i in range(len(given)):
        image, label = _read_item(given, i, split)
        pixels = _pixels(image, f"{split}[{i}]", channels)
        if pixels.shape[:2] != (height, width):
            raise ConfigError(
                f"data: {split}[{i}] has {pixels.shape[0]} x {pixels.shape[1]} pixels, others {height} x "
                f"{width}; allowed: squares of one size, or photographs of many sizes"
            )
        images[i] = torch.from_numpy(pixels)
        found.append(_label(label, f"{split}[{i}]"))
    return ImageSet(images=images, labels=_as_labels(found, len(given), split))


def _read_tensors(images: Tensor, labels: object, split: str, channels: int) -> ImageSet:
    try:
        labels = torch.full((len(images),), IGNORED) if labels is None else labels
        images = torch.as_tensor(images).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"data: {split} is no pair (images, labels) of tensors: {error}") from error
    if channels != 3:
        try:
            pixels = to_pixels(channels_last(images.numpy(), channels, 4))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"data: images of {split}: {error}") from error
        images = torch.from_numpy(np.ascontiguousarray(pixels))
        return ImageSet(images=images, labels=_as_labels(labels, len(images), split))
    if images.ndim == 4 and images.shape[-1] != 3 and images.shape[1] == 3:
        images = images.permute(0, 2, 3, 1)
    if images.ndim == 3:  # gray
        images = images[..., None].expand(-1, -1, -1, 3)
    if images.is_floating_point() and images.numel():
        images = _as_bytes(images, f"images of {split} have")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ConfigError(
            f"data: images of {split} are {images.dtype} {list(images.shape)}; allowed: [N, H, W, 3], "
            f"[N, 3, H, W] or gray [N, H, W], uint8 or float in [0, 1], not normalized{_OTHERS}"
        )
    return ImageSet(images=images.contiguous(), labels=_as_labels(labels, len(images), split))


def _as_labels(values: object, count: int, split: str) -> Tensor:
    """Returns class ids, int64 [count]; for several classes an image 0, 1 or -100, float32 [count, C]."""
    allowed = (
        f"allowed: a class id for each of the {count} images, an integer tensor [{count}]; or, for several "
        f"classes an image, {_SEVERAL}, [{count}, classes]"
    )
    try:
        labels = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"data: labels of {split} are no tensor: {error}; {allowed}") from error
    if labels.ndim == 2 and len(labels) == count and labels.shape[1] > 1:
        several = labels.float()
        if torch.isin(several, torch.tensor([0.0, 1.0, IGNORED])).all():
            return several
    elif labels.shape == (count,) and not (labels.is_floating_point() or labels.dtype == torch.bool):
        return labels.long()
    raise ConfigError(f"data: labels of {split} are {labels.dtype} {list(labels.shape)}; {allowed}")


def _class_names(classes: Iterable[object] | None, splits: Found) -> tuple[str, ...]:
    train, test = splits["train"].labels, splits["test"].labels
    if train.shape[1:] != test.shape[1:]:
        raise ConfigError(f"data: labels of train are {list(train.shape)}, of test {list(test.shape)}")
    if classes is None and train.ndim == 2:
        classes = range(train.shape[1])
    if classes is None:
        highest = int(train.max()) if int(train.max()) >= 0 else int(test.max())
        classes = range(max(2, 1 + highest))
    names = tuple(map(str, classes))
    if train.ndim == 2:
        if len(names) != train.shape[1]:
            raise ConfigError(f"data: labels are {list(train.shape)}, and there are {len(names)} classes")
        return names
    for split, images in splits.items():
        wrong = images.labels[
            ((images.labels < 0) & (images.labels != IGNORED)) | (images.labels >= len(names))
        ]
        if len(wrong):
            raise ConfigError(
                f"data: a label of {split} is {int(wrong[0])}; allowed: 0 to {len(names) - 1}, as there are "
                f"{len(names)} classes, or {IGNORED} for an image without a class"
            )
    return names


def _read_item(items: Items, index: int, split: str) -> tuple[object, object]:
    try:
        item = items[index]
    except Exception as error:  # items are code of the caller
        raise DataError(f"{split}[{index}] cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(item, Image.Image) or (isinstance(item, Tensor | np.ndarray) and item.ndim == 3):
        return item, None  # an image alone
    if isinstance(item, Mapping):  # a row of a Hugging Face set
        if not {"image", "label"} <= item.keys():
            raise ConfigError(
                f"data: {split}[{index}] has the columns {', '.join(map(str, item))}; allowed: image and "
                "label (rename_column gives a column another name)"
            )
        return item["image"], item["label"]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(
            f"data: {split}[{index}] is a {type(item).__name__}; allowed: a pair (image, label), or an image"
        )
    return item[0], item[1]


def _read_pixels(items: Items, index: int, split: str, channels: int) -> Pixels:
    return _pixels(_read_item(items, index, split)[0], f"{split}[{index}]", channels)


def _label(value: object, name: str) -> int | list[float]:
    if value is None:
        return IGNORED
    with suppress(TypeError, ValueError, RuntimeError):  # words, lists of other lengths
        found = torch.as_tensor(value)
        if found.ndim == 1 and len(found) > 1:
            return found.double().tolist()
        is_integer = torch.can_cast(found.dtype, torch.int64) and found.dtype != torch.bool
        if is_integer and found.numel() == 1 and not isinstance(value, list | tuple):
            return int(found)
    raise ConfigError(
        f"data: the label of {name} is {value!r}; allowed: a class id, an integer; for several classes an "
        f"image, {_SEVERAL}"
    )


def _as_bytes(images: Tensor, subject: str) -> Tensor:
    """Returns pixels in [0, 1] as uint8."""
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ConfigError(
            f"data: {subject} values from {low:.3g} to {high:.3g}; allowed: {_ALLOWED}; "
            "leave out Normalize, the run normalizes by the fields mean and std of its data"
        )
    return (images * 255).round().to(torch.uint8)


def _pixels(image: object, name: str, channels: int) -> Pixels:
    """Returns an image as uint8 [H, W, 3], or of other channels as `to_pixels`."""
    try:
        if isinstance(image, Image.Image):
            return np.array(to_rgb(image)) if channels == 3 else bands_of(image, channels)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(channels_last(image, channels)).movedim(-1, 0)
        if channels != 3 and isinstance(image, Tensor) and image.shape[:-2] == (channels,):
            return to_pixels(image.detach().cpu().movedim(0, -1).numpy())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data: the image of {name}: {error}{_OTHERS}") from error
    allowed = (
        f"{_ALLOWED}{_OTHERS}"
        if channels == 3
        else f"a PIL image of {channels} channels, or a tensor [{channels}, H, W]"
    )
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3) or channels != 3:
        what = f"a tensor {list(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise ConfigError(f"data: the image of {name} is {what}; allowed: {allowed}")
    image = image.detach().cpu()
    if image.is_floating_point():
        image = _as_bytes(image, f"the image of {name} has")
    if image.dtype != torch.uint8:
        raise ConfigError(f"data: the image of {name} is a tensor of {image.dtype}; allowed: {_ALLOWED}")
    pixels: Pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return pixels
