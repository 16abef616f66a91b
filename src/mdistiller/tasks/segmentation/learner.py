"""The module that trains: a segmentation model with its method."""

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.methods import Method
from mdistiller.methods.base import promote
from mdistiller.models.external import tap_points
from mdistiller.student_with_method import StepOutput, StudentWithMethod
from mdistiller.taps import TappedModel
from mdistiller.tasks.segmentation.pixels import resized
from mdistiller.tasks.segmentation.segmenter import AUX
from mdistiller.types import IGNORED, Batch, Outputs


def pixel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Computes the mean cross-entropy of the pixels that have a class, 0 if none has, in nats.

    Args:
        logits: [B, C, h, w], scaled to the size of the labels.
        label: int64 [B, H, W], -100 for a pixel without a class.
    """
    scaled = resized(promote(logits), tuple(label.shape[1:]))
    total = F.cross_entropy(scaled, label, ignore_index=IGNORED, reduction="sum")
    return total / (label != IGNORED).sum().clamp(min=1)


class SegmentationStudentWithMethod(StudentWithMethod):
    """Segmentation model and method: everything that trains, and is wrapped in DDP.

    Args:
        student: the model, which is `student.model` of this module.
        method: the method.
        aux_weight: weight of the cross-entropy of the model's auxiliary classifier, if it has one.
    """

    def __init__(self, student: nn.Module, method: Method, aux_weight: float) -> None:
        nn.Module.__init__(self)
        self.aux_weight = aux_weight if AUX in tap_points(student) else 0.0
        taps = (*method.student_taps, AUX) if self.aux_weight else method.student_taps
        self.student, self.method = TappedModel(student, taps), method

    def forward(self, batch: Batch, teacher: Outputs, progress: Tensor) -> StepOutput:
        """Computes the losses of a prepared batch; `progress` is 0-d, the fraction of training done."""
        outputs = self.student(batch.image)
        weight = self.method.config.task_weight
        task = {"task": weight * pixel_cross_entropy(outputs.logits, batch.label)}
        if self.aux_weight:
            aux = pixel_cross_entropy(outputs.features[AUX], batch.label)
            task[AUX] = weight * self.aux_weight * aux
        return StepOutput(task, self.distillation_losses(outputs, teacher, batch, progress), outputs.logits)
