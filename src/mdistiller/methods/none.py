"""No distillation: the student alone, the baseline of every table."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mdistiller.methods.base import Method, MethodConfig
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs


class NoneConfig(MethodConfig):
    """Only what every method has."""


@register_method("none")
class NoDistillation(Method):
    """Cross-entropy with the labels and nothing else."""

    Config = NoneConfig
    paper = "none: training on the labels alone"
    kind = "task"
    needs_teacher: ClassVar[bool] = False

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """`{"task": cross-entropy}`."""
        return {"task": self.task_loss(student, batch)}
