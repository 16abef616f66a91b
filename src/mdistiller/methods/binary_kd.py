r"""Multi-label logits distillation (Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang: ICCV 2023).

An image of several classes has no distribution over the classes. Each class has a two-way distribution of its
own, $(p_c, 1 - p_c)$ with $p_c = \mathrm{sigmoid}(z_c)$, and the student learns those of the teacher.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig, Needs, promote
from mdistiller.methods.kd import (
    AnyLogits,
    Loss,
    Mask,
    Reduction,
    absent_classes,
    divergence,
    reduce_samples,
    soften,
)
from mdistiller.methods.registry import register_method


def _two_way(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Computes the divergence of each class times T², and whether the class is absent, [B, C] each."""
    s, t = soften(student_logits, teacher_logits, temperature)
    absent = absent_classes(s, t)
    s, t = s.masked_fill(absent, 0.0), t.masked_fill(absent, 0.0)
    terms = divergence(F.logsigmoid(t), F.logsigmoid(s)) + divergence(F.logsigmoid(-t), F.logsigmoid(-s))
    return terms * temperature**2, absent


def _mean(terms: Tensor, absent: Tensor) -> Tensor:
    """Averages [B, C] over the classes that are not absent, [B]."""
    return terms.masked_fill(absent, 0.0).sum(1) / (~absent).sum(1).clamp(min=1)


def binary_kd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the divergence of the two-way probabilities of each class, of student from teacher.

    $$\frac{T^2}{B C} \sum_b \sum_c \mathrm{KL}\big((p^T_{bc}, 1 - p^T_{bc}) \,\|\,
    (p^S_{bc}, 1 - p^S_{bc})\big), \quad p = \mathrm{sigmoid}(z / T)$$

    The loss is in nats. Shapes, `reduction`, `mask` and errors: as `kd_loss`.

    Source: Yang et al., ICCV 2023, multi-label logits distillation (MLD), which sums over the classes and has
    no temperature.
    """
    given = student_logits, teacher_logits, None, reduction
    return reduce_samples(lambda s, t, y: _mean(*_two_way(s, t, temperature)), *given, mask=mask)


def multilabel_dkd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: AnyLogits,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes DKD of each class as a problem of two classes, 'present' and 'not present'.

    With two classes NCKD is zero, so that DKD is the two-way TCKD of every class c by itself. What is left to
    decouple are the classes that a sample has, with weight α, and those that it has not, with weight β:

    $$\frac{T^2}{B C} \sum_b \sum_c \big(\alpha y_{bc} + \beta (1 - y_{bc})\big)\,
    \mathrm{KL}\big((p^T_{bc}, 1 - p^T_{bc}) \,\|\, (p^S_{bc}, 1 - p^S_{bc})\big), \quad
    p = \mathrm{sigmoid}(z / T)$$

    in nats. At α = β = 1 it is `binary_kd_loss`.

    Args:
        student_logits: [..., C]; B counts all leading positions.
        teacher_logits: [..., C], detached.
        target: float [..., C] in [0, 1], 1 for each class that a sample has.
        alpha: weight of the classes that a sample has.
        beta: weight of the other classes.
        temperature: T > 0.
        reduction: as in `kd_loss`.
        mask: as in `kd_loss`.

    Raises:
        ConfigError: as `kd_loss`; a target that is not float [..., C].

    Source: Zhao et al., CVPR 2022, equation 4, for the two-way probabilities of Yang et al., ICCV 2023; the
    two weights are defined only here.
    """
    if not target.is_floating_point():
        raise ConfigError(
            f"target must be float {list(student_logits.shape)}, 1 for each class that a sample has "
            f"(torch.nn.functional.one_hot of one class); got {target.dtype} {list(target.shape)}"
        )

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        terms, absent = _two_way(student, teacher, temperature)
        return _mean((beta + (alpha - beta) * promote(target)) * terms, absent)

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, mask=mask)


class BinaryKDConfig(MethodConfig):
    """Hyperparameters of binary KD."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the binary KD loss."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the probabilities of both models."""


@register_method("binary_kd")
class BinaryKD(LogitMethod[BinaryKDConfig]):
    """Matches the teacher's probability of each class by itself, for images of several classes."""

    Config = BinaryKDConfig
    needs = Needs(one_class=False)
    card = Card(
        "Yang et al.: Multi-Label Knowledge Distillation, ICCV 2023",
        "Images have several labels",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        loss = binary_kd_loss(student_logits, teacher_logits, temperature=c.temperature, reduction="none")
        return {"binary_kd": c.weight * loss}
