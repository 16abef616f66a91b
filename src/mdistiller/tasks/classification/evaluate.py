"""Accuracy and loss of classifiers on a test set, and evaluation of a classification run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mdistiller.data import Augment, Splits, StreamSet, make_loader
from mdistiller.data.loader import Order, evaluation_size
from mdistiller.taps import logits_of
from mdistiller.tasks.classification.config import ClassificationConfig
from mdistiller.tasks.classification.diagnostics import Diagnostics, Watch
from mdistiller.training.distributed import World, pick_device
from mdistiller.training.precision import autocast, memory_format, sum_dtype, torch_dtype
from mdistiller.types import Batch, Line


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    watch: Watch | None = None,
    num_classes: int | None = None,
) -> Line:
    """Computes metrics over all processes: those of `ClassificationConfig.metrics`, and `class_accuracy`.

    top1, top5: accuracy in percent. With fewer than five classes, top-5 counts all of them.
    loss: mean cross-entropy in nats.
    balanced_accuracy, macro_f1: means over the classes of accuracy and F1 score, in percent; classes without
        a test image are left out.
    class_accuracy: accuracy of each class in percent, NaN for those without a test image.

    The model returns logits [B, classes]; it runs in evaluation mode and is put back into its own. `batches`
    is this process's share of the test set, raw; `prepare` turns each into normalised images. `num_classes`
    is needed by a process that has no batch.
    """
    dtype = sum_dtype(world.device)
    sums = torch.zeros(4, dtype=dtype, device=world.device)
    counts = torch.zeros(3, num_classes or 0, dtype=dtype, device=world.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for i, raw in enumerate(batches):
                batch = prepare(raw)
                image = batch.image.contiguous(memory_format=layout)
                with autocast(world.device, precision):
                    logits = logits_of(model(image)).float()
                likeliest = logits.topk(min(5, logits.shape[1])).indices
                hits = likeliest == batch.label[:, None]
                if not counts.shape[1]:
                    counts = counts.new_zeros(3, logits.shape[1])
                # Not `bincount`, which waits for a GPU.
                ones = counts.new_ones(len(batch.label))
                counts[0].index_add_(0, batch.label, hits[:, 0].to(dtype))
                counts[1].index_add_(0, batch.label, ones)
                counts[2].index_add_(0, likeliest[:, 0], ones)
                loss = F.cross_entropy(logits, batch.label, reduction="sum")
                n = torch.full_like(loss, len(batch.label))
                sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, n])
                if watch is not None:
                    watch(i, logits, batch.label)
    finally:
        model.train(was_training)
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
        "class_accuracy": accuracy.tolist(),
    }


def training_images(config: ClassificationConfig, data: Splits) -> Iterator[Batch]:
    """Yields every training image once, in order, prepared as for evaluation."""
    device = pick_device(config.device)
    train = data.train
    if isinstance(train, StreamSet):
        train = replace(train, random_crop=False)
    order = Order(device=device, shuffle=False)
    size = evaluation_size(config.eval_batch_size, data.image_size)
    loader = make_loader(train, size, workers=config.data.workers, **order)
    augment = Augment(config.augment, data.mean, data.std, data.num_classes).to(device).eval()
    return map(augment, loader.epoch(0))


class ClassificationEvaluator:
    """Metrics of models on the test images, and diagnostics of the student.

    Diagnostics compare it with `teacher`, which is None where there is none or it changes. The accuracy of
    each class is among the metrics if there are at most `classes_shown` of them.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        splits: Splits,
        augment: Augment,
        teacher: nn.Module | None,
        world: World,
        *,
        classes_shown: int = 20,
    ) -> None:
        self.augment, self.classes = augment, splits.classes
        self.is_shown = splits.num_classes <= classes_shown
        precision, layout = torch_dtype(config.precision), memory_format(config.layout)
        self.evaluate = partial(
            evaluate,
            prepare=augment,
            world=world,
            precision=precision,
            layout=layout,
            num_classes=splits.num_classes,
        )
        size, device = evaluation_size(config.eval_batch_size, splits.image_size), world.device
        order = Order(device=device, seed=config.seed, shuffle=False, rank=world.rank, world_size=world.size)
        self.loader = make_loader(splits.test, size, workers=config.data.workers, **order)
        self.diagnostics = None
        if config.diagnostics:
            self.diagnostics = Diagnostics(teacher, splits, size, self.evaluate, world)

    def __call__(self, model: nn.Module, is_student: bool) -> Line:
        """Computes the metrics of a model, as `evaluate`, and the diagnostics of the student.

        `classes` has the accuracy of each class that has a test image, in percent, by name.
        """
        self.augment.eval()
        diagnostics = self.diagnostics if is_student else None
        watch = None if diagnostics is None else diagnostics.watch("test", lambda: self.loader.epoch(0))
        metrics = self.evaluate(model, self.loader.epoch(0), watch=watch)
        accuracy = dict(zip(self.classes, metrics.pop("class_accuracy"), strict=True))
        if self.is_shown:
            metrics["classes"] = {name: value for name, value in accuracy.items() if value == value}
        if diagnostics is not None:
            metrics["diagnostics"] = diagnostics.metrics(model)
        return metrics
