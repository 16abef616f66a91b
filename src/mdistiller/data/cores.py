"""Processor cores that this process may use, and the number of worker processes that follows."""

import math
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from mdistiller.data.memory import control_groups

_MOST = 16  # workers that feed the fastest GPU with photographs
_SHARED = Path("/dev/shm")  # of the batches that workers hand over, on Linux
_ROOM = 1_000_000_000  # bytes for many workers; containers often have 64 MB
_FEW = 2


def _check(workers: int | str) -> int | str:
    if isinstance(workers, int) and workers < 0:
        raise ValueError("allowed are auto, or a number of at least 0")
    return workers


Workers = Annotated[int | Literal["auto"], AfterValidator(_check)]


def count_workers(workers: Workers) -> int:
    """Returns a number of worker processes; `auto` is one for each core, at most 16.

    Cores are those that the process may use, shared by the processes that torchrun starts on the machine.
    With less than 1 GB of shared memory there are at most two workers, since batches pass through it.
    """
    if workers != "auto":
        return workers
    count = count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(count, _MOST if _shared_memory() >= _ROOM else _FEW))


def count_cores(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Counts the cores that this process may use: by its affinity, and by the quota of its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    found = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quotas = [_quota(folder) for folder in control_groups("cpu", proc, groups)]
    return max(1, math.floor(min([found, *quotas])))


def _quota(folder: Path) -> float:
    """Returns the cores of a control group, version 2 or 1; infinity without a limit."""
    try:
        if (version2 := folder / "cpu.max").is_file():
            quota, period = version2.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # the text "max" is no number
        return math.inf


def _shared_memory() -> float:
    """Returns the free bytes of shared memory; infinity where it has no file system."""
    try:
        found = os.statvfs(_SHARED)
    except (OSError, AttributeError):
        return math.inf
    return found.f_bavail * found.f_frsize
