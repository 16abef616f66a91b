"""Student of a run, loaded from the run folder: file, metadata and config."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from mdistiller.config import RunConfig, read_values
from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.models.weights import STUDENT_FILE, read_metadata
from mdistiller.runs.folder import CONFIG, EMA_FILE
from mdistiller.settings import explain
from mdistiller.training.task import DEFAULT_TASK, Task, get_task


def load_student(source: str | Path) -> nn.Module:
    """Loads the student of a run, with its method's extension, in evaluation mode on the CPU.

    It computes logits [B, classes] of normalised images [B, 3, H, W]; a detector has the inputs and outputs
    of torchvision's detectors. `source` is a run folder, or a student's .safetensors file from one.

    Raises:
        CheckpointError: no such file, or a file without metadata.
        ConfigError: the task does not load students by themselves.
        UnknownNameError: the model is of a plug-in that is not loaded.
    """
    file = find_student(Path(source))
    task, metadata = read_student(file)
    return task.load_student(file, metadata)


def find_student(source: Path, ema: bool = False) -> Path:
    """Returns the path of a student's file: `source`, or the file (`ema`: the average) in a run folder.

    Raises:
        ConfigError: `ema`, and there is no moving average.
        CheckpointError: no student there.
    """
    if not source.is_dir():
        if not source.is_file():
            raise CheckpointError(f"no such run folder or student file: {source}")
        if ema:
            raise ConfigError(f"ema: {source} is a file; --ema goes with a run folder")
        return source
    file = source / (EMA_FILE if ema else STUDENT_FILE)
    if not file.is_file():
        if ema and (source / STUDENT_FILE).is_file():
            raise ConfigError(f"ema: {source} has no moving average of its student; train with --ema DECAY")
        raise CheckpointError(f"{source} has no {file.name}: no run folder, or no epoch is done yet")
    return file


def read_student(file: Path) -> tuple[Task, dict[str, Any]]:
    """Reads the task and the metadata of a student's file; raises a CheckpointError for missing entries."""
    metadata = read_metadata(file)
    name = metadata.get("task")
    try:
        with plugins_named(file.parent):
            task = get_task(name) if isinstance(name, str) else None
    except UnknownNameError as error:
        raise CheckpointError(f"{file}: {error}") from error
    missing = ["task"] if task is None else [key for key in task.metadata_keys if key not in metadata]
    if task is None or missing:
        raise CheckpointError(
            f"{file} is no student of a run (no {', '.join(missing)} in its metadata); "
            "allowed: a run folder of `mdistiller train`, or a student's .safetensors file from one"
        )
    return task, metadata


def run_config(folder: Path) -> dict[str, Any]:
    """Reads a run's config.json without validation, which loads plug-ins; returns {} without that file."""
    path = folder / CONFIG
    try:
        return read_values(path) if path.is_file() else {}
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def run_settings(folder: Path) -> RunConfig | None:
    """Reads a run's config with method "none" and without plug-ins, whose code is not loaded.

    Returns None without a config.json; raises a ConfigError for a wrong field.
    """
    values = run_config(folder)
    if not values:
        return None
    with plugins_named(folder):
        kind = get_task(str(values.get("task", DEFAULT_TASK))).Config
    try:
        return kind.model_validate(values | {"method": {"name": "none"}, "plugins": ()})
    except ValidationError as error:
        raise explain(error, str(folder / CONFIG)) from error


@contextmanager
def plugins_named(folder: Path) -> Iterator[None]:
    """Adds the plug-ins of a run to the message of an error about an unknown name."""
    try:
        yield
    except UnknownNameError as error:
        plugins = " ".join(f"--plugin {path}" for path in run_config(folder).get("plugins", ()))
        if not plugins:
            raise
        raise ConfigError(f"{error}. The run had plug-ins: give {plugins}") from error
