r"""Refined logit distillation (Sun, Chen, Lyu, Chen, Chen, Wang: ICCV 2025, arXiv 2408.07703).

A wrong prediction of the teacher contradicts the label. RLD transfers the teacher's confidence, to the label,
and the distribution among the classes that the teacher ranks below the label. Classes that the teacher ranks
above the label are left out. Where the teacher is right, RLD equals DKD.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig, Needs
from mdistiller.methods.gdkd import kl_within, log_masses
from mdistiller.methods.kd import AnyLogits, Loss, Mask, Reduction, check_class_ids, reduce_samples, soften
from mdistiller.methods.registry import register_method
from mdistiller.types import IGNORED


def rld_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Int[Tensor, "*b"],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 4.0,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the distances of the confidences and of the distributions of classes ranked below the label.

    With $t$ the label, $m$ the teacher's top class and $p = \sigma(z/T)$:

    $$\frac{T^2}{B} \sum_b \Big( \alpha\,\mathrm{KL}\big((p^T_m, 1 - p^T_m) \,\|\, (p^S_t, 1 - p^S_t)\big)
    + \beta\,\mathrm{KL}\big(p^T|_R \,\|\, p^S|_R\big) \Big), \quad R = \{i : z^T_i < z^T_t\}$$

    $p|_R$ is the distribution among the classes in R. With fewer than two of them the second part is zero,
    so it is zero for two classes. The first part's T is `confidence_temperature`, usually the same value. The
    loss is in nats. Shapes, `reduction`, `ignore_index`, `mask` and errors: as `dkd_loss`; soft labels, which
    have no rank.

    Source: Sun et al., ICCV 2025.
    """

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        s, t = soften(student, teacher, confidence_temperature)
        check_class_ids(student, target, "RLD")
        column = target[:, None]
        classes = torch.arange(student.shape[1], device=target.device)
        confidence = F.kl_div(
            log_masses(s, classes == column),
            log_masses(t, classes == t.argmax(1, keepdim=True)),
            reduction="none",
            log_target=True,
        ).sum(1)
        s, t = soften(student, teacher, temperature)
        correlation = kl_within(s, t, teacher < teacher.gather(1, column))
        parts = confidence * confidence_temperature**2, correlation * temperature**2
        return alpha * parts[0] + beta * parts[1]

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, ignore_index, mask)


class RLDConfig(MethodConfig):
    """Hyperparameters of RLD; the defaults are the authors' example for CIFAR-100."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the sample confidence."""
    beta: float = Field(default=8.0, ge=0)
    """Weight of the masked correlation."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of the masked correlation."""
    confidence_temperature: float = Field(default=4.0, gt=0)
    """Temperature of the sample confidence."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the RLD loss grows from zero to its full weight."""


@register_method("rld")
class RLD(LogitMethod[RLDConfig]):
    """Matches the teacher's confidence, in the label, and the classes ranked below the label."""

    Config = RLDConfig
    card = Card(
        "Sun, Chen, Lyu, Chen, Chen, Wang: Knowledge Distillation with Refined Logits, ICCV 2025",
        "The teacher is wrong on some training images: labels correct it",
    )
    needs = Needs(labels=True, every_label=False)

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        loss = partial(rld_loss, alpha=c.alpha, beta=c.beta, temperature=c.temperature)
        given = student_logits, teacher_logits, label
        return {"rld": loss(*given, confidence_temperature=c.confidence_temperature, reduction="none")}
