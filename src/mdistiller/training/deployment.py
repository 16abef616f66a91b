"""Interface between a task and the use of its students outside of training: export and prediction."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, SupportsIndex

import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor, nn

from mdistiller.config import RunConfig
from mdistiller.data.dataset import PerChannel
from mdistiller.errors import ConfigError
from mdistiller.taps import logits_of
from mdistiller.types import Line

Format = Literal["safetensors", "torch-export", "onnx"]

Model = Callable[[Tensor], tuple[Tensor, ...]]
"""A prepared input to the outputs that `Deployment.outputs` names."""


class Prediction(Protocol):
    """A named tuple that begins with a class name and a score in [0, 1]."""

    def __getitem__(self, index: SupportsIndex, /) -> Any: ...

    def _asdict(self) -> dict[str, Any]: ...


Predictions = Sequence[Prediction]
"""Predictions for one image, the likeliest first."""


class ModelInput(BaseModel, frozen=True):
    """Classes of a model, and the form of its input."""

    classes: tuple[str, ...]
    """Names, in the order of the logits, without a background class."""
    image_size: int | None = None
    """Side of the square input in pixels. None: any size."""
    resize: int | None = None
    """Length to which the short side is scaled (by Pillow) before the center crop of image_size. None, for
    data sets that are no image files: the central square is scaled to image_size (by torch)."""
    mean: PerChannel | None = None
    """Mean of each channel in [0, 1]: the input is (image - mean) / std. None: RGB, not normalized."""
    std: PerChannel | None = None
    """Standard deviation of each channel."""

    @property
    def channels(self) -> int:
        """Number of the image's channels."""
        return len(self.mean or "RGB")


class ModuleOf(nn.Module):
    """Module of a function from images to one output, as evaluations take it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)[0].to(image.device)


def normalize_code(fields: ModelInput) -> str:
    """Returns Python for `Deployment.graph_code`: from Pillow's `image` to a normalized batch of one."""
    mean, std = (None if values is None else list(values) for values in (fields.mean, fields.std))
    return f"""\
image = (np.asarray(image) / 255 - {mean}) / {std}
image = image.transpose(2, 0, 1)[np.newaxis].astype(np.float32)"""


class _OneOutput(nn.Module):
    def __init__(self, model: nn.Module, read: Callable[[object], Tensor]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, image: Tensor) -> Tensor:
        return self.read(self.model(image))


