from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision

from mdistiller.data import DataConfig, cifar, load_data
from mdistiller.errors import DataError


def config(root, **settings):
    return DataConfig(**{"kind": "cifar100", "root": root, "download": False, **settings})


def rewrite(path, **changes):
    entry = {k.decode(): v for k, v in pickle.loads(path.read_bytes()).items()}
    path.write_bytes(pickle.dumps({**entry, **changes}, protocol=2))


def test_values_are_those_torchvision_reads(cifar100, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for name in ("train", "test", "meta"):
        rewrite(cifar100 / name)  # torchvision wants text keys
    splits = load_data(config(cifar100.parent))
    for train, ours in ((True, splits.train), (False, splits.test)):
        theirs = torchvision.datasets.CIFAR100(cifar100.parent, train=train)
        assert ours.images.numpy().tobytes() == theirs.data.tobytes()
        assert ours.images.is_contiguous()
        assert ours.labels.tolist() == theirs.targets
    assert splits.classes[:2] == ("name 0", "name 1")
    assert splits.num_classes == 100
    assert splits.description == "CIFAR-100: 200 training and 100 test images, 32x32, 100 classes"


def test_root_may_be_the_folder_itself(cifar100):
    assert len(load_data(config(cifar100)).train) == 200


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("as_text", [True, False])
def test_every_protocol_and_kind_of_key(cifar100, protocol, as_text):
    data = np.arange(200 * 3072, dtype=np.uint32).astype(np.uint8).reshape(200, 3072)
    labels = [np.int64(i % 100) for i in range(200)]
    entry = {"data": np.asfortranarray(data), "fine_labels": labels, "batch_label": b"x"}
    if not as_text:
        entry = {key.encode(): value for key, value in entry.items()}
    (cifar100 / "train").write_bytes(pickle.dumps(entry, protocol=protocol))
    train = load_data(config(cifar100)).train
    assert np.array_equal(train.images.permute(0, 3, 1, 2).reshape(200, -1).numpy(), data)
    assert train.labels.tolist() == [i % 100 for i in range(200)]


def python2_pickle(data, labels):
    """The public files, which Python 2 and NumPy 1 wrote: byte strings, numpy.core, integers as codes."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01(cnumpy\nndarray\nq\x02K\x00\x85"
        + short(b"b")
        + b"tRq\x03("
    )
    array += (
        b"K\x01" + b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    )
    array += (
        b"cnumpy\ndtype\nq\x04(" + short(b"u1") + b"K\x00K\x01tR(K\x03" + short(b"|") + b"NNNJ" + b"\xff" * 4
    )
    array += b"J" + b"\xff" * 4 + b"K\x00tb"
    array += b"\x89" + b"T" + struct.pack("<i", data.nbytes) + data.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + short(b"data") + array + short(b"fine_labels") + numbers + b"u."


def test_files_as_python_2_wrote_them(cifar100):
    data = np.random.default_rng(1).integers(0, 256, (200, 3072), dtype=np.uint8)
    blob = python2_pickle(data, [7] * 200)
    assert np.array_equal(pickle.loads(blob, encoding="bytes")[b"data"], data)
    (cifar100 / "train").write_bytes(blob)
    train = load_data(config(cifar100)).train
    assert np.array_equal(train.images.permute(0, 3, 1, 2).reshape(200, -1).numpy(), data)


def test_cifar10_in_five_files(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 50)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 10)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        entry = {b"data": np.full((10, 3072), number, np.uint8), b"labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [f"{c}".encode() for c in range(10)]})
    )
    splits = load_data(config(tmp_path, kind="cifar10"))
    assert splits.train.images[:, 0, 0, 0].tolist() == [n for n in range(5) for _ in range(10)]
    assert splits.test.images.unique().tolist() == [5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_labels": [100] + [0] * 199}, "holds 100; allowed are 0 to 99"),
        ({"fine_labels": [-1] + [0] * 199}, "holds -1"),
        ({"fine_labels": [0] * 199}, "got 199 fine_labels for 200 images"),
        ({"fine_labels": [0.0] * 200}, "not a list of integers"),
        ({"fine_labels": [True] * 200}, "not a list of integers"),
        ({"fine_labels": np.zeros((200, 1), np.int64)}, "not a list of integers"),
        ({"data": np.zeros((200, 3071), np.uint8)}, r"uint8 \[200, 3071\], need uint8 \[N, 3072\]"),
        ({"data": np.zeros((200, 3072), np.float32)}, "float32"),
        ({"data": [1, 2]}, "data is list"),
        (
            {"data": np.zeros((199, 3072), np.uint8), "fine_labels": [0] * 199},
            "got 199 images in train, need 200",
        ),
    ],
)
def test_wrong_contents_are_named(cifar100, changes, message):
    rewrite(cifar100 / "train", **changes)
    with pytest.raises(DataError, match=message) as error:
        load_data(config(cifar100))
    assert str(cifar100 / "train") in str(error.value)


def test_missing_key_wrong_top_level_and_class_names(cifar100):
    (cifar100 / "meta").write_bytes(pickle.dumps({"fine_label_names": ["same"] * 100}))
    with pytest.raises(DataError, match=r"100 class names \(1 distinct\), need 100"):
        load_data(config(cifar100))
    (cifar100 / "meta").write_bytes(pickle.dumps({"coarse_label_names": []}))
    with pytest.raises(DataError, match="no 'fine_label_names'; it has: coarse_label_names"):
        load_data(config(cifar100))
    (cifar100 / "meta").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="got list, need dict"):
        load_data(config(cifar100))


def test_absent_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(DataError) as error:
        load_data(config(tmp_path / "none"))
    message = str(error.value)
    for part in (
        str(tmp_path / "none" / "cifar-100-python"),
        "--data.download",
        "cifar-100-python.tar.gz",
        "kriz",
    ):
        assert part in message


def test_incomplete_names_the_missing_file(cifar100):
    (cifar100 / "meta").unlink()
    for root in (cifar100, cifar100.parent):
        with pytest.raises(DataError, match="incomplete: meta missing"):
            load_data(config(root, download=True))


def test_failed_download_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    def fail(root, download):
        (tmp_path / "seen").write_text(str(root))
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(DataError, match=r"download failed \(OSError: no route to host\)"):
        load_data(config(tmp_path / "root", download=True))
    assert (tmp_path / "seen").exists()
    assert list((tmp_path / "root").iterdir()) == []


def test_download_arrives_whole_and_quietly(cifar100, tmp_path, monkeypatch, capsys):
    def fetch(root, download):
        print("Downloading")
        cifar100.rename(f"{root}/cifar-100-python")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fetch)
    root = tmp_path / "new"
    assert len(load_data(config(root, download=True)).train) == 200
    assert [entry.name for entry in root.iterdir()] == ["cifar-100-python"]
    assert capsys.readouterr().out == ""
    # A second time nothing is fetched.
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", None)
    assert len(load_data(config(root, download=True)).train) == 200


def test_image_size_and_stream_of_a_decoded_set(cifar100):
    resident = load_data(config(cifar100, image_size=40))
    stream = load_data(config(cifar100, image_size=40, memory="stream"))
    assert resident.image_size == stream.image_size == 40
    assert resident.train.images.shape == (200, 40, 40, 3)
    assert torch.equal(stream.train.read(5, 0), resident.train.images[5])
    assert stream.description.endswith("streamed")
    tight = load_data(config(cifar100, memory_limit_gb=300 * 3072 / 1e9))
    assert not tight.description.endswith("streamed")
    tighter = load_data(config(cifar100, memory_limit_gb=(300 * 3072 - 1) / 1e9))
    assert tighter.description.endswith("streamed")
