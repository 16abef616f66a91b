"""Mean intersection over union of segmentation models, from the confusion matrix of all pixels."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mdistiller.methods.base import promote
from mdistiller.tasks.segmentation.data import SegmentationSet
from mdistiller.tasks.segmentation.pixels import resized
from mdistiller.teacher import EvalMode
from mdistiller.training.distributed import World
from mdistiller.training.precision import autocast
from mdistiller.types import IGNORED, Batch, Line


def confusion(predicted: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by true class (rows) and predicted class, int64 [C, C], without those of -100."""
    known = label != IGNORED
    pairs = torch.where(known, label * num_classes + predicted, num_classes**2)
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].unflatten(0, (num_classes, num_classes))


def metrics_of(matrix: Tensor, classes: tuple[str, ...]) -> Line:
    """Computes metrics in percent from a confusion matrix [C, C] of pixels, true classes in rows.

    mIoU: mean over the classes of the intersection over union of true and predicted pixels.
    pixel_accuracy: pixels of the right class.
    mean_accuracy: mean over the classes of their pixels of the right class.
    classes: intersection over union by name; None, and no part in the mean, for a class that no pixel has and
        none is predicted to have.
    """
    counts = matrix.double().cpu()
    hits, true, found = counts.diag(), counts.sum(1), counts.sum(0)
    iou, accuracy = 100 * hits / (true + found - hits), 100 * hits / true
    return {
        "mIoU": iou.nanmean().item(),
        "pixel_accuracy": (100 * hits.sum() / counts.sum().clamp(min=1)).item(),
        "mean_accuracy": accuracy.nanmean().item(),
        "classes": {n: v if v == v else None for n, v in zip(classes, iou.tolist(), strict=True)},
    }


def evaluate_segmenter(
    model: nn.Module,
    batches: Iterable[Batch],
    images: SegmentationSet,
    world: World,
    *,
    precision: torch.dtype = torch.float32,
) -> Line:
    """Computes the metrics of a model, the same in every process; see `metrics_of`.

    Logits are scaled to the size of the masks, and the class of a pixel is that of its largest logit.

    Args:
        model: a model whose call returns logits [B, C, h, w]; it is put back into its own mode.
        batches: this process's share of the images, labels int64 [B, H, W].
        images: the set, whose classes are in the order of the logits.
        world: this process.
        precision: of autocast.
    """
    classes = images.classes
    total = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=world.device)
    with torch.no_grad(), EvalMode(model.modules()):
        for batch in batches:
            with autocast(world.device, precision):
                logits = model(batch.image)
            predicted = classify(logits, tuple(batch.label.shape[1:]))
            total += confusion(predicted, batch.label, len(classes))
    return metrics_of(world.sum(total), classes)


def classify(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Returns the likeliest class of each pixel, int64 [B, *size], of logits [B, C, h, w]."""
    return resized(promote(logits), size).argmax(1)
