r"""Multi-label logits distillation (Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang: ICCV 2023).

An image of several classes has no distribution over the classes. Each class has a two-way distribution of its
own, $(p_c, 1 - p_c)$ with $p_c = \mathrm{sigmoid}(z_c)$, and the student learns those of the teacher.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import LogitMethod, Logits, Losses, MethodConfig, Scalar
from mdistiller.methods.kd import divergence, soften
from mdistiller.methods.registry import register_method


def binary_kd_samples(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Computes the binary KD loss of each sample, [B], from logits [B, C]."""
    s, t = soften(student_logits, teacher_logits, temperature)
    terms = divergence(F.logsigmoid(t), F.logsigmoid(s)) + divergence(F.logsigmoid(-t), F.logsigmoid(-s))
    return terms.mean(1) * temperature**2


def binary_kd_loss(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> Scalar:
    r"""Computes the divergence of the two-way probabilities of each class, of student from teacher.

    $$\frac{T^2}{B C} \sum_b \sum_c \mathrm{KL}\big((p^T_{bc}, 1 - p^T_{bc}) \,\|\,
    (p^S_{bc}, 1 - p^S_{bc})\big), \quad p = \mathrm{sigmoid}(z / T)$$

    The loss is in nats. Errors: as `kd_loss`.

    Source: Yang et al., ICCV 2023, multi-label logits distillation (MLD), which sums over the classes and has
    no temperature.
    """
    return binary_kd_samples(student_logits, teacher_logits, temperature).mean()


class BinaryKDConfig(MethodConfig):
    """Hyper-parameters of binary KD."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the binary KD loss."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the probabilities of both models."""


@register_method("binary_kd")
class BinaryKD(LogitMethod):
    """Matches the teacher's probability of each class by itself, for images of several classes."""

    config: BinaryKDConfig
    takes_multi_label = True
    paper = "Yang et al.: Multi-Label Knowledge Distillation, ICCV 2023"
    use = "Images have several classes each"

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        return {"binary_kd": c.weight * binary_kd_samples(student_logits, teacher_logits, c.temperature)}
