"""Exported students: the card that describes one, opening it in any format, and predictions with it."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.export.passes import move_to_device_pass

from mdistiller.data import Augment, AugmentConfig
from mdistiller.data.dataset import Triple, resize_images
from mdistiller.data.encoded import centre_crop, read_image
from mdistiller.errors import CheckpointError, ConfigError, MDistillerError
from mdistiller.models import ModelConfig
from mdistiller.settings import explain
from mdistiller.taps import logits_of
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.distributed import pick_device

CARD = "card.json"

Format = Literal["safetensors", "torch-export", "onnx"]
FILES: dict[Format, str] = {
    "safetensors": "model.safetensors",
    "torch-export": "model.pt2",
    "onnx": "model.onnx",
}
"""The model file of each format."""

Model = Callable[[Tensor], Tensor]
"""Normalised images, float32 [B, 3, S, S], to logits [B, classes]."""


class Accuracy(BaseModel):
    """Top-1 accuracy on the run's test set, in percent."""

    model_config = ConfigDict(frozen=True)

    last_top1: float | None
    """Of the exported weights, those after last_epoch; None: that epoch was not evaluated."""
    last_epoch: int
    best_top1: float
    """Of the best epoch up to then, picked on the test set. Its weights are not the exported ones."""
    best_epoch: int


class Check(BaseModel):
    """How far the exported file's logits were from the student's, on random images."""

    model_config = ConfigDict(frozen=True)

    batch_sizes: tuple[int, ...]
    largest_difference: float
    largest_logit: float
    """Largest absolute value among the student's logits."""
    tolerance: float
    """Largest difference allowed, as a fraction of largest_logit."""


class Card(BaseModel):
    """`card.json`: what an exported student is, and what its input has to look like."""

    model_config = ConfigDict(frozen=True)

    format: Format
    file: str
    sha256: str
    """Of the model file."""
    model: str
    """The architecture's name, as `create_model` knows it."""
    options: dict[str, Any]
    """Further arguments of the model function."""
    parameters: int
    classes: tuple[str, ...]
    """Names, in the order of the logits."""
    image_size: int
    """Side of the square input in pixels."""
    resize: int | None
    """Length to which the short side is scaled (by Pillow) before the centre crop of image_size. None, for
    data sets that are no image files: the central square is scaled to image_size (by torch)."""
    mean: Triple
    std: Triple
    """Of each channel, RGB scaled to [0, 1]: the input is (image - mean) / std."""
    student: str
    """The file of the run folder that was exported."""
    accuracy: Accuracy | None
    """None where the run's metrics are not beside the file."""
    recipe: str | None
    teacher: str | None
    method: dict[str, Any] | None
    """Its name and hyper-parameters."""
    data: dict[str, Any] | None
    """Kind, name, limits and label noise of the data set."""
    versions: dict[str, str]
    check: Check


class Prediction(NamedTuple):
    """A class and its probability, in [0, 1]."""

    name: str
    probability: float


class Exported:
    """An exported student. A call takes normalised images to logits, whatever the format.

    Args:
        card: its description.
        model: its file, opened by `open_model`.
        device: where `model` wants its images.
    """

    def __init__(self, card: Card, model: Model, device: torch.device) -> None:
        self.card, self.model, self.device = card, model, device
        self._normalise = Augment(AugmentConfig(), card.mean, card.std, len(card.classes)).normalise

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """float32 [B, 3, S, S], normalised, to logits float32 [B, classes] on the CPU."""
        # Contiguous, as the example was that the exported graphs were made with.
        return self.model(images.to(self.device).contiguous()).float().cpu()

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image as input, float32 [3, S, S]: what evaluation makes of a test image."""
        size, resize = self.card.image_size, self.card.resize
        if resize is None:
            side = min(image.size)
            pixels = resize_images(centre_crop(image, side, side)[None], size)[0]
        else:
            pixels = centre_crop(image, resize, size)
        return self._normalise(pixels)

    def predict(self, paths: Sequence[Path], top: int = 5, batch_size: int = 32) -> list[list[Prediction]]:
        """The `top` likeliest classes of each image file, likeliest first (all, if there are fewer).

        Raises:
            DataError: an image cannot be read.
            ConfigError: top is below 1.
        """
        if top < 1:
            raise ConfigError(f"top: got {top}; allowed: 1 or more")
        names, found = self.card.classes, []
        for start in range(0, len(paths), batch_size):
            images = [self.prepare(read_image(path)) for path in paths[start : start + batch_size]]
            likeliest = self(torch.stack(images)).softmax(1).topk(min(top, len(names)))
            for values, indices in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
                found.append([Prediction(names[i], p) for p, i in zip(values, indices, strict=True)])
        return found


def load_export(folder: Path | str, device: str = "auto") -> Exported:
    """Open a folder that `export_student` wrote.

    Args:
        folder: it. A `torch-export` file is opened by torch, which unpickles parts of it: trust its
            source, or take another format.
        device: auto (a GPU if there is one; ONNX: the CPU), cpu, cuda or cuda:N.

    Raises:
        CheckpointError: it has no card, or its card or model file is damaged.
        ConfigError: no such device, or a package is missing.
    """
    folder = Path(folder)
    try:
        card = Card.model_validate(json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is no exported folder: it has no {CARD}; `mdistiller export RUN` makes one"
        ) from None
    except ValidationError as error:
        raise CheckpointError(str(explain(error, str(folder / CARD)))) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CARD} cannot be read: {error}") from error
    file = folder / FILES[card.format]
    if not file.is_file():
        raise CheckpointError(f"{folder} has a {CARD} but no {file.name}")
    if sha256(file) != card.sha256:
        raise CheckpointError(f"{file} is not the file that {CARD} describes: damaged, or replaced")
    picked = pick_device("cpu" if card.format == "onnx" and device == "auto" else device)
    config = ModelConfig(name=card.model, options=card.options)
    return Exported(card, open_model(file, card.format, config, len(card.classes), picked), picked)


def open_model(
    file: Path, format: Format, config: ModelConfig, num_classes: int, device: torch.device
) -> Model:
    """The model in an exported file, on a device. The architecture (`config`) is what safetensors lacks.

    Raises:
        CheckpointError: it cannot be opened.
        ConfigError: a package is missing, or ONNX Runtime cannot use the device.
    """
    try:
        if format == "onnx":
            return _open_onnx(file, device)
        if format == "torch-export":
            program = torch.export.load(file)
            if device.type != "cpu":
                program = move_to_device_pass(program, device)
            return program.module()
        model = build_model(config.model_copy(update={"checkpoint": file}), num_classes)
        model.to(device).eval()
    except MDistillerError:
        raise
    except Exception as error:  # each library has its own
        raise CheckpointError(f"{file} cannot be opened: {one_line(error)}") from error
    return lambda images: logits_of(model(images))


def _open_onnx(file: Path, device: torch.device) -> Model:
    runtime = require_onnx("onnxruntime")
    providers: list[Any] = ["CPUExecutionProvider"]
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
    return lambda images: torch.from_numpy(session.run(["logits"], {"image": images.cpu().numpy()})[0])


def require_onnx(*names: str) -> ModuleType:
    """Import packages of the extra `onnx`; returns the last.

    Raises:
        ConfigError: one is missing.
    """
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"format onnx needs {name}: pip install 'mdistiller[onnx]'") from error
    return module


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def one_line(error: Exception) -> str:
    """Kind and beginning of a library's error, which may go on for pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
