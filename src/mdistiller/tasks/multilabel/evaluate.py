"""Mean average precision, F1 score and loss of classifiers of images with several classes each."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.errors import TrainingError
from mdistiller.losses import binary_cross_entropy
from mdistiller.tasks.classification.diagnostics import Watch
from mdistiller.tasks.classification.evaluate import outputs
from mdistiller.training.distributed import World
from mdistiller.types import IGNORED, Batch, Line, Outputs


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    watch: Watch | None = None,
    num_classes: int | None = None,
) -> Line:
    """Computes metrics over all processes, as `metrics_of`; arguments as classification's `evaluate`."""
    found: list[list[Tensor]] = [[], []]
    for i, pair in enumerate(outputs(model, batches, world, precision)):
        if watch is not None:
            watch(i, *pair)
        for part, value in zip(found, pair, strict=True):
            part.append(value.cpu())
    ranks = [pair for pair in world.gather(found) if pair[0]]  # a process may have no test image
    logits, labels = (torch.cat([value for pair in ranks for value in pair[i]]) for i in (0, 1))
    return metrics_of(logits, labels)


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
    by_class: average precision of each class in percent, NaN for those without a positive image, which are
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
    return {"mAP": 0.0, "macro_f1": 0.0, **means, "loss": loss, "by_class": precisions}
