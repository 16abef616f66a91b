"""Task losses: of the student's logits and the labels alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.methods.base import count_labelled, promote
from mdistiller.types import IGNORED, Batch, Outputs

TaskLoss = Callable[[Outputs, Batch], Tensor]
"""The student's outputs and the batch to the scalar task loss."""


def cross_entropy(
    label_smoothing: float = 0.0, *, weights: Tensor | None = None, has_unlabelled: bool = False
) -> TaskLoss:
    """Returns the task loss of classification: mean cross-entropy with the labels, in at least float32.

    Args:
        label_smoothing: share of the uniform distribution in the labels.
        weights: weight of each class, float [C]. The loss is −(1/B) Σ_b Σ_c w_c y_bc log p_bc.
        has_unlabelled: batches may have images without a class (label -100), which do not count in B.
    """
    if weights is not None or has_unlabelled:
        return _CrossEntropy(label_smoothing, weights)

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        return F.cross_entropy(logits, batch.label, label_smoothing=label_smoothing)

    return loss


class _CrossEntropy(nn.Module):
    """Cross-entropy with weights of classes, over the images that have a class: 0 if there are none."""

    weights: Tensor | None

    def __init__(self, label_smoothing: float, weights: Tensor | None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, label, smoothing = promote(outputs.logits), batch.label, self.label_smoothing
        count = count_labelled(label).clamp(min=1)
        if label.is_floating_point() and smoothing:  # PyTorch's would give an image without a class a loss
            label = (1 - smoothing) * label + smoothing / label.shape[1] * label.sum(1, keepdim=True)
            smoothing = 0.0
        losses = F.cross_entropy(
            logits, label, self.weights, reduction="none", label_smoothing=smoothing, ignore_index=IGNORED
        )
        return losses.sum() / count


def binary_cross_entropy(outputs: Outputs, batch: Batch) -> Tensor:
    """Computes the task loss of images with several classes: the mean over images and classes, in nats.

    Labels are float [B, C] in [0, 1]; those of -100 are left out of the mean.
    """
    logits = promote(outputs.logits)
    known = batch.label != IGNORED
    losses = F.binary_cross_entropy_with_logits(logits, batch.label.to(logits.dtype), reduction="none")
    return losses.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)
