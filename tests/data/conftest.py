from __future__ import annotations

import pickle

import numpy as np
import pytest

from mdistiller.data import cifar


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A CIFAR-100 folder of 200 training and 100 test images; `write(path, dict)` replaces a file."""
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 200)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 100)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 200), ("test", 100)):
        entry = {
            b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            b"fine_labels": [i % 100 for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    names = {b"fine_label_names": [f"name {c}".encode() for c in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder
