"""Tar shards: the same set as the folder that they were packed from, and errors for damaged ones."""

from __future__ import annotations

import io
import itertools
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mdistiller.config import OptimConfig
from mdistiller.data import AugmentConfig, DataConfig, load_data, make_loader
from mdistiller.errors import DataError
from mdistiller.models import ModelConfig, create_model
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.training.launch import train

# Python 3.12 and later say so whenever a process with threads (torch's) forks a DataLoader's workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CLASSES = ("ant", "bird", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "folder"
    for split, count in (("train", 5), ("val", 2)):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([c, i, count])
                pixels = rng.integers(0, 256, (36 + c, 44 - i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{i}.jpg")
    return root


def samples_of(split):
    """(key, image bytes, class id) of a split of class folders."""
    for c, name in enumerate(CLASSES):
        for path in sorted((split / name).iterdir()):
            yield path.stem, path.read_bytes(), c


def write(path, members, **options):
    """A tar file of (name, bytes) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, blob in members:
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return path


def pack(folder, root, shards=2, prefix="", flat=False, **options):
    """The shards of a folder, its samples in another order and dealt out in turn."""
    for split in ("train", "val"):
        samples = list(samples_of(folder / split))
        order = np.random.default_rng(shards).permutation(len(samples))
        for k in range(shards):
            mine = [samples[i] for i in order[k::shards]]
            members = [
                pair
                for key, image, label in mine
                for pair in (
                    (f"{prefix}{key}.jpg", image),
                    (f"{prefix}{key}.cls", f"{label}".encode()),
                    (f"{prefix}{key}.json", b"{}"),
                )
            ]
            write(root / ("" if flat else split) / f"{split}-{k:06}.tar", members, **options)
    return root


def config(root, **settings):
    return DataConfig(**{"kind": "folder", "root": root, "image_size": 24, "resize": 28, **settings})


LAYOUTS = {
    "one": {"shards": 1},
    "three": {"shards": 3},
    "flat": {"flat": True},
    "folders inside": {"prefix": "./train/"},
    "gnu, long names": {"prefix": "x" * 120 + "/", "format": tarfile.GNU_FORMAT},
    "pax, odd names": {"prefix": "ü\n" * 60, "format": tarfile.PAX_FORMAT},
    "ustar": {"format": tarfile.USTAR_FORMAT},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_set_as_the_folder(folder, tmp_path, layout):
    root = pack(folder, tmp_path, **LAYOUTS[layout])
    ours, theirs = (load_data(config(where, memory="resident")) for where in (root, folder))
    assert ours.classes == ("0", "1", "2")
    assert "15 training and 6 test images, 24x24, 3 classes" in ours.description
    for a, b in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert torch.equal(a.images, b.images)
        assert a.labels.tolist() == b.labels.tolist()
    assert ours.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("rank", [0, 1])
def test_the_same_batches_as_the_folders(folder, tmp_path, rank):
    root = pack(folder, tmp_path, shards=3)
    limited = {"memory": "stream", "train_limit": 12, "label_noise": 0.3, "seed": 5}

    def batches(where, workers):
        images = load_data(config(where, **limited)).train
        loader = make_loader(
            images, 4, device="cpu", seed=1, workers=workers, rank=rank, world_size=2, drop_last=True
        )
        return [batch for epoch in range(2) for batch in loader.epoch(epoch)]

    expected = batches(folder, 0)
    assert len(expected) == 2
    for workers in (0, 2):
        for ours, theirs in zip(batches(root, workers), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


def test_the_same_training_as_on_the_folder(folder, tmp_path):
    root = pack(folder, tmp_path / "shards")
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "teacher.pt")
    weights = []
    for name, where in (("on-folder", folder), ("on-shards", root)):
        run = ClassificationConfig(
            data=config(where, memory="stream", workers=0),
            augment=AugmentConfig(padding=None),
            student=ModelConfig(name="resnet8"),
            teacher=ModelConfig(name="resnet8", checkpoint=tmp_path / "teacher.pt"),
            method={"name": "dkd"},
            optim=OptimConfig(lr=0.01),
            epochs=2,
            batch_size=5,
            device="cpu",
            out=tmp_path / name,
        )
        train(run)
        weights.append(load_file(tmp_path / name / "student.safetensors"))
    start = create_model("resnet8", 3).state_dict()
    assert weights[0].keys() == weights[1].keys() == start.keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in start)


def test_a_set_is_sent_to_another_process(folder, tmp_path):
    images = load_data(config(pack(folder, tmp_path), memory="stream")).train
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy.read(7, seed=3), images.read(7, seed=3))


def test_class_folders_come_first(folder, tmp_path):
    root = pack(folder, tmp_path)
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).symlink_to(folder / split / name)
    assert load_data(config(root)).classes == CLASSES


def test_what_is_no_sample_is_passed_over(folder, tmp_path):
    root = pack(folder, tmp_path, shards=1)
    path = root / "train" / "train-000000.tar"
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "ant_0.jpg"
            tar.addfile(info)
        for name in ("._ant_0.jpg", ".jpg", "README", "notes.txt", "ant_0.mask.png"):
            tar.addfile(tarfile.TarInfo(name))
    (root / "train" / ".train-000001.tar").write_bytes(b"x")
    (root / "train" / "train-index.json").write_bytes(b"x")
    assert len(load_data(config(root)).train) == 15


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_corrupt_image(folder, tmp_path, memory):
    root = pack(folder, tmp_path, shards=1)
    path = root / "train" / "train-000000.tar"
    with tarfile.open(path, "a") as tar:
        for name, blob in (("bad.jpg", b"not an image"), ("bad.cls", b"2\n")):
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))

    def read_all(**settings):
        splits = load_data(config(root, memory=memory, **settings))
        return list(make_loader(splits.train, 4, device="cpu", workers=0).epoch(0))

    with pytest.raises(
        DataError, match=r"train-000000\.tar: bad\.jpg cannot be read: UnidentifiedImageError"
    ):
        read_all()
    with pytest.warns(UserWarning, match=r"left out: 1 of 16 images cannot be read: .*000000\.tar: bad\.jpg"):
        batches = read_all(on_error="skip")
    assert sum(len(batch.label) for batch in batches) == 15


def test_shard_that_is_gone_when_it_is_read(folder, tmp_path):
    root = pack(folder, tmp_path)
    images = load_data(config(root, memory="stream")).train
    for path in (root / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"image .*\.tar: bird_0\.jpg cannot be read: .*No such file"):
        images.read(5, 0)


JPG = b"any"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", JPG)], r"no label \(KEY.cls\) for 1 of 1 keys: a"),
        ([("a.cls", b"0")], "no image for 1 of 1 keys: a"),
        ([("a.jpg", JPG), ("b/a.cls", b"0")], r"no label \(KEY.cls\) for 1 of 1 keys: a"),
        ([("a.jpg", JPG), ("a.cls", b"0"), ("a.png", JPG)], "key a comes twice: a.jpg and a.png"),
        ([("a.jpg", JPG), ("a.cls", b"0"), ("a.cls", b"1")], "key a comes twice: a.cls and a.cls"),
        (
            [("ant_0.jpg", JPG), ("ant_0.cls", b"0")],
            r"key ant_0 comes twice: in .*0\.tar and in .*added\.tar",
        ),
        ([("a.jpg", JPG), ("a.cls", b"cat")], r"added\.tar: a.cls holds b'cat'; need a class id"),
        ([("a.jpg", JPG), ("a.cls", b"")], "a.cls holds b''; need a class id"),
        ([("a.jpg", JPG), ("a.cls", b"-1")], "a.cls holds b'-1'; need a class id"),
        ([("a.jpg", JPG), ("a.cls", b"1_0")], "a.cls holds b'1_0'; need a class id"),
        ([("a.jpg", JPG), ("a.cls", b"9" * 30)], "a.cls holds b'9{20}'; need a class id"),
        ([("a.jpg", JPG), ("a.cls", b"1" + b" " * 99)], "a.cls holds b'1'; need a class id"),
        ([("a.jpg", JPG), ("a.cls", b"5")], "ids go from 0 to 5, but no image has class 3; need every id"),
        ([("a\nb.jpg", JPG)], r"for 1 of 1 keys: 'a\\nb'"),
    ],
)
def test_samples_that_are_not_whole(folder, tmp_path, members, message):
    root = pack(folder, tmp_path, shards=1)
    write(root / "train" / "train-added.tar", members)
    with pytest.raises(DataError, match=message):
        load_data(config(root, memory="stream"))


def test_shards_without_samples(folder, tmp_path):
    root = pack(folder, tmp_path, shards=1)
    write(root / "val" / "val-000000.tar", [("README", b"x")])
    with pytest.raises(DataError, match=r"no KEY\.jpg with a KEY\.cls in .*val-000000\.tar"):
        load_data(config(root))


def test_shards_for_training_alone(folder, tmp_path):
    root = pack(folder, tmp_path, flat=True)
    for path in root.glob("val-*"):
        path.unlink()
    with pytest.raises(
        DataError, match="has 2 shards for training and none for testing; expected ROOT/train"
    ):
        load_data(config(root))


def test_a_shard_cut_anywhere_is_refused(folder, tmp_path):
    root = pack(folder, tmp_path, shards=1)
    path = root / "train" / "train-000000.tar"
    blob = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        end = max(m.offset_data + m.size for m in members)
    # Around each header and each beginning and end of data, where a tar file might seem to end well.
    places = itertools.chain.from_iterable((m.offset, m.offset_data, m.offset_data + m.size) for m in members)
    cuts = sorted({p + d for p in places for d in (-1, 0, 1, 100) if 0 <= p + d <= end})
    assert len(cuts) > 100
    for cut in cuts:
        path.write_bytes(blob[:cut])
        with pytest.raises(DataError, match=r"train-000000\.tar is no whole tar file"):
            load_data(config(root, memory="stream"))


@pytest.mark.parametrize("damage", ["header", "compressed", "no tar"])
def test_a_damaged_shard_is_refused(folder, tmp_path, damage):
    root = pack(folder, tmp_path, shards=1)
    path = root / "train" / "train-000000.tar"
    if damage == "header":
        with tarfile.open(path) as tar:
            place = tar.getmembers()[6].offset
        blob = bytearray(path.read_bytes())
        blob[place + 20] ^= 1
        path.write_bytes(blob)
    elif damage == "compressed":
        with tarfile.open(path, "w:gz"):
            pass
    else:
        path.write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"train-000000\.tar is no whole tar file"):
        load_data(config(root))


def test_members_that_are_not_stored_plainly(folder, tmp_path):
    sparse = tarfile.TarInfo("a.jpg")
    sparse.pax_headers, sparse.size = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "900"}, 3
    backwards = tarfile.TarInfo("a.jpg")
    backwards.size = -1024
    for number, (info, form) in enumerate(((sparse, tarfile.PAX_FORMAT), (backwards, tarfile.GNU_FORMAT))):
        root = pack(folder, tmp_path / str(number), shards=1)
        blob = info.tobuf(form) + b"any".ljust(512, b"\0") + bytes(1024)
        (root / "train" / "added.tar").write_bytes(blob)
        # Python's later versions refuse a negative size themselves.
        with pytest.raises(
            DataError, match=r"a\.jpg is stored in a way that cannot be read|no whole tar file"
        ):
            load_data(config(root))
