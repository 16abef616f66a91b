r"""Binary classification distillation for one-stage detectors.

Yang, Zhou, Li, Chen, Hou, Ye: Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object
Detection, ICCV 2023, arXiv 2308.14286. Its classification part: one-stage detectors are trained with a
sigmoid for each class, so each class at each location is a two-class problem of its own.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Method, MethodConfig, promote
from mdistiller.types import Batch, Outputs


def bckd_loss(
    student_logits: Float[Tensor, "n c"], teacher_logits: Float[Tensor, "n c"]
) -> Float[Tensor, ""]:
    r"""Binary cross-entropy of the student's class probabilities with the teacher's, where they disagree.

    $$\frac{\sum_{n,c} |p^T_{nc} - p^S_{nc}|\;\mathrm{BCE}(p^S_{nc}, p^T_{nc})}
    {\max(1, \sum_n \max_c p^T_{nc})}, \quad p = \sigma(z)$$

    Args:
        student_logits: [N, C], one row for each location or anchor, before the sigmoid.
        teacher_logits: [N, C].

    Returns:
        A scalar. The sum is divided by how many objects' locations the teacher sees: the sum over locations
        of its highest probability.

    Raises:
        ConfigError: logits of different shapes or not [N, C].

    Source: Yang et al., ICCV 2023, binary classification distillation loss. The gradient goes through the
    weight too, as in the authors' code; the divisor is this package's.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ConfigError(
            f"student and teacher logits must have one shape [N, C]; "
            f"got {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    student, target = promote(student_logits), promote(teacher_logits).sigmoid()
    weight = (target - student.sigmoid()).abs()
    loss = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (weight * loss).sum() / target.amax(1).sum().clamp(min=1)


class BCKDConfig(MethodConfig):
    """Hyper-parameters of BCKD."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the distillation loss."""


class BCKD(Method):
    """Match the class probabilities of a one-stage detector at every location, each class for itself."""

    Config = BCKDConfig
    config: BCKDConfig
    name = "bckd"
    paper = (
        "Yang, Zhou, Li, Chen, Hou, Ye: Bridging Cross-task Protocol Inconsistency for Distillation in Dense "
        "Object Detection, ICCV 2023"
    )
    year = 2023

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """`{"task": …, "bckd": …}`."""
        loss = bckd_loss(student.logits, teacher.logits)
        return {"task": self.task_loss(student, batch), "bckd": self.config.weight * loss}


BCKDConfig.method_name = BCKD.name
