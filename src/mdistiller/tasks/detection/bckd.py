r"""Binary classification distillation for one-stage detectors.

One-stage detectors are trained with a sigmoid for each class, so each class at each location is a two-class
problem. This is the classification part of Yang, Zhou, Li, Chen, Hou, Ye: ICCV 2023, arXiv 2308.14286.
"""

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Losses, Method, MethodConfig, promote
from mdistiller.types import Batch, Outputs


def bckd_loss(
    student_logits: Float[Tensor, "n c"], teacher_logits: Float[Tensor, "n c"]
) -> Float[Tensor, ""]:
    r"""Computes the binary cross-entropy with the teacher's probabilities, weighted by the disagreement.

    $$\frac{\sum_{n,c} |p^T_{nc} - p^S_{nc}|\;\mathrm{BCE}(p^S_{nc}, p^T_{nc})}
    {\max(1, \sum_n \max_c p^T_{nc})}, \quad p = \sigma(z)$$

    Args:
        student_logits: [N, C], one row for each location or anchor, before the sigmoid.
        teacher_logits: [N, C].

    Returns:
        A scalar. The divisor, the sum over locations of the teacher's highest probability, estimates the
        number of locations with an object.

    Raises:
        ConfigError: logits of different shapes or not [N, C].

    Source: Yang et al., ICCV 2023, binary classification distillation loss. The weight has a gradient too,
    as in the authors' code; the divisor is this package's.
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

    method_name = "bckd"

    weight: float = Field(default=1.0, ge=0)
    """Weight of the distillation loss."""


class BCKD(Method):
    """Matches the class probabilities of a one-stage detector at every location, class by class."""

    config: BCKDConfig
    name = "bckd"
    paper = (
        "Yang, Zhou, Li, Chen, Hou, Ye: Bridging Cross-task Protocol Inconsistency for Distillation in Dense "
        "Object Detection, ICCV 2023"
    )
    year = 2023

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        return {"bckd": self.config.weight * bckd_loss(student.logits, teacher.logits)}
