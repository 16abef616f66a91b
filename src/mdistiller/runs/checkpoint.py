"""Files of a run: the student's weights, and the state from which it resumes."""

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from mdistiller.errors import CheckpointError
from mdistiller.types import Line


def atomically(path: Path, write: Callable[[Path], object], *, previous: Path | None = None) -> None:
    """Writes a file under a temporary name, syncs it, then renames it: a reader gets all of it or none.

    A file that is there so far is replaced, or gets the name `previous`.
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
    with suppress(OSError):  # not every system can
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    atomically(path, lambda to: to.write_text(text, encoding="utf-8"))


def save_student(path: Path, model: nn.Module, metadata: Line) -> None:
    """Saves a state dict as safetensors, with the metadata as JSON under "mdistiller"."""
    # Cloned, because safetensors refuses tensors that share storage (tied weights) or are not contiguous.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    # A single key: safetensors writes several in a random order, and equal runs should give equal files.
    content = save(tensors, {"mdistiller": json.dumps(metadata, sort_keys=True)})
    atomically(path, lambda to: to.write_bytes(content))


def save_state(path: Path, state: Line) -> None:
    """Saves the state of a run, tensors and plain containers; the state before stays beside it."""

    def write(to: Path) -> None:
        with open(to, "wb", buffering=0) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's, while it closes what a full disk has cut short
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    atomically(path, write, previous=_previous(path))


def drop_previous(path: Path) -> None:
    """Removes the state before the last one, which a finished run no longer needs."""
    _previous(path).unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_state(path: Path) -> Line | None:
    """Reads the last state, or, with a warning, the state before if the last one is damaged.

    Only tensors and plain containers are accepted. None: there is no state yet.

    Raises:
        CheckpointError: no state is readable.
    """
    problems = []
    for candidate in filter(Path.is_file, (path, _previous(path))):
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
