"""Accuracy and loss of classifiers on a test set, and evaluation of a classification run."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mdistiller.data import Augment, Splits, make_loader
from mdistiller.data.loader import Order
from mdistiller.taps import logits_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.diagnostics import Diagnostics, Watch
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast, memory_format, sum_dtype, torch_dtype
from mdistiller.types import Batch


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Computes top-1 and top-5 accuracy in percent, and mean cross-entropy in nats, over all processes.

    The model returns logits [B, classes]; it runs in evaluation mode and is put back into its own. With fewer
    than five classes, top-5 counts all of them. `batches` is this process's share of the test set, raw;
    `prepare` turns each into normalised images.
    """
    sums = torch.zeros(4, dtype=sum_dtype(world.device), device=world.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for i, raw in enumerate(batches):
                batch = prepare(raw)
                image = batch.image.contiguous(memory_format=layout)
                with autocast(world.device, precision):
                    logits = logits_of(model(image)).float()
                hits = logits.topk(min(5, logits.shape[1])).indices == batch.label[:, None]
                loss = F.cross_entropy(logits, batch.label, reduction="sum")
                n = torch.full_like(loss, len(batch.label))
                sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, n])
                if watch is not None:
                    watch(i, logits, batch.label)
    finally:
        model.train(was_training)
    top1, top5, loss, n = world.sum(sums).tolist()
    return {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "loss": loss / n}


class ClassificationEvaluator:
    """Metrics of models on the test images, and diagnostics of the student.

    Diagnostics compare it with `teacher`, which is None where there is none or it changes.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        splits: Splits,
        augment: Augment,
        teacher: nn.Module | None,
        world: World,
    ) -> None:
        self.augment = augment
        precision, layout = torch_dtype(config.precision), memory_format(config.layout)
        self.evaluate = partial(evaluate, prepare=augment, world=world, precision=precision, layout=layout)
        size, device = config.eval_batch_size, world.device
        order = Order(device=device, seed=config.seed, shuffle=False, rank=world.rank, world_size=world.size)
        self.loader = make_loader(splits.test, size, workers=config.data.workers, **order)
        self.diagnostics = None
        if config.diagnostics:
            self.diagnostics = Diagnostics(teacher, splits, size, self.evaluate, world)

    def __call__(self, model: nn.Module, is_student: bool) -> dict[str, Any]:
        """Computes top-1, top-5 and loss of a model, and the diagnostics of the student."""
        self.augment.eval()
        diagnostics = self.diagnostics if is_student else None
        watch = None if diagnostics is None else diagnostics.watch("test", lambda: self.loader.epoch(0))
        metrics: dict[str, Any] = {**self.evaluate(model, self.loader.epoch(0), watch=watch)}
        if diagnostics is not None:
            metrics["diagnostics"] = diagnostics.metrics(model)
        return metrics
