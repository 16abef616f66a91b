"""Plackett-Luce distillation (Bassam, Zhu, Bian: NeurIPS 2025, arXiv 2506.12542).

Logits are worths: classes are chosen one after another, each by a softmax over those that are left. The
student learns the likelihood of one order of them: the label, then the others as the teacher ranks them.
"""

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig, Needs
from mdistiller.methods.kd import AnyLogits, Loss, Mask, Reduction, check_class_ids, reduce_samples, soften
from mdistiller.methods.registry import register_method
from mdistiller.types import IGNORED


def pld_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Int[Tensor, "*b"],
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the negative log-likelihood of the teacher's order of classes, weighted by its confidence.

    With $\pi$ the label first, then the other classes by falling teacher logits:

    $$\frac1B \sum_b \sum_{k=1}^{C} \sigma(z^T / T)_{\pi_k}
    \Big( \log \sum_{l \ge k} \exp z^S_{\pi_l} - z^S_{\pi_k} \Big)$$

    in nats. The first step, of weight 1, would be the cross-entropy with the label. Classes that tie keep
    their order. Shapes, `reduction`, `ignore_index`, `mask` and errors: as `dkd_loss`; soft labels, which
    have no rank.

    Source: Bassam et al., NeurIPS 2025, section 4.2.
    """

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        check_class_ids(student, target, "PLD")
        weight = soften(student, teacher, temperature)[1].softmax(1)
        student, teacher = soften(student, teacher, 1.0)
        # A class absent from both models has no probability, and a finite logit keeps it out of the sums.
        absent = student.isneginf() & teacher.isneginf()
        student = student.masked_fill(absent, torch.finfo(student.dtype).min / 2)
        ranked = teacher.detach().scatter(1, target[:, None], float("inf"))
        order = ranked.argsort(dim=1, descending=True, stable=True)
        student, weight = student.gather(1, order), weight.gather(1, order)
        left = student.flip(1).logcumsumexp(1).flip(1)
        return (weight * (left - student)).sum(1)

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, ignore_index, mask)


class PLDConfig(MethodConfig):
    """Hyperparameters of PLD; the defaults are the authors' for ImageNet."""

    task_weight: float = Field(default=0.0, ge=0)
    """Weight of the task loss; the first step of the order is one already."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the PLD loss."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the teacher's confidence; the authors use 4 on CIFAR-100."""


@register_method("pld")
class PLD(LogitMethod[PLDConfig]):
    """Learns the teacher's order of all classes, with the label first."""

    Config = PLDConfig
    card = Card(
        "Bassam, Zhu, Bian: PLD: A Choice-Theoretic List-Wise Knowledge Distillation, NeurIPS 2025",
        "You want one loss instead of weighting cross-entropy and distillation; needs labels",
    )
    needs = Needs(labels=True, every_label=False)

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        given = student_logits, teacher_logits, label
        return {"pld": c.weight * pld_loss(*given, temperature=c.temperature, reduction="none")}
