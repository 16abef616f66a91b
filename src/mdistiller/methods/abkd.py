r"""ABKD: the α-β-divergence (Wang, Yang, Wang, Wang, Xu, Huang: ICML 2025, arXiv 2505.04560).

Gradients of the KL divergence follow the largest errors and the student's confidence too little, those of
the reverse divergence too much. α and β set both by themselves: (1, 0) is KL, (0, 1) the reverse.
"""

import torch
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig
from mdistiller.methods.kd import AnyLogits, Loss, Mask, Reduction, absent_classes, reduce_samples, soften
from mdistiller.methods.registry import register_method


def abkd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    *,
    alpha: float = 0.8,
    beta: float = 0.3,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the α-β-divergence of the student's from the teacher's softened class probabilities.

    $$\frac{1}{\alpha \beta B} \sum_b \sum_c \Big( \frac{\alpha}{\alpha + \beta} p^{\alpha + \beta} +
    \frac{\beta}{\alpha + \beta} q^{\alpha + \beta} - p^\alpha q^\beta \Big)$$

    with the teacher's p and the student's q at temperature T, without a factor T². At α = 0, at β = 0 and at
    both, the loss is the limit: (1, 0) is KL(p ‖ q), (0, 1) is KL(q ‖ p), (0, 0) half the squared difference
    of log-probabilities. Finite for logits up to ±1e4. Shapes, `reduction` and `mask`: as `kd_loss`.

    Raises:
        ConfigError: as `kd_loss`; a negative α or β.

    Source: Wang et al., ICML 2025, definition of the α-β-divergence; equals the authors' code except at β = 0
    and α = 0, where the code divides the limit by 1/α or 1/β (equal for 1).
    """
    if not (alpha >= 0 and beta >= 0):
        raise ConfigError(f"alpha and beta must not be negative; got {alpha} and {beta}")

    def samples(student: Tensor, teacher: Tensor, target: None) -> Tensor:
        student, teacher = soften(student, teacher, temperature)
        absent = absent_classes(student, teacher)
        s, t = (x.log_softmax(1).masked_fill(absent, 0.0) for x in (student, teacher))
        if alpha == beta == 0:
            terms = (s - t).square() / 2
        elif beta == 0:
            a, b = (alpha * t).exp(), (alpha * s).exp()
            terms = (alpha * a * (t - s) - a + b) / alpha**2
        elif alpha == 0:
            a, b = (beta * s).exp(), (beta * t).exp()
            terms = (beta * a * (s - t) - a + b) / beta**2
        else:
            both = alpha + beta
            mixed = alpha / both * (both * t).exp() + beta / both * (both * s).exp()
            terms = (mixed - torch.exp(alpha * t + beta * s)) / (alpha * beta)
        return terms.masked_fill(absent, 0.0).sum(1)

    return reduce_samples(samples, student_logits, teacher_logits, None, reduction, mask=mask)


class ABKDConfig(MethodConfig):
    """Hyperparameters of ABKD; the defaults are the authors' example, resnet56 → resnet20 on CIFAR-100."""

    weight: float = Field(default=32.0, ge=0)
    """Weight of the divergence."""
    alpha: float = Field(default=0.8, ge=0)
    """Exponent α of the teacher's probabilities; smaller: more weight on classes with large errors."""
    beta: float = Field(default=0.3, ge=0)
    """Exponent β of the student's probabilities; larger: more weight on classes with a confident student."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both probability distributions."""


@register_method("abkd")
class ABKD(LogitMethod[ABKDConfig]):
    """Matches the teacher's class probabilities under a divergence between KL and its reverse."""

    Config = ABKDConfig
    card = Card(
        "Wang, Yang, Wang, Wang, Xu, Huang: ABKD: Pursuing a Proper Allocation of the Probability Mass in "
        "Knowledge Distillation via α-β-Divergence, ICML 2025",
        "KL covers too many classes or reverse KL too few; two exponents set the balance",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        given = student_logits, teacher_logits
        loss = abkd_loss(*given, alpha=c.alpha, beta=c.beta, temperature=c.temperature, reduction="none")
        return {"abkd": c.weight * loss}
