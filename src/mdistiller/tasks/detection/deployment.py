"""Exported detectors: graphs from an image to boxes, and the boxes of images, also drawn."""

import colorsys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from mdistiller.config import RunConfig
from mdistiller.tasks.detection.coco import DetectionLoader, DetectionSet, coco_tools
from mdistiller.tasks.detection.config import DetectionConfig
from mdistiller.tasks.detection.evaluate import evaluate_detector
from mdistiller.tasks.detection.layouts import load_split
from mdistiller.training.dense import DenseConfig, DenseDeployment, DenseSplits
from mdistiller.training.deployment import Format, Model, ModelInput
from mdistiller.training.distributed import World
from mdistiller.types import Line


class Box(NamedTuple):
    """An object: its class, its score in [0, 1], and its box in pixels of the image."""

    label: str
    score: float
    x1: float
    y1: float
    x2: float
    y2: float


class _Boxes(nn.Module):
    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.detector([image])[0]
        return found["boxes"], found["labels"], found["scores"]


class _FromModel(nn.Module):
    """Module of a function from an image to boxes, as `evaluate_detector` takes it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [dict(zip(DetectorDeployment.outputs, self.model(image), strict=True)) for image in images]


class DetectorDeployment(DenseDeployment):
    """Graphs from one image, float32 [3, H, W] in [0, 1], to boxes [N, 4], labels [N] and scores [N].

    Boxes are x1, y1, x2, y2 in pixels of the image, labels count from 1. Masks are no output of a graph.
    """

    outputs = ("boxes", "labels", "scores")
    hub_task = "object-detection"
    predictions = "boxes"
    checked = ((3, 120, 90), (3, 96, 128), (3, 150, 100))
    load_split, measure = staticmethod(load_split), staticmethod(evaluate_detector)
    loader, module = DetectionLoader, _FromModel

    def as_model(self, student: nn.Module) -> Model:
        return _Boxes(student).eval()

    def write_graph(self, path: Path, format: Format, student: nn.Module, metadata: Line) -> None:
        if format != "onnx":
            raise NotImplementedError("torch.export cannot trace the selection of boxes by their scores")
        axes = {"image": {1: "height", 2: "width"}} | {name: {0: "n"} for name in self.outputs}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns about each size that it takes for a constant
            torch.onnx.export(
                _Boxes(student).eval(),
                (self.check_inputs(metadata)[0],),
                path,
                input_names=["image"],
                output_names=list(self.outputs),
                dynamic_axes=axes,
                dynamo=False,
            )

    def difference(
        self, image: Tensor, found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> tuple[float, float]:
        # Objects are compared with the nearest one of the other list, as equal scores leave the order open.
        ours, theirs = (_rows(outputs, max(image.shape[1:])) for outputs in (found, expected))
        if len(ours) != len(theirs):
            where = f"an image of shape {list(image.shape)}"
            raise ValueError(f"finds {len(ours)} objects in {where}; the student finds {len(theirs)}")
        distance = torch.cdist(ours, theirs, p=torch.inf)
        nearest = torch.cat([distance.amin(0), distance.amin(1)]) if len(ours) else distance.new_zeros(1)
        return nearest.max().item(), 1.0

    def describe(self, fields: ModelInput) -> dict[str, str]:
        return {
            "input": "RGB, one image of any size, float32 [3, H, W], scaled to [0, 1]",
            "output": "boxes [N, 4] (x1, y1, x2, y2 in pixels), labels [N] from 1, scores [N]",
        }

    def graph_code(self, fields: ModelInput) -> tuple[str, str]:
        show = """\
