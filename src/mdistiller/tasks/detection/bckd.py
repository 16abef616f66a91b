r"""Distillation of dense detectors as binary classification (Yang et al.: ICCV 2023, arXiv 2308.14286).

Detectors without proposals are trained with a sigmoid for each class, so each class at each location is a
two-class problem. Boxes are compared where the class probabilities differ.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, Losses, Method, MethodConfig, Needs, promote
from mdistiller.methods.features import check_shapes
from mdistiller.types import IGNORED, Batch, Outputs


def bckd_loss(
    student_logits: Float[Tensor, "n c"], teacher_logits: Float[Tensor, "n c"], count: Tensor | float
) -> Float[Tensor, ""]:
    r"""Computes the binary cross-entropy with the teacher's probabilities, weighted by the disagreement.

    $$\frac{1}{\max(1, N)} \sum_{n,c} |p^T_{nc} - p^S_{nc}|\;\mathrm{BCE}(p^S_{nc}, p^T_{nc}),
    \quad p = \sigma(z)$$

    Args:
        student_logits: [n, C], one row for each location or anchor, before the sigmoid.
        teacher_logits: [n, C].
        count: N, the number of rows that are assigned to an object.

    Returns:
        A scalar.

    Raises:
        ConfigError: logits of different shapes or not [n, C].

    Source: Yang et al., ICCV 2023, binary classification distillation loss. The weight has a gradient too,
    as in the authors' code.
    """
    check_shapes(student_logits, teacher_logits, "n, C", "student and teacher logits")
    student, target = promote(student_logits), promote(teacher_logits).sigmoid()
    weight = (target - student.sigmoid()).abs()
    loss = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (weight * loss).sum() / torch.as_tensor(count).clamp(min=1)


def bckd_box_loss(
    student_boxes: Float[Tensor, "n 4"],
    teacher_boxes: Float[Tensor, "n 4"],
    student_logits: Float[Tensor, "n c"],
    teacher_logits: Float[Tensor, "n c"],
    count: Tensor | float,
) -> Float[Tensor, ""]:
    r"""Computes the distance of the boxes, weighted by the disagreement about the class.

    $$\frac{1}{\max(1, N)} \sum_n \max_c |p^T_{nc} - p^S_{nc}|\;\big(1 - \mathrm{GIoU}(b^S_n, b^T_n)\big)$$

    Args:
        student_boxes: [n, 4], x1, y1, x2, y2.
        teacher_boxes: [n, 4].
        student_logits: [n, C], before the sigmoid; the weight has no gradient.
        teacher_logits: [n, C].
        count: N, the number of rows that are assigned to an object.

    Returns:
        A scalar.

    Raises:
        ConfigError: logits of different shapes or not [n, C].

    Source: Yang et al., ICCV 2023, IoU-based localisation distillation loss, with the generalized IoU of the
    authors' code.
    """
    check_shapes(student_logits, teacher_logits, "n, C", "student and teacher logits")
    with torch.no_grad():
        weight = (promote(teacher_logits).sigmoid() - promote(student_logits).sigmoid()).abs().amax(1)
    return weighted_box_loss(student_boxes, teacher_boxes, weight, count)


def weighted_box_loss(boxes: Tensor, targets: Tensor, weight: Tensor, count: Tensor | float) -> Tensor:
    """Sums 1 - GIoU of boxes [n, 4], each times its weight [n], and divides by the count, at least 1."""
    from torchvision.ops import generalized_box_iou_loss

    distance: Tensor = generalized_box_iou_loss(promote(boxes), promote(targets))
    return (weight * distance).sum() / torch.as_tensor(count).clamp(min=1)


class BCKDConfig(MethodConfig):
    """Hyperparameters of BCKD; the defaults are the authors'."""

    own_name = "bckd"

    weight: float = Field(default=1.0, ge=0)
    """Weight of the distillation of classes."""
    box_weight: float = Field(default=4.0, ge=0)
    """Weight of the distillation of boxes; 0: boxes are not compared."""


class BCKD(Method):
    """Matches class probabilities and boxes of a dense detector at every location, class by class."""

    Config = BCKDConfig
    config: BCKDConfig
    name = "bckd"
    card = Card(
        "Yang, Zhou, Li, Chen, Hou, Ye: Bridging Cross-task Protocol Inconsistency for Distillation in Dense "
        "Object Detection, ICCV 2023",
    )
    needs = Needs(one_class=False)
    reads_logits: ClassVar[bool] = True

    def __init__(self, config: BCKDConfig, *models_and_data: object) -> None:
        super().__init__(config, *models_and_data)  # type: ignore[arg-type]
        if config.box_weight:
            self.student_taps = self.teacher_taps = ("boxes",)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        count = (batch.label > 0).sum()
        # As in the detector's own loss, some anchors count as neither object nor background.
        keep = (batch.label != IGNORED)[:, None]
        logits = torch.where(keep, student.logits, 0.0), torch.where(keep, teacher.logits, 0.0)
        losses = {"bckd": self.config.weight * bckd_loss(*logits, count)}
        if self.config.box_weight:
            boxes = student.features["boxes"], teacher.features["boxes"]
            losses["bckd_boxes"] = self.config.box_weight * bckd_box_loss(*boxes, *logits, count)
        return losses
