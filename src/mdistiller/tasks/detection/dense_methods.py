r"""Methods that compare the predictions of dense detectors: BCKD and CrossKD.

BCKD, distillation as binary classification (Yang et al.: ICCV 2023, arXiv 2308.14286): detectors without
proposals are trained with a sigmoid for each class, so each class at each location is a two-class problem.
Boxes are compared where the class probabilities differ.

CrossKD, cross-head distillation (Wang, Chen, Zheng, Li, Cheng, Hou: CVPR 2024, arXiv 2306.11369): maps from
the student's head go through the rest of the teacher's head, and these predictions imitate the teacher's. The
student's own predictions learn from the labels alone, so the two targets do not contradict each other in one
place.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Losses, Method, MethodConfig, Needs, promote
from mdistiller.methods.features import check_shapes
from mdistiller.tasks.detection.adapter import Kind
from mdistiller.tasks.detection.levels import settled
from mdistiller.types import IGNORED, Batch, DataInfo, Outputs


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


def crosskd_box_loss(
    cross_boxes: Float[Tensor, "n 4"],
    teacher_boxes: Float[Tensor, "n 4"],
    teacher_logits: Float[Tensor, "n c"],
    count: Tensor | float,
) -> Float[Tensor, ""]:
    r"""Computes the distance of the boxes, weighted by the teacher's confidence.

    $$\frac{1}{\max(1, N)} \sum_n \max_c \sigma(z^T_{nc})\,\big(1 - \mathrm{GIoU}(b_n, b^T_n)\big)$$

    Args:
        cross_boxes: boxes of the teacher's head on the student's maps, [n, 4], x1, y1, x2, y2.
        teacher_boxes: the teacher's, [n, 4].
        teacher_logits: [n, C], before the sigmoid.
        count: N, the number of rows that are assigned to an object.

    Source: Wang et al., CVPR 2024; the weight is of the authors' code.
    """
    weight = promote(teacher_logits).sigmoid().amax(1)
    return weighted_box_loss(cross_boxes, teacher_boxes, weight, count)


class CrossKDConfig(MethodConfig):
    """Hyperparameters of CrossKD. Those that are None are the authors' for the kind of the student."""

    own_name = "crosskd"

    weight: float | None = Field(default=None, ge=0)
    """Weight of the distillation of classes. None: 1; 0.4 with points."""
    box_weight: float | None = Field(default=None, ge=0)
    """Weight of the distillation of boxes. None: 1; 0.75 with points."""
    hold: int | None = Field(default=None, ge=1)
    """Number of the convolution of the student's head whose output enters the teacher's head. None: 3; 2 with
    points."""

    by_kind: ClassVar[dict[Kind, dict[str, float]]] = {
        "anchors": {"weight": 1.0, "box_weight": 1.0, "hold": 3},
        "points": {"weight": 0.4, "box_weight": 0.75, "hold": 2},
    }


class CrossKD(Method):
    """Matches the predictions of the teacher's head on the student's maps with the teacher's own."""

    Config = CrossKDConfig
    config: CrossKDConfig
    name = "crosskd"
    card = Card(
        "Wang, Chen, Zheng, Li, Cheng, Hou: CrossKD: Cross-Head Knowledge Distillation for Object Detection, "
        "CVPR 2024",
    )
    needs = Needs(one_class=False)
    reads_logits: ClassVar[bool] = True
    teacher_taps = ("boxes", "cross_logits", "cross_boxes")

    def __init__(
        self, config: CrossKDConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        self.settled = settled(config, student)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        count = (batch.label > 0).sum()
        # As in the detector's own loss, some anchors count as neither object nor background.
        keep = (batch.label != IGNORED)[:, None]
        cross = torch.where(keep, promote(teacher.features["cross_logits"]), 0.0)
        classes = bckd_loss(cross, torch.where(keep, teacher.logits, 0.0), count)
        boxes = teacher.features["cross_boxes"], teacher.features["boxes"]
        # Their confidence is zero.
        confident = torch.where(keep, teacher.logits, -torch.inf)
        return {
            "crosskd": self.settled["weight"] * classes,
            "crosskd_boxes": self.settled["box_weight"] * crosskd_box_loss(*boxes, confident, count),
        }