for box, label, score in zip(boxes, labels, scores):
    if label and score >= 0.3:
        print(classes[label - 1], score, box)"""
        return "image = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255", show

    def prepare(self, fields: ModelInput, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def predict(self, model: Model, fields: ModelInput, images: list[Tensor], top: int) -> list[list[Box]]:
        found = []
        for boxes, labels, scores in map(model, images):
            # Without the background, which sigmoid heads have as an output that nothing trains.
            order = [i for i in scores.argsort(descending=True, stable=True).tolist() if labels[i] > 0][:top]
            names = {i: fields.classes[int(labels[i]) - 1] for i in order}
            found.append([Box(names[i], scores[i].item(), *boxes[i].tolist()) for i in order])
        return found

    def draw(
        self, model: Model, fields: ModelInput, image: Image.Image, top: int, min_score: float
    ) -> tuple[Image.Image, list[Box]]:
        (boxes,) = self.predict(model, fields, [self.prepare(fields, image)], top)
        boxes = [box for box in boxes if box.score >= min_score]
        return draw_objects(image, boxes, fields.classes), boxes

    def example(
        self, fields: ModelInput, count: int, data: DenseSplits[DetectionSet] | None
    ) -> Tensor | None:
        return None if data is None or count > 1 else data.test.read(0)[0].float() / 255

    def evaluator(self, config: DenseConfig, images: DetectionSet, world: World) -> Callable[..., Line]:
        coco_tools()  # is missing before the first step rather than after an epoch
        return super().evaluator(config, images, world)

    def load_test_set(self, config: RunConfig) -> DenseSplits[Any]:
        assert isinstance(config, DetectionConfig)
        boxes = config.data.replace(masks=False)
        return super().load_test_set(config.model_copy(update={"data": boxes}))

    def format_prediction(self, prediction: Box) -> str:
        box = " ".join(f"{value:.1f}" for value in prediction[2:])
        return f"{100 * prediction.score:6.2f} %  {prediction.label}  {box}"


def _rows(outputs: Sequence[Tensor], side: int) -> Tensor:
    """Returns a row for each object, with coordinates as fractions of the image's long side."""
    boxes, labels, scores = outputs
    # Another label is farther away than any other box or score.
    return torch.cat([boxes / side, scores[:, None], 10.0 * labels[:, None]], 1)


_SHORT = 320  # least short side of a drawing; in smaller ones labels would cover the objects


def place_labels(
    boxes: Sequence[Sequence[float]], widths: Sequence[float], height: float, size: tuple[float, float]
) -> list[tuple[float, float] | None]:
    """Places a label above, below or in each box, within the image and on no other label.

    Args:
        boxes: x1, y1, x2, y2; the first ones choose first.
        widths: the labels' widths, in the boxes' unit.
        height: height of all labels.
        size: (width, height) of the image.

    Returns:
        The upper left corner of each label; None where all its positions are taken.
    """
    placed: list[tuple[float, float, float]] = []
    found: list[tuple[float, float] | None] = []
    for (x1, y1, _, y2), width in zip(boxes, widths, strict=True):
        x = max(0.0, min(x1, size[0] - width))
        inside = [y for y in (y1 - height, y2, y1) if 0 <= y <= size[1] - height]
        taken = [top for left, right, top in placed if x < right and left < x + width]
        y = next((y for y in inside if all(abs(y - top) >= height for top in taken)), None)
        placed += [] if y is None else [(x, x + width, y)]
        found.append(None if y is None else (x, y))
    return found


def class_color(number: int) -> tuple[int, int, int]:
    """Returns the color of a class, whose hue is far from those of the classes before it."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(
    image: Image.Image, boxes: Sequence[Box], classes: Sequence[str], scale: float = 1.0
) -> Image.Image:
    """Draws boxes, times `scale`, in the colors of their classes, with class and score."""
    texts = [f"{box.label} {box.score:.2f}" for box in boxes]
    colors = [class_color(classes.index(box.label)) for box in boxes]
    return draw_boxes(image, [[scale * x for x in box[2:]] for box in boxes], texts, colors)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """Returns a copy of an RGB image with boxes and their texts.

    Its short side has 320 pixels or more, by a whole factor. A text that would cover another one is left out;
    those of the first boxes come first.
    """
    scale = max(1, -(-_SHORT // min(image.size)))
    boxes = [[scale * x for x in box] for box in boxes]
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    short = min(image.size)
    line, size = max(1, round(short / 250)), min(max(9, short // 32), 28)
    font = ImageFont.load_default(size)
    for (x1, y1, x2, y2), color in reversed(list(zip(boxes, colors, strict=True))):
        canvas.rectangle((min(x1, x2), min(y1, y2), x2, y2), outline=color, width=line)
    widths = [canvas.textlength(text, font) + 4 for text in texts]
    places = place_labels(boxes, widths, size + 4, image.size)
    for text, width, place, color in zip(texts, widths, places, colors, strict=True):
        if text and place is not None:
            x, y = place
            canvas.rectangle((x, y, x + width, y + size + 4), fill=color)
            bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
            canvas.text((x + 2, y + 1), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)
    return drawn
