"""Normalized logits for KD (Chi, Zheng, Li, Yang, Wu, Lin, Cai: NormKD, 2023, arXiv 2308.00520).

A common temperature softens samples unequally, because the spread of their logits differs.
"""

from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig
from mdistiller.methods.kd import AnyLogits, Loss, Mask, Reduction, kd_samples, reduce_samples, soften
from mdistiller.methods.registry import register_method


def _standardize(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Standardizes logits over the classes, [B, C], and returns their variance before that, [B]."""
    absent = logits == float("-inf")
    count = (~absent).sum(1, keepdim=True)
    mean = logits.masked_fill(absent, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centered = (logits - mean).masked_fill(absent, 0.0)
    variance = centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    # Equal logits have no scale; undivided, they keep a gradient from which a student can start.
    variance = variance.where(variance > 1e-8, 1.0)
    return (centered / variance.sqrt()).masked_fill(absent, float("-inf")), variance[:, 0]


def normkd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    *,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes KD with a temperature per sample in proportion to the spread of its logits.

    $$\frac1B \sum_b (T^T_b)^2\,\mathrm{KL}\big(\sigma(z^T_b / T^T_b) \,\|\, \sigma(z^S_b / T^S_b)\big),
    \quad T^{S,T}_b = T_\text{norm}\,\mathrm{std}(z^{S,T}_b)$$

    std is the sample standard deviation over the classes (C − 1 in the denominator), taken as 1 where it is
    below 1e-4. The student's std has a gradient, so the loss does not depend on shift and scale of the
    student's logits. For two classes, standardized logits are always ±1/√2 and have no gradient. The loss is
    in nats times the squared temperature of the teacher; `temperature` is T_norm. Shapes, `reduction`, `mask`
    and errors: as `kd_loss`.

    Source: Chi et al. 2023.
    """

    def samples(student: Tensor, teacher: Tensor, target: None) -> Tensor:
        student, teacher = soften(student, teacher, 1.0)
        student, _ = _standardize(student)
        teacher, variance = _standardize(teacher)
        return kd_samples(student, teacher, temperature) * variance

    return reduce_samples(samples, student_logits, teacher_logits, None, reduction, mask=mask)


class NormKDConfig(MethodConfig):
    """Hyperparameters of NormKD; the defaults are the authors' for CIFAR-100."""

    task_weight: float = Field(default=0.1, ge=0)
    """Weight of the task loss."""
    weight: float = Field(default=0.9, ge=0)
    """Weight of the NormKD loss."""
    temperature: float = Field(default=2.0, gt=0)
    """Temperature in units of the standard deviation of a sample's logits."""


@register_method("normkd")
class NormKD(LogitMethod[NormKDConfig]):
    """Applies KD at a temperature in proportion to the spread of each sample's logits."""

    Config = NormKDConfig
    card = Card(
        "Chi, Zheng, Li, Yang, Wu, Lin, Cai: NormKD: Normalized Logits for Knowledge Distillation, 2023",
        "Logit scales vary between images: each image gets its own temperature",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        loss = normkd_loss(student_logits, teacher_logits, temperature=c.temperature, reduction="none")
        return {"normkd": c.weight * loss}
