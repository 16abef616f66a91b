"""Knowledge distillation (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import LogitMethod, MethodConfig, promote
from mdistiller.methods.registry import register_method


def soften(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both logits over the temperature, in at least float32; the checks of every logit loss.

    Raises:
        ConfigError: shapes that differ or are not [B, C] with C ≥ 2, or a temperature that is not positive.
    """
    if (
        student_logits.shape != teacher_logits.shape
        or student_logits.ndim != 2
        or student_logits.shape[1] < 2
    ):
        raise ConfigError(
            f"student and teacher logits must have one shape [B, C], C ≥ 2; "
            f"got {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive; got {temperature}")
    return promote(student_logits) / temperature, promote(teacher_logits) / temperature


def kd_samples(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The KD loss of each sample, [B]."""
    student, teacher = soften(student_logits, teacher_logits, temperature)
    terms = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    return terms.sum(1) * temperature**2


def kd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence of the student's from the teacher's softened class probabilities.

    $$\frac{T^2}{B} \sum_b \mathrm{KL}\big(\sigma(z^T_b / T) \,\|\, \sigma(z^S_b / T)\big)$$

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C], detached: the loss has a gradient for them, too, and would train the teacher.
        temperature: T > 0; the factor T² keeps the gradient's scale independent of it.

    Returns:
        A scalar: the mean over the batch, in nats.

    Raises:
        ConfigError: shapes that differ or are not [B, C], C ≥ 2; a temperature that is not positive.

    Source: Hinton et al. 2015, section 2.
    """
    return kd_samples(student_logits, teacher_logits, temperature).mean()


class KDConfig(MethodConfig):
    """Hyper-parameters of KD; the defaults are the field's for CIFAR-100."""

    task_weight: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy with the labels."""
    weight: float = Field(default=0.9, ge=0)
    """Weight of the KD loss."""
    temperature: float = Field(default=4.0, gt=0)
    """Softens both probability distributions."""


@register_method("kd")
class KD(LogitMethod):
    """Match the teacher's softened class probabilities."""

    Config = KDConfig
    config: KDConfig
    paper = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015"
    year = 2015

    def sample_losses(
        self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor
    ) -> dict[str, Tensor]:
        """`{"kd": …}`."""
        c = self.config
        return {"kd": c.weight * kd_samples(student_logits, teacher_logits, c.temperature)}
