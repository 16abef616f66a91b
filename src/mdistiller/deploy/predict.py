"""Prediction with exported students and with students of runs, and the card of an export."""

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.export.passes import move_to_device_pass

from mdistiller.data.decoder import Pixels, read_image
from mdistiller.data.encoded import as_encoded
from mdistiller.deploy.measure import Speed
from mdistiller.deploy.student import open_student
from mdistiller.errors import (
    CheckpointError,
    ConfigError,
    MDistillerError,
    MissingPackageError,
    UnknownNameError,
    one_line,
)
from mdistiller.models.weights import STUDENT_FILE
from mdistiller.runs.folder import CONFIG
from mdistiller.settings import explain
from mdistiller.training.deployment import Deployment, Format, Model, ModelInput, Predictions
from mdistiller.training.distributed import pick_device
from mdistiller.training.task import get_task
from mdistiller.types import Line

CARD = "card.json"

FILES = {"safetensors": "model.safetensors", "torch-export": "model.pt2", "onnx": "model.onnx"}
"""The model file of each format."""


class Accuracy(BaseModel, frozen=True):
    """Result of the exported weights on the run's test set, as the run recorded it."""

    metric: str
    """Name of the metric, such as top1 or AP."""
    value: float
    epoch: int


class Check(BaseModel, frozen=True):
    """Comparison of the exported file's outputs with the student's, on random inputs."""

    input_shapes: tuple[tuple[int, ...], ...]
    largest_difference: float
    largest_output: float
    """Largest absolute value among the student's outputs. Boxes are fractions of the image's long side."""
    tolerance: float | None
    """Largest difference allowed, as a fraction of largest_output. None for int8, which rounds: `measured`
    has its metric and agreement."""


class Measured(BaseModel, frozen=True):
    """Metric of the exported file on its run's test set, computed after the export."""

    metric: str
    value: float
    """The file's metric."""
    student: float
    """The student's on the same images in float32."""
    agreement: float | None
    """Percentage of images whose likeliest class is the student's. None for detectors."""
    images: int


class Card(ModelInput):
    """Description of an exported student and its input: `card.json`."""

    task: str
    format: Format
    file: str
    sha256: str
    """SHA-256 of the model file."""
    model: str
    """Name of the architecture, as in the run's config."""
    options: Line
    """Further arguments of the model function."""
    parameters: int
    student: str
    """The file of the run folder that was exported."""
    accuracy: Accuracy | None
    """None where the run's metrics are not beside the file, or its epoch was not evaluated."""
    recipe: str | None
    teacher: str | None
    method: Line | None
    """Name and hyperparameters of the method."""
    data: Line | None
    """Kind, name and limits of the data set, and what else its task notes."""
    versions: dict[str, str]
    check: Check

    int8: bool
    """Whether weights and activations have eight bits."""
    bytes: int
    """Size of the model file."""
    macs: int | None = None
    """Multiply-accumulates for one image. None where the size of the images is not known."""
    image_shape: tuple[int, ...] | None = None
    """Shape of the prepared image of `macs` and `speed`."""
    measured: Measured | None = None
    """None where the file was not evaluated."""
    speed: Speed | None = None
    """Time of the exported file. None as `macs`."""


