"""Task losses, functions of the student's outputs and the batch; dense predictions as rows."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import count_labeled, promote
from mdistiller.types import IGNORED, Batch, Inputs, Outputs

TaskLoss = Callable[[Outputs, Batch], Tensor | dict[str, Tensor]]
"""Computes the scalar task loss from the student's outputs and the batch, or several by name."""


def cross_entropy(
    label_smoothing: float = 0.0, *, weights: Tensor | None = None, has_unlabeled: bool = False
) -> TaskLoss:
    """Returns the task loss of classification: mean cross-entropy with the labels, in at least float32.

    Args:
        label_smoothing: share of the uniform distribution in the labels.
        weights: weight of each class, float [C]. The loss is −(1/B) Σ_b Σ_c w_c y_bc log p_bc.
        has_unlabeled: batches may have images without a class (label -100), which do not count in B.
    """
    if weights is not None or has_unlabeled:
        return _CrossEntropy(label_smoothing, weights)
    return partial(_plain_cross_entropy, label_smoothing)


def _plain_cross_entropy(label_smoothing: float, outputs: Outputs, batch: Batch) -> Tensor:
    loss = F.cross_entropy(promote(outputs.logits), batch.label, label_smoothing=label_smoothing)
    # The mean over no image is NaN.
    return loss if batch.label.is_floating_point() else loss.where((batch.label != IGNORED).any(), 0.0)


class _CrossEntropy(nn.Module):
    """Cross-entropy with weights of classes, over the images that have a class: 0 if there are none."""

    weights: Tensor | None

    def __init__(self, label_smoothing: float, weights: Tensor | None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, label, smoothing = promote(outputs.logits), batch.label, self.label_smoothing
        count = count_labeled(label).clamp(min=1)
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


def as_rows(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    predict_next: bool = False,
    is_known: bool = False,
    reads_labels: bool = True,
) -> tuple[Outputs, Outputs, Batch]:
    """Makes a row of each position of dense predictions, so that losses of [B, classes] take them.

    Logits are [B, C, H, W] or [B, T, C], the teacher's likewise, and labels int64 [B, H, W] or [B, T], or
    float of the logits' shape. With `predict_next`, a position's label is that of the next one, and the last
    position has none. Features stay as they are. The classes may also be last before H and W, or before T,
    as the shape of the labels says; where both fit, only logits of a form that `is_known` are taken. Unless a
    loss `reads_labels`, a batch may be unlabeled (-100 for each sample): then every position counts, or
    those of the inputs' `attention_mask` if there is one.

    Raises:
        ConfigError: logits and labels, or the logits of student and teacher, of other positions; an axis of
            classes that is not known; labels of a language model that are no class ids.
    """
    shape, label = student.logits.shape, batch.label
    if not reads_labels and label.ndim == 1 and bool((label == IGNORED).all()):
        label = _positions(batch.image, student.logits, is_known=is_known or predict_next)
    if predict_next:
        if label.is_floating_point() or label.ndim != 2:
            raise ConfigError(
                "a causal language model needs a target of class ids int64 [B, T], the tokens of the input, "
                f"each of which it predicts one position earlier; got {label.dtype} {list(label.shape)}"
            )
        label = F.pad(label[:, 1:], (0, 1), value=IGNORED)
    first, last = (shape[0], *shape[2:]), shape[:-1]  # the positions, with the classes after B or at the end
    fits = {1: first, len(shape) - 1: last}
    if label.is_floating_point() and label.shape == shape:
        axis = 1 if len(shape) > 3 else len(shape) - 1
    else:
        found = [axis for axis, labels in fits.items() if label.shape == labels]
        if not found:
            raise ConfigError(
                f"logits {list(shape)} and target {list(label.shape)}: a target for each position is "
                f"int64 {list(first)} or {list(last)}; scale logits of another size, or average them to "
                "[B, classes], by Distiller(..., logits_of=function)"
            )
        if len(found) > 1 and not (predict_next or is_known):
            forms = ("[B, C, H, W]", "movedim(-1, 1)") if len(shape) > 3 else ("[B, T, C]", "mT")
            raise ConfigError(
                f"logits {list(shape)} have as many positions as classes, so it is not known which axis has "
                f"the classes: say that they are {forms[0]} by Distiller(..., logits_of=lambda out: out), or "
                f"make them so by logits_of=lambda out: out.{forms[1]}"
            )
        axis = found[0] if len(shape) > 3 else found[-1]
    has_teacher = teacher.logits.ndim > 1
    if has_teacher:
        own = teacher.logits.shape
        if len(own) != len(shape) or any(own[i] != shape[i] for i in range(len(shape)) if i != axis):
            raise ConfigError(
                f"logits of the student {list(shape)} and of the teacher {list(own)} are of other positions: "
                "scale them to one size by Distiller(..., logits_of=function)"
            )

    def rows(x: Tensor) -> Tensor:
        return x.movedim(axis, -1).flatten(0, -2)

    label = rows(label) if label.shape == shape else label.flatten()
    return (
        student._replace(logits=rows(student.logits)),
        teacher._replace(logits=rows(teacher.logits)) if has_teacher else teacher,
        batch._replace(label=label),
    )


def _positions(inputs: Inputs, logits: Tensor, *, is_known: bool) -> Tensor:
    """Returns a label for each position of logits: 0, and -100 where the inputs' `attention_mask` is 0."""
    shape = logits.shape
    if not is_known:
        raise ConfigError(
            f"logits {list(shape)} without a target: the class axis is unknown; declare "
            "[B, T, C] or [B, C, H, W] by Distiller(..., logits_of=lambda out: out)"
        )
    label = logits.new_zeros((shape[0], *shape[2:]) if len(shape) > 3 else shape[:-1], dtype=torch.int64)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None:
        return label
    if mask.shape != label.shape:
        raise ConfigError(
            f"attention_mask {list(mask.shape)}, and logits at the positions {list(label.shape)}: without a "
            "target the mask says which positions count; allowed: one shape, or a target"
        )
    return label.masked_fill(mask == 0, IGNORED)


def labeled_rows(student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Outputs, Outputs, Batch, Tensor]:
    """Drops the rows of `as_rows` that have no class, such as padding in a text.

    Returns also whether any row has a class, a 0-d bool tensor. If none has, all rows stay, with label 0: a
    mean over no row would be NaN.
    """
    found = batch.label != IGNORED
    has_class = found.any()
    kept = (found | ~has_class).nonzero().squeeze(1)  # once, as a GPU waits for the number of rows
    batch = batch._replace(label=batch.label.masked_fill(~found, 0)[kept])
    student, teacher = (
        x._replace(logits=x.logits[kept]) if x.logits.ndim > 1 else x for x in (student, teacher)
    )
    return student, teacher, batch, has_class
