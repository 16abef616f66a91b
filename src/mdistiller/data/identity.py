"""Identity of images: equal images have equal values, and other images other ones."""

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mdistiller.data.cores import Workers, count_workers
from mdistiller.data.dataset import ImageSet, Splits, StreamSet, TensorStream
from mdistiller.data.decoder import VERSION
from mdistiller.data.encoded import EncodedSet, sample
from mdistiller.data.loader import StreamLoader
from mdistiller.errors import DataError
from mdistiller.types import Line

COMPARED = 100_000  # files whose bytes are compared; more may cost minutes to read before the first step
_DECODED = 4  # of so many images of a sample, one is decoded, since large photographs take time
_HASHES: MutableMapping[Tensor, str] = WeakIdKeyDictionary()
_FRESH = 2  # seconds in which a second change of a file may leave its time as it is


def identity(images: ImageSet | StreamSet, workers: Workers = "auto") -> Line:
    """Returns facts that name the images of a set and their order, as plain values.

    All images count by their bytes: decoded ones as they are, files as they are encoded, together with the
    pixels of 16 of them. So another version of a decoder that gives other pixels makes another set. Names,
    folders and labels do not count. Streams that are not files are read once, by `workers` processes.
    """
    found: Line = {"images": len(images)}
    if isinstance(images, ImageSet):
        return found | {"size": list(images.images.shape[1:3]), "sha256": _hash_bytes(images.images)}
    if isinstance(images, TensorStream):
        return found | {"size": images.image_size, "sha256": _hash_bytes(images.images)}
    digest = hashlib.sha256()
    if isinstance(images, EncodedSet):
        found |= {"decoder": VERSION, "size": images.image_size, "resize": images.resize}
        digest.update(b"".join(value or bytes(32) for value in hash_files(images, workers)))
    else:
        found["kind"] = type(images).__name__
        whole = replace(images, random_crop=False)
        for batch in StreamLoader(whole, 64, device="cpu", shuffle=False, workers=workers).epoch(0):
            digest.update(batch.index.numpy().data)
            digest.update(batch.image.numpy().data)
    for i in sample(images)[::_DECODED]:
        with suppress(DataError):  # the loader reports it
            digest.update(images.read(i, 0).numpy().data)
    if images.random_crop:
        found["crop"] = list(images.crop_scale)
    return found | {"sha256": digest.hexdigest()}


def identify(splits: Splits, workers: Workers = "auto") -> dict[str, str]:
    """Returns hashes by which a resumed run knows its data: of classes and labels, and of images by kind.

    Images are not read where they are more than `COMPARED` files, or what a user's code returns.
    """
    found = hashlib.sha256(repr(splits.classes).encode())
    parts = (splits.train, splits.test)
    for images in parts:
        found.update(repr(images.labels.shape).encode())
        found.update(images.labels.cpu().contiguous().numpy().data)
    hashes = {"labels": found.hexdigest()}
    for name, images in zip(("training images", "test images"), parts, strict=True):
        # The same files may be decoded in memory here, and read as they are there.
        kind = f"{name} ({type(images).__name__})"
        if isinstance(images, ImageSet | TensorStream):
            hashes[kind] = _hash_bytes(images.images)
        elif isinstance(images, EncodedSet) and len(images) <= COMPARED:
            hashes[kind] = hash_all(images, workers)
    return hashes


def hash_all(images: EncodedSet, workers: Workers) -> str:
    """Computes one hash of all encoded images in their order."""
    return hashlib.sha256(b"".join(one or bytes(32) for one in hash_files(images, workers))).hexdigest()


def count_copies(train: EncodedSet, test: EncodedSet, workers: Workers) -> int:
    """Counts the test images whose bytes are those of a training image."""
    known = {*hash_files(train, workers)} - {None}
    return sum(value in known for value in hash_files(test, workers))


def hash_files(images: EncodedSet, workers: Workers) -> list[bytes | None]:
    """Computes the SHA-256 of each encoded image; None for one that cannot be read.

    The user's cache folder keeps the hashes of files by path, size and times of change.
    """

    def key(index: int) -> bytes:
        try:
            if not isinstance(file := images.file(index), Path):
                return b""
            facts = file.stat()
        except OSError:
            return b""
        if facts.st_mtime > time.time() - _FRESH:
            return b""
        what = (os.path.abspath(file), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        return hashlib.sha256(repr(what).encode(errors="surrogateescape")).digest()

    def compute(index: int) -> bytes | None:
        try:
            return hashlib.sha256(images.encoded(index).numpy().data).digest()
        except OSError:
            return None

    keys = [key(i) for i in range(len(images))]
    known = _remember({}, keys)
    missing = [i for i, k in enumerate(keys) if k not in known]
    with ThreadPoolExecutor(max(1, count_workers(workers))) as pool:
        computed = dict(zip(missing, pool.map(compute, missing), strict=True))
    _remember({keys[i]: h for i, h in computed.items() if keys[i] and h})
    return [computed[i] if i in computed else known[k] for i, k in enumerate(keys)]


def _remember(found: Mapping[bytes, bytes], asked: Iterable[bytes] = ()) -> dict[bytes, bytes]:
    """Adds hashes by key to those in the user's cache folder; returns those of the keys `asked`."""
    known: dict[bytes, bytes] = {}
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mdistiller")
    with suppress(OSError, RuntimeError, sqlite3.Error):  # no home, no permission, a full disk
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / "hashes.sqlite")) as memory, memory:
            memory.execute(
                "CREATE TABLE IF NOT EXISTS hashes (key BLOB PRIMARY KEY, hash BLOB) WITHOUT ROWID"
            )
            memory.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?)", found.items())
            for key in asked:
                for (value,) in memory.execute("SELECT hash FROM hashes WHERE key = ?", (key,)):
                    known[key] = value
    return known


def _hash_bytes(images: Tensor) -> str:
    """Computes the SHA-256 of decoded images, once: resuming and the teacher's cache both ask for it."""
    if images not in _HASHES:
        _HASHES[images] = hashlib.sha256(images.cpu().contiguous().numpy().data).hexdigest()
    return _HASHES[images]
