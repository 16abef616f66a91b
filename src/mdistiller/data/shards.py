"""Images in tar shards in WebDataset's layout: `KEY.jpg` beside `KEY.cls`, its class id as text.

A shard is an ordinary tar file. Its headers are read once; then each image is one read at a known offset.
Samples are sorted by class and key, as in class folders, so their distribution over shards has no effect.
"""

import io
import re
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from mdistiller.data.config import DataConfig
from mdistiller.data.cores import Workers, count_workers
from mdistiller.data.dataset import Splits
from mdistiller.data.encoded import (
    IMAGE_SUFFIXES,
    EncodedSet,
    ReadOptions,
    check_classes,
    make_splits,
    read_options,
    some,
)
from mdistiller.data.layout import ADVICE, TEST, TRAIN, VALIDATION, evaluation_split, subfolder, visible
from mdistiller.errors import DataError

_LABEL = ".cls"
_BLOCK = 512
_LAYOUT = (
    "expected ROOT/train/*.tar and ROOT/val/*.tar (or valid, validation, test), or ROOT/train-*.tar and "
    f"ROOT/val-*.tar, or a cut: {ADVICE}"
)


class _Sample(NamedTuple):
    label: int
    key: str
    shard: int  # index of the tar file
    offset: int  # in bytes, as length
    length: int
    member: bytes  # name in the tar file


@dataclass(frozen=True, kw_only=True)
class ShardSet(EncodedSet):
    """Images in tar files; `samples` is a record array with the last four fields of `_Sample`."""

    shards: tuple[Path, ...]

    def name(self, index: int) -> str:
        sample = self.samples[index]
        return f"{self.shards[sample.shard]}: {_shown(sample.member.decode(errors='surrogateescape'))}"

    def file(self, index: int) -> BinaryIO:
        sample = self.samples[index]
        # The shard is opened each time, because an open file cannot be sent to a worker process.
        with self.shards[sample.shard].open("rb") as file:
            file.seek(sample.offset)
            return io.BytesIO(file.read(sample.length))

    def where(self, index: int) -> tuple[Path, int]:
        sample = self.samples[index]
        return self.shards[sample.shard], int(sample.offset)

    def length(self, index: int) -> int:
        return int(self.samples[index].length)


def find_shards(config: DataConfig) -> tuple[tuple[Path, ...], tuple[Path, ...]] | None:
    """Finds the shards for training and evaluation; None if the training images are not in shards.

    Shards are the tar files in the folders of the splits, if these have no subfolders (which would be class
    folders), or the tar files in `root` itself with a split's name in theirs. No shards for evaluation are a
    DataError, unless they are cut from the training images.
    """
    root = config.root
    train = _shards_of(root, TRAIN)
    if not train:
        return None
    test = evaluation_split(config, _shards_of(root, VALIDATION) or None, _shards_of(root, TEST) or None)
    if test is None and config.val_fraction is None:
        raise DataError(f"{root} has {len(train)} shards for training and none for testing; {_LAYOUT}")
    return train, test or ()


