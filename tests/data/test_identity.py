"""The same images are recognized, and one changed byte in any of them makes another set."""

import hashlib
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller.data import DataConfig, identity, load_data
from mdistiller.data.encoded import EncodedSet
from mdistiller.data.registry import register_dataset


def write(root, train=30, test=2):
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for label in "abc":
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(256, size=(8, 8, 3), dtype=np.uint8)
                path = root / split / label / f"{i}.bmp"
                Image.fromarray(pixels).save(path)
                os.utime(path, (10**9, 10**9))
    return root


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return write(tmp_path / "images")


def found(root, kind="folder", **changes):
    settings = {"image_size": 8, "memory": "stream", "workers": 0}
    return identity.identity(load_data(DataConfig(kind=kind, root=root, **settings | changes)).train, 0)


def change(path):
    """Flips a bit of a pixel; size and time of modification stay."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (10**9, 10**9))


@pytest.mark.parametrize("memory", ["stream"])
def test_each_of_ninety_files_counts(root, memory):
    seen = {found(root, memory=memory)["sha256"]}
    for path in sorted(root.glob("train/*/*.bmp")):
        change(path)
        seen.add(found(root, memory=memory)["sha256"])
    assert len(seen) == 91


def test_files_are_hashed_once(root, tmp_path, monkeypatch):
    read, encoded = [], EncodedSet.encoded
    monkeypatch.setattr(EncodedSet, "encoded", lambda self, i: read.append(self.name(i)) or encoded(self, i))
    images = load_data(DataConfig(kind="folder", root=root, image_size=8, memory="stream", workers=0)).train
    read.clear()
    first = identity.hash_files(images, 0)
    assert identity.hash_files(images, 0) == first
    assert read == [], "load_data has compared them with the test images"
    change(root / "train" / "b" / "7.bmp")
    assert [a != b for a, b in zip(first, identity.hash_files(images, 0), strict=True)].count(True) == 1
    assert len(read) == 1
    for damage in (lambda path: path.write_bytes(b"no table" * 999), os.unlink, shutil.rmtree):
        path = tmp_path / "home" / "mdistiller"
        damage(path if damage is shutil.rmtree else path / "hashes.sqlite")
        read.clear()
        assert identity.hash_files(images, 0)[:30] == first[:30]
        assert len(read) == 90
    os.utime(root / "train" / "b" / "7.bmp")  # just now: it may change again within the clock's grain
    read.clear()
    identity.hash_files(images, 0)
    identity.hash_files(images, 0)
    assert len(read) == 2


def test_every_item_of_a_dataset_counts(registries):
    images = torch.randint(256, (100, 3, 8, 6), dtype=torch.uint8)
    register_dataset("items")(lambda config: ([(image, i % 2) for i, image in enumerate(images)],) * 2)
    seen = {found(".", kind="items")["sha256"]}
    for i in range(100):
        images[i, 0, 3, 3] ^= 128
        seen.add(found(".", kind="items")["sha256"])
    assert len(seen) == 101


def test_decoded_images_are_hashed_once(monkeypatch):
    splits = load_data(DataConfig(kind="synthetic", synthetic_samples=20))
    sizes, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data=b"": sizes.append(len(bytes(data))) or sha256(data))
    first = identity.identify(splits, 0)
    assert first == identity.identify(splits, 0)
    assert identity.identity(splits.train)["sha256"] in first.values()
    assert sizes.count(splits.train.images.nbytes) == 1


def test_copies_of_training_images_are_counted(root):
    for i in range(2):
        shutil.copy(root / "train" / "a" / "3.bmp", root / "val" / "b" / f"copy{i}.bmp")
    (root / "val" / "c" / "broken.bmp").symlink_to(root / "nothing")
    (root / "train" / "c" / "broken.bmp").symlink_to(root / "nothing")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found(root, on_error="skip")
    assert [str(w.message) for w in said if "are copies" in str(w.message)] == [
        "2 of 9 test images are copies of training images"
    ]
