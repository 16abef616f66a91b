"""A run's student, to be used by itself: its file, what the file says of it, and the run's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.settings import explain
from mdistiller.runs.folder import CONFIG
from mdistiller.errors import CheckpointError, ConfigError, UnknownNameError
from mdistiller.models.weights import STUDENT_FILE, read_about

EMA_FILE = f"ema_{STUDENT_FILE}"


def find_student(source: Path, ema: bool = False) -> Path:
    """The student's file that a run folder, or such a file itself, stands for.

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


def read_student(file: Path) -> dict[str, Any]:
    """What a student's file says of it: model, options, classes, image_size, mean and std at least.

    Raises:
        CheckpointError: it does not.
    """
    about = read_about(file)
    wanted = ("model", "options", "classes", "image_size", "mean", "std")
    missing = [key for key in wanted if key not in about]
    if missing:
        raise CheckpointError(
            f"{file} does not say what it holds (no {', '.join(missing)} in its metadata); "
            "allowed: a run folder of `mdistiller train`, or a student's .safetensors file from one"
        )
    return about


def run_config(folder: Path) -> dict[str, Any]:
    """The run's config.json as it is, {} where there is none: validating it would load its plug-ins."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a run's settings")
    return config


def run_settings(folder: Path) -> ClassificationConfig | None:
    """The run's settings less method and plug-ins, whose code is not loaded; None: no config.json.

    Raises:
        ConfigError: they are wrong, or a detector's.
    """
    config = run_config(folder)
    if not config:
        return None
    data = config.get("data")
    if isinstance(data, dict) and config.get("task") == "detection":
        raise ConfigError(f"{folder} holds a detector; see `mdistiller detect eval {folder}`")
    try:
        return ClassificationConfig.model_validate(config | {"method": {"name": "none"}, "plugins": ()})
    except ValidationError as error:
        raise explain(error, str(folder / CONFIG)) from error


@contextmanager
def plugins_named(folder: Path) -> Iterator[None]:
    """Adds a run's plug-ins to the message where a name is unknown without them."""
    try:
        yield
    except UnknownNameError as error:
        plugins = " ".join(f"--plugin {path}" for path in run_config(folder).get("plugins", ()))
        if not plugins:
            raise
        raise ConfigError(f"{error}. The run had plug-ins: give {plugins}") from error