class Deployment(ABC):
    """Export of a task's students and prediction with them.

    A graph has one input, `image`, and the outputs that `outputs` names.
    """

    outputs: ClassVar[tuple[str, ...]]
    predictions: ClassVar[str]
    """Name of an image's list of predictions in JSON."""
    hub_task: ClassVar[str | None] = None
    """The Hugging Face Hub's name for the task."""
    axes: ClassVar[Mapping[int, str]] = {0: "batch"}
    """Axes of a graph's images that may have other lengths, and their names."""
    batches: ClassVar[tuple[int, ...]] = (1, 32)
    """Batch sizes whose times are measured unless others are asked for."""

    @abstractmethod
    def card_fields(self, metadata: Line, config: RunConfig | None) -> Line:
        """Returns the fields of `ModelInput` and `data`, facts about the data set, of a student's file.

        `config` is None where the run's config is not beside the file.
        """

    def read(self, result: object) -> Tensor:
        """Returns the output of a graph with one in a student's result."""
        return logits_of(result)

    def as_model(self, student: nn.Module) -> Model:
        """Wraps a student, in evaluation mode, as a function with a graph's input and outputs."""
        return lambda images: (self.read(student(images)),)

    @abstractmethod
    def check_inputs(self, metadata: Line) -> list[Tensor]:
        """Returns random inputs, the same at each call, on which an exported file is compared.

        A graph is made from the first; the others have other shapes.
        """

    def write_graph(self, path: Path, format: Format, student: nn.Module, metadata: Line) -> None:
        """Writes a student as a graph with its weights, without paths of this machine.

        Any exception says that the format does not fit. Here the graph has one output.
        """
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of constants in the graph
            program = torch.export.export(
                _OneOutput(student, self.read).eval(),
                (self.check_inputs(metadata)[0],),
                dynamic_shapes=(dict.fromkeys(self.axes, torch.export.Dim.DYNAMIC),),
                strict=False,
            )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        if format == "torch-export":
            torch.export.save(program, path)
            return
        graph = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=list(self.outputs),
            dynamic_shapes=(self.axes,),
            dynamo=True,
            verbose=False,
        )
        assert graph is not None
        for node in graph.model.graph:
            node.metadata_props.clear()
        graph.save(path, external_data=False)

    def difference(
        self, image: Tensor, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> tuple[float, float]:
        """Returns the largest difference of a file's outputs, and the scale that it relates to.

        Here they are the only output and the largest expected value.

        Raises:
            ValueError: the outputs cannot be compared.
        """
        (ours,), (theirs,) = found, expected
        if ours.shape != theirs.shape:
            shapes = f"gives shape {list(ours.shape)} for an input of shape {list(image.shape)}"
            raise ValueError(f"{shapes}; the student gives {list(theirs.shape)}")
        return (ours - theirs).abs().max().item(), theirs.abs().max().item()

    @abstractmethod
    def describe(self, fields: ModelInput) -> dict[str, str]:
        """Returns rows for people about input and output, by name."""

    def graph_code(self, fields: ModelInput) -> tuple[str, str] | None:
        """Returns Python for the card of a graph: to prepare an image, and to print a prediction.

        The first makes a float32 array of Pillow's RGB `image`, as `prepare` does; the second reads `classes`
        and arrays named as `outputs`. None: the card has code for this package instead.
        """
        return None

    @abstractmethod
    def prepare(self, fields: ModelInput, image: Any) -> Tensor:
        """Returns an image of `Predictor.open` as float32, prepared as evaluation prepares a test image."""

    @abstractmethod
    def predict(
        self, model: Model, fields: ModelInput, images: list[Tensor], top: int
    ) -> Sequence[Predictions]:
        """Returns at most `top` predictions for each prepared image."""

    def draw(
        self, model: Model, fields: ModelInput, image: Image.Image, top: int, min_score: float
    ) -> tuple[Image.Image, Predictions]:
        """Returns the predictions for an RGB image as an image of its size, and as `predict` does.

        Raises:
            ConfigError: the task's predictions have no position.
        """
        raise ConfigError(
            "draw: this student's predictions have no position; allowed: detectors and segmentation"
        )

    @abstractmethod
    def format_prediction(self, prediction: Any) -> str:
        """Returns one line of text for a prediction."""

    # Measurement. The files of a task without these methods stay unmeasured.

    def example(self, fields: ModelInput, count: int, data: Any) -> Tensor | None:
        """Returns a prepared batch of `count` images, to count operations and measure times.

        `data` is the value of `load_test_set`, or None where the test set is not read. None: a graph takes no
        such batch, or the size of its images depends on the data.
        """
        return None

    def load_test_set(self, config: RunConfig) -> Any:
        """Reads the test set of a run for `evaluate`, in a form that `Task.build_teacher` takes too.

        Raises:
            DataError: the data set is missing or unreadable.
            ConfigError: the task does not measure exported files.
        """
        raise ConfigError("task: the metrics of its exported files are not measured")

    def evaluate(
        self, models: Sequence[Model], config: RunConfig, data: Any, device: torch.device
    ) -> list[Line]:
        """Computes the metrics of models on a test set, in float32.

        They are those that the task's `metrics` names, the number of `images`, and `agreement`: the
        percentage of images with the first model's likeliest class, or None for a task without one class an
        image.

        Args:
            models: models, of which each takes its input on `device`.
            config: the config of the run.
            data: the value of `load_test_set`.
            device: device of the prepared images.
        """
        raise NotImplementedError

    def calibration_images(self, config: RunConfig, count: int) -> Tensor:
        """Returns at most `count` training images of a run, float32 [N, C, S, S], prepared as test images.

        Raises:
            DataError: the data set is missing or unreadable.
            ConfigError: the task's graphs cannot be quantized.
        """
        raise ConfigError("int8: got a run of another task; allowed: runs of classification")
