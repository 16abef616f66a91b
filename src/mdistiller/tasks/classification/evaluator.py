"""Evaluation of a classification run."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from mdistiller.data import Augment, AugmentConfig, Splits, load_data, make_loader
from mdistiller.models import ModelConfig, create_model
from mdistiller.models.weights import find_weights, read_metadata
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.diagnostics import Diagnostics
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.tasks.classification.models import build_model
from mdistiller.training.distributed import World
from mdistiller.training.precision import avoid_slow_convolutions


class ClassificationEvaluator:
    """Metrics of models on the test images, and diagnostics of the student.

    Args:
        config: the run's config.
        splits: the data.
        augment: prepares the images; put into evaluation mode while it is used.
        teacher: teacher to compare the student with; None where there is none or it changes.
        world: this process.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        splits: Splits,
        augment: Augment,
        teacher: nn.Module | None,
        world: World,
    ) -> None:
        self.augment, self.world = augment, world
        self.precision: torch.dtype = getattr(torch, config.precision)
        self.loader = make_loader(
            splits.test,
            config.eval_batch_size,
            device=world.device,
            seed=config.seed,
            shuffle=False,
            rank=world.rank,
            world_size=world.size,
            workers=config.data.workers,
        )
        self.diagnostics = None
        if config.diagnostics:
            size = config.eval_batch_size
            self.diagnostics = Diagnostics(teacher, splits, size, augment, world, self.precision)

    def __call__(self, model: nn.Module, is_student: bool) -> dict[str, Any]:
        """Computes top-1, top-5 and loss of a model, and the diagnostics of the student."""
        self.augment.eval()
        diagnostics = self.diagnostics if is_student else None
        watch = None
        if diagnostics is not None:
            watch = diagnostics.watch("test", lambda: self.loader.epoch(0))
        batches = self.loader.epoch(0)
        metrics: dict[str, Any] = evaluate(
            model, batches, self.augment, self.world, precision=self.precision, watch=watch
        )
        if diagnostics is not None:
            metrics["diagnostics"] = diagnostics.metrics(model)
        return metrics


def evaluate_stored(config: ClassificationConfig, model: ModelConfig, world: World) -> dict[str, Any]:
    """Computes top-1, top-5 and loss of a model with its checkpoint, and the number of test `images`."""
    # A wrong name or option must not wait for the data, or for their download.
    options = {k: v for k, v in model.options.items() if k not in ("pretrained", "weights")}
    create_model(model.name, **options)
    assert model.checkpoint is not None
    find_weights(model.checkpoint)
    splits = load_data(config.data.replace(train_limit=1, label_noise=0.0))
    network = build_model(model, splits.num_classes).to(world.device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if world.device.type == "cpu" and config.precision == "bfloat16":
        avoid_slow_convolutions(network)  # as in training, whose metrics are repeated to the bit
    size = read_metadata(model.checkpoint).get("image_size", splits.image_size)
    if size != splits.image_size and world.is_main:
        warnings.warn(
            f"{model.checkpoint} was trained at {size} pixels and is evaluated at {splits.image_size}",
            stacklevel=1,
        )
    augment = Augment(AugmentConfig(), splits.mean, splits.std, splits.num_classes).to(world.device)
    config = config.replace(diagnostics=False)
    metrics = ClassificationEvaluator(config, splits, augment, None, world)(network, False)
    return {**metrics, "images": len(splits.test)}
