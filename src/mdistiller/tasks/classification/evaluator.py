"""Evaluation of a classification run."""

from typing import Any

import torch
from torch import nn

from mdistiller.data import Augment, Splits, make_loader
from mdistiller.data.loader import Order
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.diagnostics import Diagnostics
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.training.distributed import World


class ClassificationEvaluator:
    """Metrics of models on the test images, and diagnostics of the student.

    Args:
        augment: prepares the images; is put into evaluation mode.
        teacher: teacher to compare the student with; None where there is none or it changes.
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
        size, device = config.eval_batch_size, world.device
        order = Order(device=device, seed=config.seed, shuffle=False, rank=world.rank, world_size=world.size)
        self.loader = make_loader(splits.test, size, workers=config.data.workers, **order)
        self.diagnostics = None
        if config.diagnostics:
            self.diagnostics = Diagnostics(teacher, splits, size, augment, world, self.precision)

    def __call__(self, model: nn.Module, is_student: bool) -> dict[str, Any]:
        """Computes top-1, top-5 and loss of a model, and the diagnostics of the student."""
        self.augment.eval()
        diagnostics = self.diagnostics if is_student else None
        watch = None if diagnostics is None else diagnostics.watch("test", lambda: self.loader.epoch(0))
        metrics: dict[str, Any] = evaluate(
            model, self.loader.epoch(0), self.augment, self.world, precision=self.precision, watch=watch
        )
        if diagnostics is not None:
            metrics["diagnostics"] = diagnostics.metrics(model)
        return metrics
