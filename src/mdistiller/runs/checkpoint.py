"""What a run writes to disk: the student's weights, and the state to go on from."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from mdistiller.errors import CheckpointError


def atomically(path: Path, write: Callable[[Path], None], *, previous: Path | None = None) -> None:
    """Write a file under a temporary name, sync it, then rename it: a reader sees all of it or none.

    Args:
        path: the file.
        write: writes the content to the path that it is given.
        previous: where the file that is there so far goes; None: it is replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder last, as far as the system has a way to."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


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
    """The state of a run, as tensors and plain containers; the one before stays beside it."""
    atomically(path, lambda to: torch.save(state, to), previous=_previous(path))


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote last, or, with a warning, the state before where that is damaged.

    Nothing but tensors and plain containers is accepted. None: there is no state yet.

    Raises:
        CheckpointError: no state is readable.
    """
    problems = []
    for candidate in (path, _previous(path)):
        if not candidate.is_file():
            continue
        try:
            with zipfile.ZipFile(candidate) as archive:
                damaged = archive.testzip()  # torch doesn't compare the checksums
            if damaged is not None:
                raise ValueError(f"wrong checksum of its part {damaged!r}")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
        except Exception as error:  # reading raises whatever the damage leads to
            problems.append(f"{candidate} is damaged ({type(error).__name__}: {error})")
            continue
        if problems:
            warnings.warn(f"{problems[0]}; going on from the state before, {candidate}", stacklevel=2)
        return state
    if problems:
        raise CheckpointError("cannot resume: " + "; ".join(problems))
    return None
