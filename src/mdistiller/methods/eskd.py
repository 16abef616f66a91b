"""Early-stopped KD (Cho, Hariharan: On the Efficacy of Knowledge Distillation, ICCV 2019).

The paper finds that a small student cannot follow a large, fully trained teacher, and mends it by stopping
early: the teacher's training (a checkpoint of an early epoch is the better teacher), and the distillation
itself, after which the student goes on with the labels alone.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mdistiller.methods.kd import KD, KDConfig
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs


class ESKDConfig(KDConfig):
    """Hyper-parameters of ESKD: those of KD, and when to stop."""

    stop: float = Field(default=1.0, gt=0, le=1)
    """Fraction of training after which the KD loss is dropped; 1 keeps it to the end."""


@register_method("eskd")
class ESKD(KD):
    """KD from a teacher of an early epoch (`--teacher.checkpoint RUN/student-eN.safetensors`)."""

    Config = ESKDConfig
    config: ESKDConfig
    paper = "Cho, Hariharan: On the Efficacy of Knowledge Distillation, ICCV 2019"
    year = 2019

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """`{"task": …, "kd": …}`; "kd" is zero once `progress` has reached `stop`, unless that is 1."""
        losses = super().forward(student, teacher, batch, progress)
        if self.config.stop < 1:
            losses["kd"] = losses["kd"] * (progress < self.config.stop)
        return losses
