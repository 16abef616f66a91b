"""Exported classifiers: graphs from images to logits, and the likeliest classes of images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdistiller.config import RunConfig
from mdistiller.data import Augment, AugmentConfig, Splits, load_data
from mdistiller.data.dataset import PerChannel, resize_images
from mdistiller.data.decoder import Pixels, center_crop
from mdistiller.data.loader import PlainBatches
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.evaluate import Measure, evaluate
from mdistiller.training.deployment import (
    Deployment,
    Model,
    ModelInput,
    ModuleOf,
    normalize_code,
)
from mdistiller.training.distributed import World
from mdistiller.types import Line

_BATCH_SIZES = (2, 1, 3)


class Prediction(NamedTuple):
    """A class and its probability, in [0, 1]."""

    name: str
    probability: float


class ClassifierDeployment(Deployment):
    """Graphs from normalized images, float32 [B, C, S, S], to logits [B, classes]."""

    outputs = ("logits",)
    predictions = "classes"
    hub_task = "image-classification"
    measure: Measure = staticmethod(evaluate)
    show_code = "print(classes[logits[0].argmax()])"
    """Python that prints a prediction from the output of a batch of one."""

    def card_fields(self, metadata: Line, config: RunConfig | None) -> Line:
        fields = {name: metadata[name] for name in ("image_size", "mean", "std")}
        fields["classes"] = metadata.get("classes", ())
        size = metadata["image_size"]
        if config is None:
            return {**fields, "resize": size, "data": None}
        assert isinstance(config, ClassificationConfig)
        data = config.data
        # `load_data` scales image files with Pillow, and sets that it reads as arrays with torch.
        resize = (data.resize or size) if data.is_own or data.kind == "tiny-imagenet" else None
        facts = data.model_dump(include={"kind", "train_limit", "test_limit", "label_noise", "seed"})
        facts["name"] = data.root.name if data.is_own else data.kind
        return {**fields, "resize": resize, "data": facts}

    def check_inputs(self, metadata: Line) -> list[Tensor]:
        return [_images(count, len(metadata["mean"]), metadata["image_size"]) for count in _BATCH_SIZES]

    def describe(self, fields: ModelInput) -> dict[str, str]:
        size, mean, std = _form(fields)
        kind = "RGB" if len(mean) == 3 else f"{len(mean)} channels"
        geometry = f"central square scaled to {size}"
        if fields.resize is not None:
            geometry = f"short side scaled to {fields.resize}, center crop of {size}"
        return {
            "input": f"{kind}, {geometry} (bilinear, antialiased), float32 [B, {len(mean)}, {size}, {size}]",
            "normalization": f"scaled to [0, 1], less mean {list(mean)}, over std {list(std)}",
            "output": f"logits [B, {len(fields.classes)}]",
        }

    def graph_code(self, fields: ModelInput) -> tuple[str, str] | None:
        if fields.channels != 3:
            return None
        size, short = fields.image_size, fields.resize or fields.image_size
        cut = f"""\
short = min(image.size)
image = image.resize([{short} * side // short for side in image.size], Image.Resampling.BILINEAR)
left, top = (round((side - {size}) / 2) for side in image.size)
image = image.crop((left, top, left + {size}, top + {size}))
"""
        return cut + normalize_code(fields), self.show_code

    def prepare(self, fields: ModelInput, image: Image.Image | Pixels) -> Tensor:
        size, mean, std = _form(fields)
        if fields.resize is None:
            side = min(np.asarray(image).shape[:2])
            pixels = resize_images(center_crop(image, side, side)[None], size)[0]
        else:
            pixels = center_crop(image, fields.resize, size)
        return Augment(AugmentConfig(), mean, std, 0).normalize(pixels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probability of each class, from logits [B, classes]."""
        return logits.softmax(1)

    def predict(
        self, model: Model, fields: ModelInput, images: list[Tensor], top: int
    ) -> list[list[Prediction]]:
        (logits,) = model(torch.stack(images))
        likeliest = self.probabilities(logits).topk(min(top, len(fields.classes)))
        return [
            [Prediction(fields.classes[i], p) for p, i in zip(values, indices, strict=True)]
            for values, indices in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        ]

    def format_prediction(self, prediction: Prediction) -> str:
        return f"{100 * prediction.probability:6.2f} %  {prediction.name}"

    def example(self, fields: ModelInput, count: int, data: object) -> Tensor:
        return _images(count, fields.channels, _form(fields)[0])

    def load_test_set(self, config: RunConfig) -> Splits:
        assert isinstance(config, ClassificationConfig)
        return load_data(config.data.replace(train_limit=1, label_noise=0.0, unlabeled=None))

    def evaluate(
        self, models: Sequence[Model], config: RunConfig, data: Splits, device: torch.device
    ) -> list[Line]:
        assert isinstance(config, ClassificationConfig)
        size, workers = config.eval_batch_size, config.data.workers
        batches = PlainBatches(data.test, data, size, workers=workers, device=device)
        found: list[Line] = []
        first = torch.empty(0)
        for model in models:
            classes: list[Tensor] = []

            def watch(i: int, logits: Tensor, label: Tensor, classes: list[Tensor] = classes) -> None:
                classes.append(logits.argmax(1))

            metrics = self.measure(ModuleOf(model), batches, World(device), watch=watch)
            del metrics["by_class"]
            predicted = torch.cat(classes)
            first = predicted if not found else first
            same = 100 * (predicted == first).double().mean().item()
            agreement = None if data.multi_label else same
            found.append({**metrics, "agreement": agreement, "images": len(predicted)})
        return found

    def calibration_images(self, config: RunConfig, count: int) -> Tensor:
        assert isinstance(config, ClassificationConfig)
        data = config.data
        splits = load_data(
            data.replace(train_limit=min(count, data.train_limit or count), label_noise=0.0, unlabeled=None)
        )
        batches = PlainBatches(splits.train, splits, count, workers=data.workers, device="cpu")
        return torch.cat([batch.image for batch in batches])


def _form(fields: ModelInput) -> tuple[int, PerChannel, PerChannel]:
    """Returns side, mean and standard deviation of the images; a classifier's file always stores them."""
    size, mean, std = fields.image_size, fields.mean, fields.std
    assert size is not None
    assert mean is not None
    assert std is not None
    return size, mean, std


def _images(count: int, channels: int, size: int) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(count))
