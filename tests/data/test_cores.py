"""Number of worker processes from the cores that a process may use."""

import math
import os

import pytest
import torch
from pydantic import ValidationError

from mdistiller.data import DataConfig, cores
from mdistiller.data.cores import count_cores, count_workers
from mdistiller.data.dataset import TensorStream
from mdistiller.data.loader import StreamLoader
from mdistiller.tasks.detection.config import DetectionDataConfig


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_cores_follow_from_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    for allowed in (12, 3, 1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=allowed: set(range(n)))
        assert 1 <= count_cores() <= allowed  # a quota may allow fewer


@pytest.mark.parametrize(
    ("found", "processes", "shared", "expected"),
    [
        (1, None, math.inf, 1),
        (8, None, math.inf, 8),
        (8, "4", math.inf, 2),
        (2, "8", math.inf, 1),
        (96, None, 64e9, 16),
        (96, "8", 64e9, 12),
        (96, None, 64 * 2**20, 2),  # a container
        (1, None, 64 * 2**20, 1),
    ],
)
def test_auto(monkeypatch, found, processes, shared, expected):
    monkeypatch.setattr(cores, "count_cores", lambda: found)
    monkeypatch.setattr(cores, "_shared_memory", lambda: shared)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert count_workers("auto") == expected
    assert count_workers(0) == 0
    assert count_workers(40) == 40


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loaders_count(monkeypatch):
    monkeypatch.setattr(cores, "count_cores", lambda: 3)
    monkeypatch.setattr(cores, "_shared_memory", lambda: math.inf)
    images = TensorStream(
        images=torch.zeros(4, 2, 2, 3, dtype=torch.uint8), labels=torch.zeros(4).long(), image_size=2
    )
    for workers, expected in ((None, 3), ("auto", 3), (1, 1)):
        given = {} if workers is None else {"workers": workers}
        assert StreamLoader(images, 2, device="cpu", **given)._loader.num_workers == expected


@pytest.mark.parametrize("kind", [DataConfig, DetectionDataConfig])
def test_config(kind):
    given = {"root": "x"}
    assert kind(**given).workers == "auto"
    assert kind.model_validate({**kind(**given).model_dump(mode="json"), "workers": 2}).workers == 2
    for wrong in (-1, "many", 1.5):
        with pytest.raises(ValidationError, match="workers"):
            kind(**given, workers=wrong)
