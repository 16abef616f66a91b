"""Processor cores that this process may use, and the number of worker processes that follows."""

import math
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

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


def count_cores() -> int:
    """Counts the cores that this process may use, by its affinity and the quota of its control group."""
    from joblib import cpu_count  # takes a moment

    found: int = cpu_count()
    return found


def _shared_memory() -> float:
    """Returns the free bytes of shared memory; infinity where it has no file system."""
    try:
        found = os.statvfs(_SHARED)
    except (OSError, AttributeError):
        return math.inf
    return found.f_bavail * found.f_frsize
