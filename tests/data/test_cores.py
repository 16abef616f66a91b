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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Counts the cores of a machine with some files of its control groups."""

    def count(allowed, files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return count_cores(tmp_path / "proc", tmp_path / "cgroup")

    return count


@pytest.mark.parametrize(
    ("allowed", "files", "expected"),
    [
        (12, {}, 12),
        (3, {}, 3),  # fewer than the machine has
        (12, {"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, 12),
        (12, {"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "400000 100000\n"}, 4),
        (2, {"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "400000 100000\n"}, 2),
        (12, {"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "250000 100000\n"}, 2),  # and a half
        (12, {"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            12,
            {
                "proc/self/cgroup": "0::/jobs/one\n",
                "cgroup/jobs/one/cpu.max": "max 100000\n",
                "cgroup/jobs/cpu.max": "600000 100000\n",  # of the group around it
            },
            6,
        ),
        (
            12,
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/abc\n",
                "cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            12,
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            12,
        ),
        (12, {"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "damaged\n"}, 12),
    ],
)
def test_cores_of_a_machine(machine, allowed, files, expected):
    assert machine(allowed, files) == expected


def test_a_system_without_affinity(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert count_cores(tmp_path, tmp_path) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores(tmp_path, tmp_path) == 1


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
