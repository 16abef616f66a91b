"""Transformed teacher matching, and its weighted form (Zheng, Yang: ICLR 2024, arXiv 2402.11148).

A temperature raises probabilities to a power and normalizes them. TTM transforms only the teacher; compared
with KD, this adds a Rényi entropy of the student as a regularizer.
"""

from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig
from mdistiller.methods.kd import AnyLogits, Loss, Mask, Reduction, divergence, reduce_samples, soften
from mdistiller.methods.registry import register_method


def ttm_samples(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Computes the TTM loss and the WTTM weight (the teacher's power sum) of each sample, [B] each."""
    student, teacher = soften(student_logits, teacher_logits, 1.0)
    if not gamma > 0:
        raise ConfigError(f"gamma must be positive; got {gamma}")
    power = gamma * teacher.log_softmax(1)
    log_sum = power.logsumexp(1, keepdim=True)
    return divergence(power - log_sum, student.log_softmax(1)).sum(1), log_sum[:, 0].exp()


def ttm_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    *,
    gamma: float = 0.1,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the divergence of the student's probabilities from the teacher's power-transformed ones.

    $$\frac1B \sum_b \mathrm{KL}\big(p^{T,\gamma}_b \,\|\, p^S_b\big), \quad
    p^{T,\gamma}_i = \frac{(p^T_i)^\gamma}{\sum_j (p^T_j)^\gamma}, \quad p = \sigma(z)$$

    in nats. The transformed teacher is $\sigma(\gamma z^T)$, so the loss is zero where $z^S = \gamma z^T$;
    γ > 0 is the inverse of the teacher's temperature. Shapes, `reduction`, `mask` and errors: as `kd_loss`; a
    gamma that is not positive.

    Source: Zheng and Yang, ICLR 2024, section 3.
    """
    given = student_logits, teacher_logits, None, reduction
    return reduce_samples(lambda s, t, y: ttm_samples(s, t, gamma)[0], *given, mask=mask)


def wttm_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    *,
    gamma: float = 0.2,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes TTM with a weight per sample, larger for smoother probabilities of the teacher.

    $$\frac1B \sum_b U_\gamma(p^T_b)\,\mathrm{KL}\big(p^{T,\gamma}_b \,\|\, p^S_b\big), \quad
    U_\gamma(p) = \sum_i p_i^\gamma$$

    For γ < 1 the weight is between 1 (a certain teacher) and $C^{1-\gamma}$ (a uniform one).

    Arguments, errors: as `ttm_loss`.

    Source: Zheng and Yang, ICLR 2024, section 4.
    """

    def samples(student: Tensor, teacher: Tensor, target: None) -> Tensor:
        loss, weight = ttm_samples(student, teacher, gamma)
        return weight * loss

    return reduce_samples(samples, student_logits, teacher_logits, None, reduction, mask=mask)


class TTMConfig(MethodConfig):
    """Hyperparameters of TTM; the defaults are the authors' example, vgg13 → vgg8 on CIFAR-100."""

    weight: float = Field(default=45.0, ge=0)
    """Weight of the TTM loss."""
    gamma: float = Field(default=0.1, gt=0)
    """Exponent of the teacher's probabilities, the inverse of the teacher's temperature."""


class WTTMConfig(MethodConfig):
    """Hyperparameters of WTTM; the defaults are the authors' example, vgg13 → vgg8 on CIFAR-100."""

    weight: float = Field(default=4.0, ge=0)
    """Weight of the WTTM loss."""
    gamma: float = Field(default=0.2, gt=0)
    """Exponent of the teacher's probabilities, the inverse of the teacher's temperature."""


@register_method("ttm")
class TTM(LogitMethod[TTMConfig]):
    """Matches the teacher's power-transformed probabilities with the student's plain ones."""

    Config = TTMConfig
    card = Card(
        "Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024",
        "KD with temperature on the teacher only, which regularizes the student",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        loss, _ = ttm_samples(student_logits, teacher_logits, self.config.gamma)
        return {"ttm": self.config.weight * loss}


@register_method("wttm")
class WTTM(LogitMethod[WTTMConfig]):
    """Applies TTM with larger weights for samples where the teacher's probabilities are smooth."""

    Config = WTTMConfig
    card = Card(
        TTM.card.paper,
        "Like TTM, with more weight on images where the teacher is unsure",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        loss, weight = ttm_samples(student_logits, teacher_logits, self.config.gamma)
        return {"wttm": self.config.weight * weight * loss}
