r"""Losses of DeepKD (Huang, Song, Zhang, Ren: 2025, arXiv 2505.15133).

DKD's two parts, as two losses with momenta of their own under the optimizer `deepkd`. The part of the other
classes can be limited to those that the teacher finds likeliest, whose number grows: a curriculum.
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor, nn

from mdistiller.methods.base import Card, Example, Losses, Method, MethodConfig, Needs, ramp
from mdistiller.methods.dkd import dkd_samples
from mdistiller.methods.gdkd import kl_within
from mdistiller.methods.kd import AnyLogits, Loss, Mask, Reduction, check_class_ids, reduce_samples, soften
from mdistiller.methods.registry import register_method
from mdistiller.types import IGNORED, Batch, DataInfo, Outputs


def deepkd_samples(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, k: int | Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Computes TCKD, and NCKD among k classes, [B] each, times T²; `k` is an integer or a 0-d tensor."""
    student, teacher = soften(student_logits, teacher_logits, temperature)
    check_class_ids(student, target, "DeepKD")
    tckd, _ = dkd_samples(student_logits, teacher_logits, target, temperature)
    column = target[:, None]
    order = teacher.scatter(1, column, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)
    members = (rank < k).scatter(1, column, False)
    return tckd, kl_within(student, teacher, members) * temperature**2


def deepkd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Int[Tensor, "*b"],
    *,
    k: int,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes DKD with the divergence of the other classes among the teacher's k likeliest ones.

    $$\alpha\,\mathrm{TCKD} + \beta\,\frac{T^2}{B} \sum_b \mathrm{KL}\big(\sigma(z^T_K / T) \,\|\,
    \sigma(z^S_K / T)\big)$$

    with the set K of the k classes other than the target that have the largest logits of the teacher. With
    k = C − 1 it is DKD; with k < 2 the second part is 0.

    Args:
        student_logits: [..., C], C ≥ 2; B counts all leading positions.
        teacher_logits: [..., C], detached.
        target: int64 [...] class ids.
        k: number of classes in K.
        alpha: weight of TCKD.
        beta: weight of the second part.
        temperature: T > 0; both parts are multiplied by T².
        reduction: as in `dkd_loss`.
        ignore_index: as in `dkd_loss`.
        mask: as in `dkd_loss`.

    Raises:
        ConfigError: as `dkd_loss`; soft labels.

    Source: Huang et al. 2025, the top-k mask. In the authors' code the target takes one of the k places if it
    is among the teacher's k likeliest classes; else the numbers are equal.
    """

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        tckd, nckd = deepkd_samples(student, teacher, target, k, temperature)
        return alpha * tckd + beta * nckd

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, ignore_index, mask)


class DeepKDConfig(MethodConfig):
    """Hyperparameters of DeepKD's losses; the defaults are those of the authors' resnet32x4 → resnet8x4."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of TCKD."""
    beta: float = Field(default=8.0, ge=0)
    """Weight of NCKD."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both probability distributions."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which both losses grow from zero to their full weight."""
    first_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the other classes that NCKD compares at the start; 1: all, without a curriculum."""
    curriculum: float = Field(default=1.0, gt=0, le=1)
    """Fraction of training over which this share grows linearly to all."""


@register_method("deepkd")
class DeepKDMethod(Method[DeepKDConfig]):
    """Has both parts of DKD as losses of their own, the second one optionally among ever more classes.

    The optimizer `deepkd` gives each its momentum.
    """

    Config = DeepKDConfig
    card = Card(
        "Huang, Song, Zhang, Ren: DeepKD: A Deeply Decoupled and Denoised Knowledge Distillation "
        "Trainer, 2025",
        "Many classes, and memory for three momentum buffers (`--optim.name deepkd`)",
        example=Example(),
    )
    needs = Needs(labels=True)

    def __init__(
        self, config: DeepKDConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        self.needs = replace(self.needs, progress=self.needs.progress or config.first_share < 1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        share = c.first_share + (1 - c.first_share) * (progress / c.curriculum).clamp(max=1.0)
        k = (share * (student.logits.shape[1] - 1)).ceil()
        tckd, nckd = deepkd_samples(student.logits, teacher.logits, batch.label, k, c.temperature)
        weight = ramp(progress, self.config.warmup)
        return {"tckd": weight * c.alpha * tckd.mean(), "nckd": weight * c.beta * nckd.mean()}
