"""Mean average precision, F1 score and loss of classifiers of images with several classes each."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.data import Augment, Splits, make_loader
from mdistiller.data.loader import Order, evaluation_size
from mdistiller.errors import TrainingError
from mdistiller.losses import binary_cross_entropy
from mdistiller.taps import logits_of
from mdistiller.tasks.multilabel.config import MultiLabelConfig
from mdistiller.teacher import EvalMode
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast, memory_format, torch_dtype
from mdistiller.types import IGNORED, Batch, Line, Outputs


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Batch],
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor]:
    """Computes the logits of a test set, float32 [N, C] on the CPU, and returns them with its labels.

    All processes get those of all. The model runs in evaluation mode and is put back into its own.
    """
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), EvalMode(model.modules()):
        for raw in batches:
            batch = prepare(raw)
            image = batch.image.contiguous(memory_format=layout)
            with autocast(world.device, precision):
                logits = logits_of(model(image)).float()
            found.append((logits, batch.label))
    own = [torch.cat(parts).cpu() for parts in zip(*found, strict=True)]
    ranks = [pair for pair in world.gather(own) if pair]  # a process may have no test image
    return torch.cat([logits for logits, _ in ranks]), torch.cat([labels for _, labels in ranks])


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Computes the average precision of scores [N] for labels bool [N]; NaN if none is true.

    Raises:
        TrainingError: a score is NaN or infinite, so that the images have no order.
    """
    from sklearn.metrics import average_precision_score

    if bad := int((~np.isfinite(scores)).sum()):
        raise TrainingError(f"{bad} of {len(scores)} scores are not finite, so there is no average precision")
    return float(average_precision_score(positive, scores)) if positive.any() else float("nan")


def metrics_of(logits: Tensor, labels: Tensor) -> Line:
    """Computes the metrics of logits [N, C] for labels [N, C], of which -100 have no part.

    mAP: mean over the classes of the average precision, in percent.
    macro_f1: mean over the classes of the F1 score at probability 0.5, in percent.
    loss: mean binary cross-entropy in nats.
    class_ap: average precision of each class in percent, NaN for those without a positive image, which are
        left out of both means.
    """
    loss = binary_cross_entropy(Outputs(logits.double(), {}), Batch(logits, labels, labels)).item()
    precisions, f1 = [], []
    for z, y in zip(logits.T.numpy(), labels.T.numpy(), strict=True):
        z, y = z[y != IGNORED], y[y != IGNORED] > 0
        precisions.append(100 * average_precision(z, y))
        if y.any():
            f1.append(200 * (y & (z > 0)).sum() / (y.sum() + (z > 0).sum()))
    known = [value for value in precisions if value == value]
    means = {"mAP": float(np.mean(known)), "macro_f1": float(np.mean(f1))} if known else {}
    return {"mAP": 0.0, "macro_f1": 0.0, **means, "loss": loss, "class_ap": precisions}


class MultiLabelEvaluator:
    """Metrics of models on the test images; with at most `classes_shown` classes, also those of each."""

    def __init__(
        self,
        config: MultiLabelConfig,
        splits: Splits,
        augment: Augment,
        world: World,
        *,
        classes_shown: int = 20,
    ) -> None:
        self.config, self.augment, self.world, self.classes = config, augment, world, splits.classes
        self.is_shown = splits.num_classes <= classes_shown
        order = Order(
            device=world.device, seed=config.seed, shuffle=False, rank=world.rank, world_size=world.size
        )
        size = evaluation_size(config.eval_batch_size, splits.image_size)
        self.loader = make_loader(splits.test, size, workers=config.data.workers, **order)

    def __call__(self, model: nn.Module, is_student: bool) -> Line:
        """Computes the metrics of a model, as `metrics_of`; `classes` has the average precisions by name."""
        self.augment.eval()
        logits, labels = collect(
            model,
            self.loader.epoch(0),
            self.augment,
            self.world,
            precision=torch_dtype(self.config.precision),
            layout=memory_format(self.config.layout),
        )
        found = metrics_of(logits, labels)
        by_name = dict(zip(self.classes, found.pop("class_ap"), strict=True))
        if self.is_shown:
            found["classes"] = {name: value for name, value in by_name.items() if value == value}
        return found
