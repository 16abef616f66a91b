"""What an epoch ends with: the models on the test images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mdistiller.data import Augment, Splits, make_loader
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.diagnostics import Diagnostics
from mdistiller.tasks.classification.evaluate import evaluate
from mdistiller.training.distributed import World


class Evaluator:
    """Measures models on the test images, and compares the student with its teacher.

    Args:
        config: the run's settings.
        splits: the data.
        augment: prepares the images; in eval mode while it is used.
        teacher: to compare with; None where there is none, or where it changes as the run goes on.
        here: this process.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        splits: Splits,
        augment: Augment,
        teacher: nn.Module | None,
        here: World,
    ) -> None:
        self.augment, self.world = augment, here
        self.precision: torch.dtype = getattr(torch, config.precision)
        self.loader = make_loader(
            splits.test,
            config.eval_batch_size,
            device=here.device,
            seed=config.seed,
            shuffle=False,
            rank=here.rank,
            world_size=here.size,
            workers=config.data.workers,
        )
        self.diagnostics = None
        if config.diagnostics:
            size = config.eval_batch_size
            self.diagnostics = Diagnostics(teacher, splits, size, augment, here, self.precision)

    def __call__(self, models: dict[str, nn.Module]) -> dict[str, Any]:
        """Figures by the model's name; those of the student, whose name is empty, stand by themselves."""
        self.augment.eval()
        found: dict[str, Any] = {}
        for name, model in models.items():
            self.world.share_buffers(model)
            watch = None
            if self.diagnostics is not None and not name:
                watch = self.diagnostics.watch("test", lambda: self.loader.epoch(0))
            batches = self.loader.epoch(0)
            figures = evaluate(
                model, batches, self.augment, self.world, precision=self.precision, watch=watch
            )
            found.update({name: figures} if name else figures)
        if self.diagnostics is not None:
            found["diagnostics"] = self.diagnostics.figures(models[""])
        return found