def _shards_of(root: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    if not root.is_dir():
        return ()
    if (folder := subfolder(root, names)) is not None:
        entries = visible(folder)
        is_shards = not any(entry.is_dir() for entry in entries)
        return tuple(entry for entry in entries if is_shards and entry.suffix == ".tar")
    # The first name, val, also begins valid and validation.
    word = re.compile(rf"(?<![a-z]){names[0]}", re.IGNORECASE)
    return tuple(entry for entry in visible(root) if entry.suffix == ".tar" and word.search(entry.name))


def load_shards(config: DataConfig, train_shards: tuple[Path, ...], test_shards: tuple[Path, ...]) -> Splits:
    """Reads training and test images from tar shards; class names are the ids '0', '1', ….

    Without test shards, the test set is empty.

    Raises:
        DataError: A shard that is no tar file or is cut short; an image without a label or a label without an
            image; a duplicate key; a label that is no class id; class ids with gaps, or that differ between
            training and test.
    """
    options = read_options(config, 224)
    train = _read_split(train_shards, options, config.workers)
    test = train.select(torch.arange(0))
    if test_shards:
        test = _read_split(test_shards, options, config.workers)
    ids = sorted(set(train.labels.tolist()))
    if ids[-1] != len(ids) - 1:
        gap = next(i for i, label in enumerate(ids) if i != label)
        raise DataError(
            f"training shards in {config.root}: class ids go from {ids[0]} to {ids[-1]}, but no image has "
            f"class {gap}; need every id from 0 on"
        )
    found = {str(label) for label in ids}, {str(label) for label in set(test.labels.tolist())}
    check_classes(*found, f"the training shards in {config.root}", "the test shards")
    description = f"images in {len(train_shards) + len(test_shards)} shards in {config.root}"
    return replace(make_splits(train, test, tuple(map(str, ids)), description), named=False)


def _read_split(shards: tuple[Path, ...], options: ReadOptions, workers: Workers) -> ShardSet:
    with ThreadPoolExecutor(max(1, count_workers(workers))) as pool:
        samples = [sample for found in pool.map(_read_shard, range(len(shards)), shards) for sample in found]
    if not samples:
        raise DataError(f"no KEY.jpg with a KEY.cls in {some([str(shard) for shard in shards])}")
    first: dict[str, _Sample] = {}
    for sample in samples:
        other = first.setdefault(sample.key, sample)
        if other is not sample:
            where = f"in {shards[other.shard]} and in {shards[sample.shard]}"
            raise DataError(f"key {_shown(sample.key)} comes twice: {where}")
    samples.sort()
    records = np.rec.fromrecords(  # type: ignore[call-overload, unused-ignore]  # NumPy's stubs demand `formats`
        [sample[2:] for sample in samples], names="shard,offset,length,member"
    )
    labels = torch.tensor([sample.label for sample in samples])
    return ShardSet(shards=shards, samples=records, labels=labels, **options)


def _read_shard(number: int, path: Path) -> list[_Sample]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tarfile.TarInfo] = {}
    with path.open("rb") as file:
        for member in _members(path, file):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            suffix = f".{extension.lower()}"
            if not stem or suffix not in (_LABEL, *IMAGE_SUFFIXES):
                continue
            key, found = f"{folder}/{stem}" if folder else stem, labels if suffix == _LABEL else images
            if found.setdefault(key, member) is not member:
                names = [_shown(found[key].name), _shown(member.name)]
                raise DataError(f"{path}: key {_shown(key)} comes twice: {' and '.join(names)}")
        for what, has, lacks in (("label (KEY.cls)", images, labels), ("image", labels, images)):
            missing = [_shown(key) for key in has if key not in lacks]
            if missing:
                raise DataError(f"{path}: no {what} for {len(missing)} of {len(has)} keys: {some(missing)}")
        samples = []
        for key, m in images.items():
            label, member_name = _label(path, file, labels[key]), m.name.encode(errors="surrogateescape")
            samples.append(_Sample(label, key, number, m.offset_data, m.size, member_name))
        return samples


def _members(path: Path, file: BinaryIO) -> Iterable[tarfile.TarInfo]:
    """Yields the plain files in a tar file; DataError if it is damaged or cut short."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.issparse():
                    raise DataError(f"{path}: {_shown(member.name)} is stored in a way that cannot be read")
                if member.isfile():
                    yield member
            end = tar.offset
        # tarfile reads any block that is not a header as the end of the archive.
        file.seek(end)
        mark = file.read(_BLOCK)
    except DataError:
        raise
    except Exception as error:  # a damaged header may fail in any way
        raise DataError(f"{path} is no whole tar file: {_shown(str(error))}") from error
    if mark != bytes(_BLOCK):
        raise DataError(f"{path} is no whole tar file: damaged or cut short at byte {end:,}")


def _label(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> int:
    file.seek(member.offset_data)
    text = file.read(min(member.size, 64)).strip()
    if member.size > 64 or len(text) > 9 or not text.isdigit():
        raise DataError(f"{path}: {_shown(member.name)} holds {text[:20]!r}; need a class id: 0, 1, …")
    return int(text)


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)
