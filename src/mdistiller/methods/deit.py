"""DeiT: distillation through a token (Touvron et al.: ICML 2021, arXiv 2012.12877)."""

from dataclasses import replace

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Example, LogitMethod, Logits, Losses, MethodConfig, Scalar
from mdistiller.methods.kd import kd_samples, soften
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def _samples(student_logits: Tensor, teacher_logits: Tensor, hard: bool, temperature: float) -> Tensor:
    if not hard:
        return kd_samples(student_logits, teacher_logits, temperature)
    student, teacher = soften(student_logits, teacher_logits, 1.0)
    return F.cross_entropy(student, teacher.argmax(1), reduction="none")


def deit_loss(
    student_logits: Logits, teacher_logits: Logits, *, hard: bool = True, temperature: float = 3.0
) -> Scalar:
    r"""Computes the cross-entropy with the teacher's decisions (hard), or the KD loss (soft).

    $$\frac1B \sum_b -\log \sigma(z^S_b)_{y_b}, \quad y_b = \arg\max_c z^T_{bc} \qquad \text{or} \qquad
    \frac{T^2}{B} \sum_b \mathrm{KL}\big(\sigma(z^T_b / T) \,\|\, \sigma(z^S_b / T)\big)$$

    The student's logits are those of its distillation token. The hard loss has no gradient for the teacher,
    and no temperature. Errors: as `kd_loss`.

    Source: Touvron et al., ICML 2021, equations 2 and 3.
    """
    return _samples(student_logits, teacher_logits, hard, temperature).mean()


class DeiTConfig(MethodConfig):
    """Hyperparameters of DeiT; the defaults are the paper's for hard distillation."""

    task_weight: float = Field(default=0.5, ge=0)
    """Weight of the task loss; 0.9 in the paper's soft distillation."""
    weight: float = Field(default=0.5, ge=0)
    """Weight of the distillation loss; 0.1 in the paper's soft distillation."""
    hard: bool = True
    """Learn the teacher's most likely class; otherwise its softened probabilities."""
    temperature: float = Field(default=3.0, gt=0)
    """Temperature of soft distillation."""


@register_method("deit")
class DeiT(LogitMethod[DeiTConfig]):
    """Teaches the student's distillation token the teacher's decisions, and its class token the labels.

    A student without a second classifier (`head_dist` in timm) learns both with its only logits.
    """

    Config = DeiTConfig
    card = Card(
        "Touvron et al.: Training data-efficient image transformers & distillation through attention, "
        "ICML 2021",
        "The student has a distillation token; other students learn the teacher's hard labels",
        example=Example(),
    )

    def __init__(
        self, config: DeiTConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        for path, module in student.named_modules():
            if path.endswith(("head_dist", "heads_dist")) and any(True for _ in module.parameters()):
                self.student_taps = (path.removesuffix("_dist"), path)
                self.needs = replace(self.needs, task_tap=self.student_taps[0])

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        return {"deit": c.weight * _samples(student_logits, teacher_logits, c.hard, c.temperature)}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        if self.student_taps:
            student = student._replace(logits=student.features[self.student_taps[1]])
        return super().forward(student, teacher, batch, progress)
