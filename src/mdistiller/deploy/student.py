"""Students by themselves: saved, loaded with the metadata of their files, and taken as teachers."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from mdistiller.config import RunConfig
from mdistiller.data import DataConfig
from mdistiller.deploy.hub import local_path
from mdistiller.errors import CheckpointError, ClassCountError, ConfigError, UnknownNameError
from mdistiller.methods import get_method, load_plugins, recorded_plugins
from mdistiller.models import ModelConfig
from mdistiller.models.weights import STUDENT_FILE, read_metadata
from mdistiller.runs.checkpoint import save_student as write_student
from mdistiller.runs.config_file import read_values
from mdistiller.runs.folder import CONFIG, EMA_FILE
from mdistiller.settings import explain
from mdistiller.training.deployment import Deployment
from mdistiller.training.task import DEFAULT_TASK, AnyTask, get_task
from mdistiller.types import Line


@dataclass(frozen=True)
class StudentFile:
    """A student's file, with the task and the metadata that build its student."""

    path: Path
    task: AnyTask
    metadata: Line

    @cached_property
    def config(self) -> RunConfig | None:
        """The config of the run, as `run_settings` reads it; None where it is not beside the file."""
        return run_settings(self.path.parent)

    @cached_property
    def deployment(self) -> Deployment:
        """The task's deployment."""
        return self.task.deployment()

    @cached_property
    def fields(self) -> Line:
        """The fields of a card about the student's classes, input and data."""
        return self.deployment.card_fields(self.metadata, self.config)

    def load(self) -> nn.Module:
        """Builds the student, with its method's extension, in evaluation mode on the CPU."""
        with plugins_named(self.path.parent):
            return self.task.load_student(self.path, self.metadata)


def load_student(source: str | Path, *, plugins: Sequence[str | Path] = ()) -> nn.Module:
    """Loads a student, with its method's extension, in evaluation mode on the CPU.

    It computes logits [B, classes] of normalized images [B, 3, H, W]; a detector has the inputs and outputs
    of torchvision's detectors; a segmentation model computes logits [B, classes, H, W].

    Args:
        source: run folder, a student's .safetensors file from one, or a path that `save_student` wrote, or
            hf://USER/REPO (hf://USER/REPO@REVISION), whose weights are downloaded.
        plugins: Python files to run first, such as the one that registers the student's model.

    Raises:
        CheckpointError: no such file, or a file without metadata.
        ConfigError: the task does not load students by themselves, or a plug-in cannot be loaded.
        UnknownNameError: the model is of a plug-in that is not loaded.
    """
    load_plugins(plugins)
    return open_student(Path(local_path(str(source)))).load()


