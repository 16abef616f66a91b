r"""Normalized KD (Yang, Zeng, Li, Zhang, Yuan, Li: ICCV 2023, arXiv 2303.13005).

The cross-entropy of student and teacher splits into a term of the target, $-p^T_t \log p^S_t$, and one of the
other classes. The other probabilities sum to $1 - p_t$, which differs between the models, so they cannot
become equal; NKD normalizes them to sum to one.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig, Needs, promote
from mdistiller.methods.dkd import dkd_samples
from mdistiller.methods.kd import (
    AnyLogits,
    Loss,
    Mask,
    Reduction,
    Target,
    absent_classes,
    reduce_samples,
    soften,
)
from mdistiller.methods.registry import register_method
from mdistiller.types import IGNORED


def nkd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Target,
    *,
    gamma: float = 3.5,
    temperature: float = 3.0,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the cross-entropy on the target, weighted by the teacher, and among the other classes.

    $$\frac1B \sum_b \Big( -p^T_t \log p^S_t
    - \gamma\,T^2 \sum_{i \ne t} \hat p^T_i \log \hat p^S_i \Big), \quad
    p = \sigma(z), \quad \hat p_i = \frac{e^{z_i/T}}{\sum_{j \ne t} e^{z_j/T}}$$

    It is a cross-entropy, not a divergence: where student equals teacher, the second sum is the teacher's
    entropy. That sum is zero for two classes. A soft label stands for its classes in expectation, so one-hot
    labels give the same loss as class ids. The loss is in nats. Shapes, `reduction`, `ignore_index`, `mask`
    and errors: as `dkd_loss`.

    Source: Yang et al., ICCV 2023. Equals the authors' code on class ids; soft labels and two classes are
    defined only here (the authors' code takes the likeliest class of a soft label).
    """

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        # Cross-entropy is divergence plus entropy, and entropy is log(C − 1) less the divergence from the
        # uniform distribution, so NCKD gives both, for class ids and for soft labels.
        _, divergence = dkd_samples(student, teacher, target, temperature)
        _, shortfall = dkd_samples(torch.zeros_like(teacher), teacher, target, temperature)
        others = divergence - shortfall
        constant = temperature**2 * math.log(student.shape[1] - 1)

        absent = absent_classes(student, teacher)
        log_q, log_p = (x.log_softmax(1) for x in soften(student, teacher, 1.0))
        terms = -log_p.exp() * log_q.masked_fill(absent, 0.0)
        if target.is_floating_point():
            target = promote(target)
            return (target * terms).sum(1) + gamma * (others + constant * target.sum(1))
        return terms.gather(1, target[:, None])[:, 0] + gamma * (others + constant)

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, ignore_index, mask)


class NKDConfig(MethodConfig):
    """Hyperparameters of NKD; the defaults are those of the authors' code for CIFAR-100."""

    gamma: float = Field(default=3.5, ge=0)
    """Weight of the part of the other classes; the authors use 1.5 on ImageNet."""
    temperature: float = Field(default=3.0, gt=0)
    """Temperature of the part of the other classes; the authors use 1 on ImageNet."""


@register_method("nkd")
class NKD(LogitMethod[NKDConfig]):
    """Weights the target's cross-entropy by the teacher, and matches the normalized other classes."""

    Config = NKDConfig
    needs = Needs(labels=True, every_label=False)
    card = Card(
        "Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation: "
        "A Unified Approach with Normalized Loss and Customized Soft Labels, ICCV 2023",
        "Like DKD, with a soft target in place of TCKD",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        given = student_logits, teacher_logits, label
        return {"nkd": nkd_loss(*given, gamma=c.gamma, temperature=c.temperature, reduction="none")}