@dataclass(frozen=True)
class Predictor:
    """A student that predicts images."""

    deployment: Deployment
    card: ModelInput
    model: Model
    device: torch.device
    """Device on which `model` takes its input."""

    @torch.no_grad()
    def run(self, image: Tensor) -> tuple[Tensor, ...]:
        """Returns the model's outputs for a prepared input on the CPU, floats as float32."""
        # Contiguous, as the examples are from which graphs are made.
        found = self.model(image.to(self.device).contiguous())
        return tuple((value.float() if value.is_floating_point() else value).cpu() for value in found)

    def __call__(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Computes the outputs for a prepared input, on the CPU.

        Those of a classifier are logits [B, classes] of float32 [B, C, S, S], normalized; those of a detector
        are boxes [N, 4], labels [N] and scores [N] of one image, float32 [3, H, W] in [0, 1]; those of a
        segmentation model are logits [B, classes, H, W] of float32 [B, 3, H, W], normalized.
        """
        outputs = self.run(image)
        return outputs[0] if len(outputs) == 1 else outputs

    def open(self, image: Path | Image.Image | Pixels) -> Any:
        """Reads an image file: as RGB, or as it is where the student has other channels; DataError if not."""
        if not isinstance(image, Path):
            return image
        n = self.card.channels
        return read_image(image) if n == 3 else as_encoded([image], n).pixels(0)

    def prepare(self, image: Image.Image | Pixels) -> Tensor:
        """Returns an image from `open` as input, prepared as evaluation prepares a test image."""
        return self.deployment.prepare(self.card, image)

    def _batches(self, images: Iterable[Path | Image.Image], size: int) -> Iterator[list[Tensor]]:
        prepared = map(self.prepare, map(self.open, images))
        while batch := list(islice(prepared, size)):
            yield batch

    def outputs(self, images: Iterable[Path | Image.Image], batch_size: int = 32) -> Tensor:
        """Returns the embedding, or the logits, of each image file or RGB image, float32 [N, D].

        Raises:
            DataError: an image cannot be read.
            ConfigError: a detector or a segmentation model.
        """
        if self.card.image_size is None:
            raise ConfigError("out: this student has no row of numbers for an image; use --json")
        return torch.cat([self.run(torch.stack(batch))[0] for batch in self._batches(images, batch_size)])

    def predict(
        self, images: Iterable[Path | Image.Image], top: int = 5, batch_size: int = 32
    ) -> list[Predictions]:
        """Returns the `top` likeliest classes, or boxes, of each image file or RGB image, or fewer.

        Raises:
            DataError: an image cannot be read.
            ConfigError: top is below 1.
        """
        if top < 1:
            raise ConfigError(f"top: got {top}; allowed: 1 or more")
        found: list[Predictions] = []
        for batch in self._batches(images, batch_size):
            found += self.deployment.predict(self.run, self.card, batch, top)
        return found

    @torch.no_grad()
    def draw(
        self, image: Path | Image.Image, top: int = 5, min_score: float = 0.0
    ) -> tuple[Image.Image, Predictions]:
        """Returns the predictions of a score for an image file as an image, and as `predict` does.

        Raises:
            DataError: the image cannot be read.
            ConfigError: the task's predictions have no position.
        """
        return self.deployment.draw(self.run, self.card, self.open(image), top, min_score)


def load_predictor(source: Path | str, device: str = "auto") -> Predictor:
    """Loads an exported folder (see `load_export`), a run folder, or a student's file, for prediction.

    Raises:
        CheckpointError: neither an export nor a student is there, or it is damaged.
        ConfigError: no such device, a package is missing, or the student's task has no prediction.
        UnknownNameError: a model of a plug-in that is not loaded.
    """
    source = Path(source)
    if source.is_dir() and not any((source / name).is_file() for name in (STUDENT_FILE, CONFIG)):
        return load_export(source, device)
    file, picked = open_student(source), pick_device(device)
    model = open_model(file.path, "safetensors", file.deployment, picked)
    return Predictor(file.deployment, ModelInput(**file.fields), model, picked)


def load_export(folder: Path | str, device: str = "auto") -> Predictor:
    """Loads a folder that `export_student` wrote onto a device: auto, cpu, cuda, cuda:N or mps.

    auto means a GPU if there is one; for ONNX, the CPU. torch unpickles parts of a `torch-export` file: trust
    its source, or take another format.

    Raises:
        CheckpointError: the folder has no card, or its card or model file is damaged.
        ConfigError: no such device, or a package is missing.
    """
    folder = Path(folder)
    try:
        card = Card.model_validate(json.loads((folder / CARD).read_text(encoding="utf-8")))
        task = get_task(card.task)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is no exported folder: it has no {CARD}; `mdistiller export RUN` makes one"
        ) from None
    except ValidationError as error:
        raise CheckpointError(str(explain(error, str(folder / CARD)))) from error
    except UnknownNameError as error:
        raise CheckpointError(f"{folder / CARD}: {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CARD} cannot be read: {error}") from error
    missing = [key for key in task.metadata_keys if getattr(card, key, "") is None]
    if missing:
        raise CheckpointError(f"{folder / CARD}: {missing[0]}: got None; the task {card.task!r} needs it")
    file = folder / FILES[card.format]
    if not file.is_file():
        raise CheckpointError(f"{folder} has a {CARD} but no {file.name}")
    if sha256(file) != card.sha256:
        raise CheckpointError(f"{file} is not the file that {CARD} describes: damaged, or replaced")
    picked = pick_device("cpu" if card.format == "onnx" and device == "auto" else device)
    deployment = task.deployment()
    return Predictor(deployment, card, open_model(file, card.format, deployment, picked), picked)


def open_model(file: Path, format: Format, deployment: Deployment, device: torch.device) -> Model:
    """Loads the model in an exported file onto a device.

    Raises:
        CheckpointError: the file cannot be opened.
        ConfigError: a package is missing, or ONNX Runtime cannot use the device.
    """
    try:
        if format == "onnx":
            return _open_onnx(file, deployment, device)
        if format == "torch-export":
            program = torch.export.load(file)
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            graph = program.module()
            return lambda image: found if isinstance(found := graph(image), tuple) else (found,)
        return deployment.as_model(open_student(file).load().to(device))
    except MDistillerError:
        raise
    except Exception as error:  # each library has its own
        raise CheckpointError(f"{file} cannot be opened: {one_line(error)}") from error


def _open_onnx(file: Path, deployment: Deployment, device: torch.device) -> Model:
    runtime = require_onnx("onnxruntime")
    providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
    if device.type == "mps":
        raise ConfigError(f"device: got {str(device)!r}; an ONNX file runs on cpu, cuda or cuda:N")
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            raise ConfigError(
                f"device: got {str(device)!r}, but the onnxruntime installed here runs on the CPU only; "
                "give --device cpu, or install onnxruntime-gpu"
            )
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0}), *providers]
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers)
    names = list(deployment.outputs)
    return lambda image: tuple(map(torch.from_numpy, session.run(names, {"image": image.cpu().numpy()})))


def require_onnx(*names: str) -> ModuleType:
    """Imports packages of the extra `onnx`, or raises a ConfigError; returns the last one."""
    try:
        for name in names:
            module = importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError("format onnx", name, "onnx") from error
    return module


def sha256(file: Path) -> str:
    """Computes the SHA-256 of a file's content, in hexadecimal."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
