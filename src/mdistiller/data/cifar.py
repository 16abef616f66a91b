"""CIFAR-10 and CIFAR-100 in their public python layout (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.dataset import ImageSet, PerChannel, Splits
from mdistiller.data.registry import register_dataset
from mdistiller.data.unpickle import read_pickle
from mdistiller.errors import DataError


class _Layout(NamedTuple):
    classes: int
    folder: str
    files: tuple[tuple[str, ...], tuple[str, ...]]  # of training and test images
    meta: str
    keys: tuple[str, str]  # of labels and class names
    mean: PerChannel
    std: PerChannel

    @property
    def name(self) -> str:
        return f"CIFAR-{self.classes}"


_LAYOUTS = {
    "cifar100": _Layout(
        classes=100,
        folder="cifar-100-python",
        files=(("train",), ("test",)),
        meta="meta",
        keys=("fine_labels", "fine_label_names"),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
    "cifar10": _Layout(
        classes=10,
        folder="cifar-10-batches-py",
        files=(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
        meta="batches.meta",
        keys=("labels", "label_names"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
}

TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # in either set


@register_dataset("cifar10")
@register_dataset("cifar100")
def load_cifar(config: DataConfig) -> Splits:
    """Reads CIFAR-10 or CIFAR-100, 32x32.

    The files are in `ROOT/cifar-100-python` (`ROOT/cifar-10-batches-py`) or in ROOT itself; otherwise they
    are downloaded if `config.download` is on. A set that is missing and not downloaded, incomplete, damaged,
    or has another shape or count is a DataError.
    """
    layout = _LAYOUTS[config.kind]
    folder = _find(layout, config)
    classes = _read_classes(folder / layout.meta, layout)
    return Splits(
        train=_read_images(folder, layout.files[0], layout, TRAIN_IMAGES),
        test=_read_images(folder, layout.files[1], layout, TEST_IMAGES),
        classes=classes,
        mean=layout.mean,
        std=layout.std,
        image_size=32,
        description=layout.name,
    )


def _find(layout: _Layout, config: DataConfig) -> Path:
    files = (*layout.files[0], *layout.files[1], layout.meta)
    home, archive = config.root / layout.folder, f"cifar-{layout.classes}-python.tar.gz"
    for folder in (home, config.root):
        missing = [name for name in files if not (folder / name).is_file()]
        if not missing:
            return folder
        # A file named `train` does not make ROOT a CIFAR folder, but the public folder name does.
        if folder.exists() and (folder is home or config.root.name == layout.folder):
            raise DataError(
                f"{layout.name} in {folder} is incomplete: {', '.join(missing)} missing; "
                f"unpack {archive} again, or remove the folder to have it downloaded"
            )
    tried = "the download is off (--data.download turns it on)"
    if config.download:
        try:
            _download(layout, config)
            return home
        except Exception as error:  # network, proxy, disk, checksum: the remedy is the same
            tried = f"the download failed ({type(error).__name__}: {error})"
    raise DataError(
        f"{layout.name} not found: looked for {home} and for its files in {config.root}; {tried}. Either let "
        f"--data.download fetch it on a machine with a network, or get {archive} from "
        f"https://www.cs.toronto.edu/~kriz/cifar.html and unpack it under {config.root}"
    )


def _download(layout: _Layout, config: DataConfig) -> None:
    import torchvision

    fetch = getattr(torchvision.datasets, f"CIFAR{layout.classes}")
    config.root.mkdir(parents=True, exist_ok=True)
    # The download is moved when it is complete, so that an interrupted one is never read as data and
    # concurrent ones do not write to the same files.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=config.root) as temporary:
        with contextlib.redirect_stdout(sys.stderr):
            fetch(temporary, download=True)
        try:
            os.replace(Path(temporary) / layout.folder, config.root / layout.folder)
        except OSError:  # another process was first
            if not (config.root / layout.folder / layout.meta).is_file():
                raise


def _read_images(folder: Path, files: tuple[str, ...], layout: _Layout, expected: int) -> ImageSet:
    batches = zip(*(_read_batch(folder / name, layout) for name in files), strict=True)
    images, labels = (np.concatenate(parts) for parts in batches)
    if len(images) != expected:
        raise DataError(
            f"{folder / files[0]}: got {len(images)} images in {', '.join(files)}, need {expected}"
        )
    # The file has one color plane after the other.
    images = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageSet(images=torch.from_numpy(images), labels=torch.from_numpy(labels))


def _read_batch(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    entry = read_pickle(path)
    data = _value(entry, "data", path)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: data is {got}, need uint8 [N, 3072]")
    label_key = layout.keys[0]
    labels = _value(entry, label_key, path)
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    # `type` rather than `isinstance`, because True is no class id.
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: {label_key} is not a list of integers")
    if len(labels) != len(data):
        raise DataError(f"{path}: got {len(labels)} {label_key} for {len(data)} images")
    wrong = [label for label in labels if not 0 <= label < layout.classes]
    if wrong:
        raise DataError(f"{path}: {label_key} holds {wrong[0]}; allowed are 0 to {layout.classes - 1}")
    return data, np.array(labels, dtype=np.int64)


def _read_classes(path: Path, layout: _Layout) -> tuple[str, ...]:
    names = _value(read_pickle(path), layout.keys[1], path)
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{path}: {layout.keys[1]} is not a list of names")
    classes = tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names)
    if len(set(classes)) != layout.classes or len(classes) != layout.classes:
        raise DataError(
            f"{path}: got {len(classes)} class names ({len(set(classes))} distinct), need {layout.classes}"
        )
    return classes


def _value(entry: dict[str, object], key: str, path: Path) -> object:
    if key not in entry:
        raise DataError(f"{path} has no {key!r}; it has: {', '.join(sorted(entry)) or 'nothing'}")
    return entry[key]
