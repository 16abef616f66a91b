"""What a run writes to disk: the student's weights, and the state to go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from mdistiller.errors import CheckpointError


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, sync it, then rename it: a reader sees all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, whole or not at all."""

    def write(to: Path) -> None:
        to.write_text(text, encoding="utf-8")

    atomically(path, write)


def save_student(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    """A model's state dict as safetensors, on the CPU; `about` is stored as JSON under "mdistiller"."""
    # Cloned, because safetensors refuses tensors that share storage (tied weights) or are not contiguous.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    # One key alone: safetensors writes several in a random order, and equal runs should give equal files.
    content = save(tensors, {"mdistiller": json.dumps(about, sort_keys=True)})

    def write(to: Path) -> None:
        to.write_bytes(content)

    atomically(path, write)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The state of a run, as tensors and plain containers."""
    atomically(path, lambda to: torch.save(state, to))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing but tensors and plain containers is accepted.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"cannot resume: {path} does not exist")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise CheckpointError(f"cannot resume: {path} is damaged ({type(error).__name__})") from error
    return state
