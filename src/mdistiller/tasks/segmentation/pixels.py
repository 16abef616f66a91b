"""Methods of logits on pixels, and the task loss of pixels."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from mdistiller.methods import LogitMethod, Method
from mdistiller.methods.base import Losses, Needs, promote
from mdistiller.tasks.segmentation.segmenter import AUX, LOGITS
from mdistiller.types import IGNORED, Batch, Outputs


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Scales a map [B, C, H, W] to a size (H, W), bilinear; it stays as it is where it has that size."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def resized_label(label: Tensor, size: tuple[int, ...]) -> Tensor:
    """Picks the labels [B, H, W] at the centers of the pixels of another size, [B, h, w]."""
    if label.shape[1:] == size:
        return label
    return F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def pixel_rows(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits [N, C] of both models and labels [N] of all pixels of the student's map, N = B·h·w.

    Ignored pixels are among them, so that shapes do not depend on values.

    Args:
        student: logits [B, C, h, w].
        teacher: logits [B, C, …], scaled to the student's size.
        label: int64 [B, H, W].
    """
    size = tuple(student.shape[2:])
    teacher = resized(promote(teacher), size)
    rows = (x.movedim(1, -1).flatten(0, 2) for x in (promote(student), teacher))
    return *rows, resized_label(label, size).flatten()  # type: ignore[return-value]


class PixelMethod(Method):
    """Makes a method of logits read pixels. Its means are over the pixels that have a class."""

    needs = Needs(labels=True)
    student_taps = teacher_taps = (LOGITS,)

    def __init__(self, base: LogitMethod) -> None:
        super().__init__(base.config)
        self.base, self.name = base, base.name
        self.needs = replace(self.needs, progress=base.needs.progress)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        s, t, label = pixel_rows(student.features[LOGITS], teacher.features[LOGITS], batch.label)
        return self.base(Outputs(s, {}), Outputs(t, {}), batch._replace(label=label), progress)


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Computes the mean cross-entropy of the pixels that have a class, 0 if none has, in nats.

    Args:
        logits: [B, C, h, w], scaled to the size of the labels.
        label: int64 [B, H, W], -100 for a pixel without a class.
    """
    scaled = resized(promote(logits), tuple(label.shape[1:]))
    total = F.cross_entropy(scaled, label, ignore_index=IGNORED, reduction="sum")
    return total / (label != IGNORED).sum().clamp(min=1)


def pixel_loss(outputs: Outputs, batch: Batch, *, aux_weight: float) -> dict[str, Tensor]:
    """Computes the task loss: `pixel_cross_entropy` of the classifier, and of the auxiliary one.

    `aux_weight` is the weight of the auxiliary classifier; 0: it is not read.
    """
    losses = {"task": pixel_cross_entropy(outputs.logits, batch.label)}
    if aux_weight:
        losses[AUX] = aux_weight * pixel_cross_entropy(outputs.features[AUX], batch.label)
    return losses
