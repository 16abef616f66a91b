r"""Transformed teacher matching, and its weighted form (Zheng, Yang: ICLR 2024, arXiv 2402.11148).

Dividing logits by a temperature $T$ is raising probabilities to the power $\gamma = 1/T$ and normalising.
TTM transforms the teacher alone, and matches it with the student's plain probabilities; against KD this
adds a Rényi entropy of the student, which regularises. WTTM also weighs each sample by
$U_\gamma(p^T) = \sum_i (p^T_i)^\gamma$, which is larger the smoother the teacher's distribution is.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import LogitMethod, MethodConfig
from mdistiller.methods.kd import soften
from mdistiller.methods.registry import register_method


def ttm_samples(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The TTM loss of each sample, and its weight in WTTM, the power sum of the teacher: [B] each."""
    student, teacher = soften(student_logits, teacher_logits, 1.0)
    if not gamma > 0:
        raise ConfigError(f"gamma must be positive; got {gamma}")
    power = gamma * teacher.log_softmax(1)
    log_sum = power.logsumexp(1, keepdim=True)
    terms = F.kl_div(student.log_softmax(1), power - log_sum, reduction="none", log_target=True)
    return terms.sum(1), log_sum[:, 0].exp()


def ttm_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    gamma: float = 0.1,
) -> Float[Tensor, ""]:
    r"""Divergence of the student's probabilities from the teacher's power-transformed ones.

    $$\frac1B \sum_b \mathrm{KL}\big(p^{T,\gamma}_b \,\|\, p^S_b\big), \quad
    p^{T,\gamma}_i = \frac{(p^T_i)^\gamma}{\sum_j (p^T_j)^\gamma}, \quad p = \sigma(z)$$

    The transformed teacher is $\sigma(\gamma z^T)$, so the loss is zero where $z^S = \gamma z^T$.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C], detached.
        gamma: exponent > 0, the inverse of a temperature of the teacher alone.

    Returns:
        A scalar: the mean over the batch, in nats.

    Raises:
        ConfigError: shapes that differ or are not [B, C], C ≥ 2; a gamma that is not positive.

    Source: Zheng and Yang, ICLR 2024, section 3.
    """
    return ttm_samples(student_logits, teacher_logits, gamma)[0].mean()


def wttm_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    gamma: float = 0.2,
) -> Float[Tensor, ""]:
    r"""TTM, each sample weighed by how smooth the teacher's probabilities are.

    $$\frac1B \sum_b U_\gamma(p^T_b)\,\mathrm{KL}\big(p^{T,\gamma}_b \,\|\, p^S_b\big), \quad
    U_\gamma(p) = \sum_i p_i^\gamma$$

    For γ < 1 the weight lies between 1 (a certain teacher) and $C^{1-\gamma}$ (a uniform one).

    Arguments, errors: as `ttm_loss`.

    Source: Zheng and Yang, ICLR 2024, section 4.
    """
    loss, weight = ttm_samples(student_logits, teacher_logits, gamma)
    return (weight * loss).mean()


class TTMConfig(MethodConfig):
    """Hyper-parameters of TTM; the defaults are the authors' example, vgg13 → vgg8 on CIFAR-100."""

    weight: float = Field(default=45.0, ge=0)
    """Weight of the TTM loss."""
    gamma: float = Field(default=0.1, gt=0)
    """Exponent of the teacher's probabilities: one over its temperature."""


class WTTMConfig(MethodConfig):
    """Hyper-parameters of WTTM; the defaults are the authors' example, vgg13 → vgg8 on CIFAR-100."""

    weight: float = Field(default=4.0, ge=0)
    """Weight of the WTTM loss."""
    gamma: float = Field(default=0.2, gt=0)
    """Exponent of the teacher's probabilities: one over its temperature."""


@register_method("ttm")
class TTM(LogitMethod):
    """Match the teacher's power-transformed probabilities with the student's plain ones."""

    Config = TTMConfig
    config: TTMConfig
    paper = "Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024"
    year = 2024

    def sample_losses(
        self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor
    ) -> dict[str, Tensor]:
        """`{"ttm": …}`."""
        loss, _ = ttm_samples(student_logits, teacher_logits, self.config.gamma)
        return {"ttm": self.config.weight * loss}


@register_method("wttm")
class WTTM(LogitMethod):
    """TTM with more weight on samples where the teacher's probabilities are smooth."""

    Config = WTTMConfig
    config: WTTMConfig
    paper = TTM.paper
    year = 2024

    def sample_losses(
        self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor
    ) -> dict[str, Tensor]:
        """`{"wttm": …}`."""
        loss, weight = ttm_samples(student_logits, teacher_logits, self.config.gamma)
        return {"wttm": self.config.weight * weight * loss}
