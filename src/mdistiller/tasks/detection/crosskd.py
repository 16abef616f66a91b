r"""Cross-head distillation (Wang, Chen, Zheng, Li, Cheng, Hou: CVPR 2024, arXiv 2306.11369).

Maps from the student's head go through the rest of the teacher's head, and these predictions imitate the
teacher's. The student's own predictions learn from the labels alone, so the two targets do not contradict
each other in one place.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Losses, Method, MethodConfig, Needs, promote
from mdistiller.tasks.detection.adapter import Kind
from mdistiller.tasks.detection.bckd import bckd_loss, weighted_box_loss
from mdistiller.tasks.detection.levels import settled
from mdistiller.types import IGNORED, Batch, DataInfo, Outputs


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
