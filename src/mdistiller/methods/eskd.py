"""Early-stopped KD (Cho, Hariharan: On the Efficacy of Knowledge Distillation, ICCV 2019).

A small student cannot match a large, fully trained teacher. The paper therefore takes the teacher from an
early epoch, and stops the distillation before the end of training.
"""

from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Example, Losses
from mdistiller.methods.kd import KD, KDConfig
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


class ESKDConfig(KDConfig):
    """Hyperparameters of ESKD."""

    stop: float = Field(default=1.0, gt=0, le=1)
    """Fraction of training after which the KD loss is dropped; 1 keeps it."""


@register_method("eskd")
class ESKD(KD):
    """Applies KD with a teacher of an early epoch (`--teacher.checkpoint RUN/student-eN.safetensors`)."""

    Config = ESKDConfig
    config: ESKDConfig
    card = Card(
        "Cho, Hariharan: On the Efficacy of Knowledge Distillation, ICCV 2019",
        "A better teacher made a worse student: use an early checkpoint (`--save-epochs`)",
        example=Example(),
    )

    def __init__(self, config: ESKDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        self.needs = replace(self.needs, progress=config.stop < 1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = super().forward(student, teacher, batch, progress)
        if self.config.stop < 1:
            losses["kd"] = losses["kd"] * (progress < self.config.stop)
        return losses