def save_student(
    model: nn.Module,
    path: str | Path,
    *,
    name: str,
    classes: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    options: Line | None = None,
) -> Path:
    """Saves a classifier from your own training loop, so that `load_student` and the commands can read it.

    The file holds the weights and everything below. It is written only if the name builds the model again.

    Args:
        model: the classifier, such as `distiller.student`.
        path: a .safetensors file, or a folder for `student.safetensors`.
        name: name for `create_model`. A model of one's own is registered by `register_model`, in a file that
            is given as a plug-in to load it.
        classes: names in the order of the logits.
        image_size: side of the square images in pixels.
        mean: mean of red, green and blue that is subtracted from images scaled to [0, 1].
        std: standard deviation of red, green and blue, the divisor after that.
        options: further arguments of the model function.

    Returns:
        The path of the file.

    Raises:
        ConfigError: a wrong argument, or name and options build another model or none.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigError(f"path: got {str(path)!r}; allowed: a .safetensors file, or a folder")
    file = path if path.suffix == ".safetensors" else path / STUDENT_FILE
    names = [classes] if isinstance(classes, str) else list(classes)
    if len(set(names)) < max(2, len(names)) or not all(isinstance(each, str) for each in names):
        raise ConfigError(f"classes: got {names!r:.100}; allowed: two or more different names")
    task = get_task(DEFAULT_TASK)
    own = "a model of your own needs a name of its own (mdistiller.register_model)"
    try:
        task.check_model(name)
    except UnknownNameError as error:
        raise ConfigError(f"name: {error}; {own}") from error
    try:
        config = ModelConfig(name=name, options=dict(options or {}))
        images = DataConfig.model_validate(
            {"kind": "folder", "image_size": image_size, "mean": tuple(mean), "std": tuple(std)}
        )
    except ValidationError as error:
        raise explain(error, "save_student") from error
    metadata: Line = {"task": task.name, "model": name, "options": config.options, "classes": names}
    metadata |= {"image_size": images.image_size, "mean": images.mean, "std": images.std}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        trial = Path(folder) / STUDENT_FILE
        write_student(trial, model, metadata)
        try:
            task.load_student(trial, metadata)
        except ClassCountError as error:
            raise ConfigError(f"classes: got {len(names)} names; the model has {error.theirs}") from error
        except CheckpointError as error:
            problem = str(error).replace(str(trial), "the model")
            raise ConfigError(
                f"name: {name!r} with options {config.options} does not build this model: {problem}; {own}"
            ) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    write_student(file, model, metadata)
    return file


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


def open_student(source: Path, ema: bool = False) -> StudentFile:
    """Finds a student's file, as `find_student`, and reads its task and metadata.

    Raises:
        CheckpointError: missing entries, or no student there.
        ConfigError: as `find_student`.
    """
    file = find_student(source, ema)
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
            f"{file} is no student of a run (no {', '.join(missing)} in its metadata); allowed: a run folder "
            "of `mdistiller train`, a student's .safetensors file from one, or a file of `save_student`"
        )
    return StudentFile(file, task, metadata)


def run_config(folder: Path) -> Line:
    """Reads a run's config.json without validation; returns {} without that file."""
    path = folder / CONFIG
    try:
        return read_values(path) if path.is_file() else {}
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def run_settings(folder: Path) -> RunConfig | None:
    """Reads a run's config with method "none", which may be a plug-in's, and without plug-ins or downloads.

    Returns None without a config.json; raises a ConfigError for a wrong field.
    """
    values = run_config(folder)
    if not values:
        return None
    with plugins_named(folder):
        kind = get_task(str(values.get("task", DEFAULT_TASK))).Config
    try:
        config = kind.model_validate(values | {"method": {"name": "none"}, "plugins": ()})
    except ValidationError as error:
        raise explain(error, str(folder / CONFIG)) from error
    if "download" in dict(config.data_settings or ()):
        config = config.replace(data={"download": False})
    return config


@contextmanager
def plugins_named(folder: Path) -> Iterator[None]:
    """Adds the plug-ins of a run to the message of an error about an unknown name."""
    try:
        yield
    except UnknownNameError as error:
        absent = recorded_plugins(run_config(folder).get("plugins"))[1]
        if not absent:
            raise
        raise ConfigError(f"{error}. {absent}") from error


@dataclass(frozen=True)
class GivenTeacher:
    """A teacher that a path or a name gives.

    model: its config; a string is the name of a model, whose family may have weights for it.
    data: size, mean and standard deviation of the images that a run's teacher was trained on.
    """

    model: ModelConfig | str
    data: Line = field(default_factory=dict)

    def fit_data(self, config: RunConfig) -> RunConfig:
        """Returns a config whose images are prepared as the teacher's were."""
        if config.data_settings is None:
            return config
        fields = type(config.data_settings).model_fields
        return config.replace(data={name: value for name, value in self.data.items() if name in fields})


def find_teacher(word: str | Path) -> GivenTeacher:
    """Finds the teacher in a run folder or in a student's file; any other word is a model's name.

    Raises:
        CheckpointError: no student there, or a file without metadata.
        ConfigError: its model is of a plug-in that is not loaded.
    """
    source = Path(word)
    if not os.path.exists(source):
        return GivenTeacher(str(word))
    file = open_student(source)
    folder, metadata = file.path.parent, file.metadata
    extension = metadata.get("extension")
    with plugins_named(folder):
        file.task.check_model(metadata["model"])
        if extension is not None:
            file.task.check_model(extension["teacher"])
            get_method(extension["method"]["name"])
    data: Line = {name: metadata[name] for name in ("image_size", "mean", "std") if name in metadata}
    settings = run_config(folder).get("data")
    if data and isinstance(settings, dict):
        data["resize"] = settings.get("resize")  # goes with image_size
    model = ModelConfig(name=metadata["model"], options=metadata["options"], checkpoint=source)
    return GivenTeacher(model, data)
