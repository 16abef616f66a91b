"""Accuracy and loss of classifiers on a test set, and evaluation of a classification run."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.data import Splits
from mdistiller.data.loader import PlainBatches
from mdistiller.taps import logits_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.diagnostics import Diagnostics, Watch
from mdistiller.teacher import EvalMode
from mdistiller.training.distributed import World, pick_device
from mdistiller.training.precision import autocast, memory_format, sum_dtype, torch_dtype
from mdistiller.types import Batch, Line

Measure = Callable[..., Line]
"""A function as `evaluate`."""


def outputs(
    model: nn.Module, batches: Iterable[Batch], world: World, precision: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields a model's logits, float32 [B, C], in evaluation mode, and the labels of each batch."""
    with torch.no_grad(), EvalMode(model.modules()):
        for batch in batches:
            with autocast(world.device, precision):
                logits = logits_of(model(batch.image)).float()
            yield logits, batch.label


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    watch: Watch | None = None,
    num_classes: int | None = None,
) -> Line:
    """Computes metrics over all processes: those of `ClassificationConfig.metrics`, and `by_class`.

    top1, top5: accuracy in percent. With fewer than five classes, top-5 counts all of them.
    loss: mean cross-entropy in nats.
    balanced_accuracy, macro_f1: means over the classes of accuracy and F1 score, in percent; classes without
        a test image are left out.
    by_class: accuracy of each class in percent, NaN for those without a test image.

    The model returns logits [B, classes]; it runs in evaluation mode and is put back into its own. `batches`
    is this process's share of the test set, normalized, such as `PlainBatches`. `num_classes` is needed by a
    process that has no batch.
    """
    dtype = sum_dtype(world.device)
    sums = torch.zeros(4, dtype=dtype, device=world.device)
    counts = torch.zeros(3, num_classes or 0, dtype=dtype, device=world.device)
    for i, (logits, label) in enumerate(outputs(model, batches, world, precision)):
        likeliest = logits.topk(min(5, logits.shape[1])).indices
        hits = likeliest == label[:, None]
        if not counts.shape[1]:
            counts = counts.new_zeros(3, logits.shape[1])
        # Not `bincount`, which waits for a GPU.
        ones = counts.new_ones(len(label))
        counts[0].index_add_(0, label, hits[:, 0].to(dtype))
        counts[1].index_add_(0, label, ones)
        counts[2].index_add_(0, likeliest[:, 0], ones)
        loss = F.cross_entropy(logits, label, reduction="sum")
        n = torch.full_like(loss, len(label))
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, n])
        if watch is not None:
            watch(i, logits, label)
    top1, top5, loss, n, *rest = world.sum(torch.cat([sums, counts.flatten()])).tolist()
    found = {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "loss": loss / n}
    return found | _class_metrics(np.array(rest).reshape(3, -1))


def _class_metrics(counts: np.ndarray) -> Line:
    """Computes the metrics by class from the counts of hits, images and predictions of each, [3, C]."""
    hits, images, predictions = counts
    present = images > 0
    accuracy = 100 * np.divide(hits, images, out=np.full(len(hits), np.nan), where=present)
    f1 = 200 * hits[present] / (images + predictions)[present]
    return {
        "balanced_accuracy": float(accuracy[present].mean()),
        "macro_f1": float(f1.mean()),
        "by_class": accuracy.tolist(),
    }


def training_images(config: ClassificationConfig, data: Splits) -> Iterator[Batch]:
    """Yields every training image once, in order, prepared as for evaluation."""
    device, workers = pick_device(config.device), config.data.workers
    return iter(PlainBatches(data.train, data, config.eval_batch_size, workers=workers, device=device))


class ClassificationEvaluator:
    """Metrics of models on the test images, and diagnostics of the student.

    Diagnostics compare it with `teacher`, which is None where there is none or it changes. The metric of
    each class is among the metrics if there are at most `classes_shown` of them. `measure` computes them.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        splits: Splits,
        measure: Measure,
        teacher: nn.Module | None,
        world: World,
        *,
        classes_shown: int = 20,
    ) -> None:
        self.classes, self.is_shown = splits.classes, splits.num_classes <= classes_shown
        self.evaluate = partial(
            measure, world=world, precision=torch_dtype(config.precision), num_classes=splits.num_classes
        )
        plain = partial(
            PlainBatches,
            splits=splits,
            batch_size=config.eval_batch_size,
            memory_format=memory_format(config.layout),
            device=world.device,
            rank=world.rank,
            world_size=world.size,
        )
        self.test = plain(splits.test, workers=config.data.workers)
        self.diagnostics = None
        if config.diagnostics:
            self.diagnostics = Diagnostics(teacher, splits, plain, self.evaluate, world)

    def __call__(self, model: nn.Module, is_student: bool) -> Line:
        """Computes the metrics of a model, as `evaluate`, and the diagnostics of the student.

        `classes` has the metric of each class that has a test image, in percent, by name.
        """
        diagnostics = self.diagnostics if is_student else None
        watch = None if diagnostics is None else diagnostics.watch("test", self.test)
        metrics = self.evaluate(model, self.test, watch=watch)
        by_class = dict(zip(self.classes, metrics.pop("by_class"), strict=True))
        if self.is_shown:
            metrics["classes"] = {name: value for name, value in by_class.items() if value == value}
        if diagnostics is not None:
            metrics["diagnostics"] = diagnostics.metrics(model)
        return metrics
