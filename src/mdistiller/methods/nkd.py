r"""Normalized KD (Yang, Zeng, Li, Zhang, Yuan, Li: ICCV 2023, arXiv 2303.13005).

The cross-entropy of student and teacher splits into the target's term $-p^T_t \log p^S_t$ and the others'.
The others' probabilities sum to $1 - p_t$, which differs between the two models, so they cannot become
equal while $p_t$ differs; NKD normalises them to sum to one first.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import LogitMethod, MethodConfig, promote
from mdistiller.methods.dkd import Target, dkd_samples
from mdistiller.methods.kd import soften
from mdistiller.methods.registry import register_method


def nkd_samples(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, gamma: float, temperature: float
) -> Tensor:
    """The NKD loss of each sample, [B]."""
    # Cross-entropy is divergence plus entropy, and entropy falls short of log(C − 1) by the divergence from
    # the uniform distribution: so NCKD has all that is needed, for class ids and for soft labels.
    uniform = torch.zeros_like(teacher_logits)
    _, divergence = dkd_samples(student_logits, teacher_logits, target, temperature)
    _, shortfall = dkd_samples(uniform, teacher_logits, target, temperature)
    others = divergence + temperature**2 * math.log(student_logits.shape[1] - 1) - shortfall

    student, teacher = (x.log_softmax(1) for x in soften(student_logits, teacher_logits, 1.0))
    terms = -teacher.exp() * student
    if target.is_floating_point():
        return (promote(target) * terms).sum(1) + gamma * others
    return terms.gather(1, target[:, None])[:, 0] + gamma * others


def nkd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    target: Target,
    *,
    gamma: float = 3.5,
    temperature: float = 3.0,
) -> Float[Tensor, ""]:
    r"""Cross-entropy on the target, weighed by the teacher, and among the other classes, normalised.

    $$\frac1B \sum_b \Big( -p^T_t \log p^S_t
    - \gamma\,T^2 \sum_{i \ne t} \hat p^T_i \log \hat p^S_i \Big), \quad
    p = \sigma(z), \quad \hat p_i = \frac{e^{z_i/T}}{\sum_{j \ne t} e^{z_j/T}}$$

    A cross-entropy, not a divergence: where student equals teacher the second sum is the teacher's
    entropy. It is zero for two classes. A soft label stands for its classes in expectation, as in
    `dkd_loss`, so one-hot labels give what class ids give.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C], detached.
        target: int64 [B] class ids, or float [B, C] soft labels whose rows sum to one.
        gamma: weight of the other classes' part.
        temperature: T > 0 of the other classes' part, which is multiplied by T²; the target's has none.

    Returns:
        A scalar: the mean over the batch, in nats.

    Raises:
        ConfigError: logits of different shapes or not [B, C] with C ≥ 2; a target that is neither; a
            temperature that is not positive.

    Source: Yang et al., ICCV 2023. Equals the authors' code on class ids; soft labels and two classes are
    defined here (that code takes the likeliest class of a soft label).
    """
    return nkd_samples(student_logits, teacher_logits, target, gamma, temperature).mean()


class NKDConfig(MethodConfig):
    """Hyper-parameters of NKD; the defaults are those of the authors' code for CIFAR-100."""

    gamma: float = Field(default=3.5, ge=0)
    """Weight of the other classes' part; the authors take 1.5 on ImageNet."""
    temperature: float = Field(default=3.0, gt=0)
    """Softens the other classes' part; the authors take 1 on ImageNet."""


@register_method("nkd")
class NKD(LogitMethod):
    """The target's cross-entropy weighed by the teacher, and the other classes' after normalisation."""

    Config = NKDConfig
    config: NKDConfig
    paper = (
        "Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: "
        "A Unified Approach with Normalized Loss and Customized Soft Labels, ICCV 2023"
    )
    year = 2023

    def sample_losses(
        self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor
    ) -> dict[str, Tensor]:
        """`{"nkd": …}`."""
        c = self.config
        return {"nkd": nkd_samples(student_logits, teacher_logits, label, c.gamma, c.temperature)}
