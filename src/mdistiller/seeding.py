"""Seeds derived from numbers, seeds of torch's default generators, and deterministic kernels on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch


@lru_cache(1024)
def derive_seed(*parts: int) -> int:
    """Derives a 63-bit seed from non-negative numbers; any change of them gives an unrelated seed."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_default(device: torch.device, seed: int) -> None:
    """Seeds the default generators of the CPU and of `device`, from which a step draws.

    `torch.manual_seed` looks for devices of every kind, which takes longer than some steps.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Context in which only deterministic kernels run, if that is wanted; an operation without one raises."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS reads it when the first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
