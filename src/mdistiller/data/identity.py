"""Identity of a training set: equal images have equal values, and other images other ones."""

import hashlib
import os

from torch import Tensor

from mdistiller.data.dataset import ImageSet, StreamSet, TensorStream
from mdistiller.data.decoder import VERSION
from mdistiller.data.encoded import EncodedSet, sample
from mdistiller.errors import DataError
from mdistiller.types import Line

_DECODED = 4  # of so many images of a sample, one is decoded, since large photographs take time


def identity(images: ImageSet | StreamSet) -> Line:
    """Returns facts that name the images of a set and their order, as plain values.

    Decoded images are named by their bytes; files by names, sizes, the content of 64 of them, the pixels of
    16 of them, and the way they are decoded. So another version of a decoder that gives other pixels makes
    another set. The folder around all files does not count. Labels do not count.
    """
    found: Line = {"images": len(images)}
    if isinstance(images, ImageSet):
        return found | {"size": list(images.images.shape[1:3]), "sha256": _hash_bytes(images.images)}
    if isinstance(images, TensorStream):
        return found | {"size": images.image_size, "sha256": _hash_bytes(images.images)}
    digest = hashlib.sha256()
    chosen = sample(images)
    if not isinstance(images, EncodedSet):
        for i in chosen:
            digest.update(images.read(i, 0).numpy().tobytes())
        return found | {"kind": type(images).__name__, "sha256": digest.hexdigest()}
    names = [images.name(i) for i in range(len(images))]
    common = len(os.path.commonprefix(names).rpartition(os.sep)[0])  # noqa: RUF071 (cut at a separator)
    for i, name in enumerate(names):
        digest.update(f"{name[common:]} {images.length(i)}\n".encode(errors="surrogateescape"))
    for i in chosen:
        digest.update(images.encoded(i).numpy().data)
    for i in chosen[::_DECODED]:
        digest.update(_read(images, i))
    found["decoder"] = VERSION
    found |= {"size": images.image_size, "resize": images.resize, "sha256": digest.hexdigest()}
    if images.random_crop:
        found["crop"] = list(images.crop_scale)
    return found


def _read(images: EncodedSet, index: int) -> bytes:
    try:
        return images.read(index, 0).numpy().tobytes()
    except DataError:  # the loader reports it
        return b""


def _hash_bytes(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()
