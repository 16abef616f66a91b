"""The state of everything random, and how far a GPU may be deterministic."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """The states of torch's default generators and of `generator`."""
    state = {"default": torch.get_rng_state(), "own": generator.get_state()}
    if generator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(generator.device)
    return state


def set_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["default"])
    generator.set_state(state["own"])
    if generator.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], generator.device)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, only deterministic kernels run, if that is wanted; what has none raises."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS reads it when the first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
