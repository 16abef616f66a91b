"""Knowledge distillation (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig
from mdistiller.methods.registry import register_method
from mdistiller.types import IGNORED

AnyLogits = Float[Tensor, "*b c"]
"""Logits [..., C], C ≥ 2; the teacher's are detached, else a loss has a gradient for the teacher too."""
Target = Int[Tensor, "*b"] | Float[Tensor, "*b c"]
Mask = Bool[Tensor, "*b"]
Loss = Float[Tensor, ""] | Float[Tensor, "*b"]
Reduction = Literal["mean", "sum", "none"]


def soften(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Checks the logits of both models and divides them by the temperature, in at least float32.

    Raises:
        ConfigError: shapes that differ or are not [B, C] with C ≥ 2, or a temperature that is not positive.
    """
    check_logits(student_logits, teacher_logits, "B")
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive; got {temperature}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return student_logits.to(dtype) / temperature, teacher_logits.to(dtype) / temperature


def check_logits(student: Tensor, teacher: Tensor, leading: str = "B") -> None:
    """Raises a ConfigError for logits that have not one shape [`leading`, C], C ≥ 2."""
    right = student.ndim == 2 if leading == "B" else student.ndim > 0
    if student.shape != teacher.shape or not right or student.shape[-1] < 2:
        raise ConfigError(
            f"student and teacher logits must have one shape [{leading}, C], C ≥ 2; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )


def check_target(logits: Tensor, target: Tensor) -> None:
    """Raises a `ConfigError` for a target that is neither int64 [...] nor float [..., C], for [..., C]."""
    leading = logits.shape[:-1]
    if target.shape != (logits.shape if target.is_floating_point() else leading):
        raise ConfigError(
            f"target must be class ids int64 {list(leading)} or soft labels float {list(logits.shape)}; "
            f"got {target.dtype} {list(target.shape)}"
        )


def check_class_ids(logits: Tensor, target: Tensor, method: str) -> None:
    """Raises a `ConfigError` for a target that is not int64 [B], such as soft labels, for logits [B, C]."""
    if target.is_floating_point():
        raise ConfigError(
            f"target must be class ids int64 [{len(logits)}]: {method} ranks the classes, so it takes no "
            f"soft labels (no mixup, no CutMix); got {target.dtype} {list(target.shape)}"
        )
    check_target(logits, target)


def absent_classes(student: Tensor, teacher: Tensor) -> Tensor:
    """Marks the classes whose logit is −∞ in both models, bool [B, C]."""
    low = float("-inf")
    return (student == low) & (teacher == low)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Returns the terms p (log p − log q) of KL(p ‖ q) from log-probabilities, teacher p and student q.

    A term with p = 0 (a logit of −∞) is zero and has no gradient.
    """
    absent = teacher == float("-inf")
    return teacher.exp() * (teacher.masked_fill(absent, 0.0) - student.masked_fill(absent, 0.0))


def kd_samples(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Computes the KD loss of each sample, [B], from logits [B, C]."""
    student, teacher = soften(student_logits, teacher_logits, temperature)
    return divergence(teacher.log_softmax(1), student.log_softmax(1)).sum(1) * temperature**2


def reduce_samples(
    samples: Callable[..., Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    reduction: Reduction,
    ignore_index: int = IGNORED,
    mask: Tensor | None = None,
) -> Tensor:
    """Applies a loss of samples to logits [..., C] and reduces the losses, as in `kd_loss`.

    Args:
        samples: function of student logits [N, C], teacher logits [N, C] and target (int64 [N],
            float [N, C] or None) to losses [N].
        student_logits: [..., C].
        teacher_logits: [..., C].
        target: int64 [...] class ids, float [..., C] soft labels, or None.
        reduction: "mean" over the samples that are not ignored (0 if there are none), "sum" or "none".
        ignore_index: class id of samples that are ignored.
        mask: bool [...], False for samples that are ignored as well.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    check_logits(student_logits, teacher_logits, "...")
    leading, classes = student_logits.shape[:-1], student_logits.shape[-1]
    student, teacher = student_logits.reshape(-1, classes), teacher_logits.reshape(-1, classes)
    ignored = None if mask is None else ignored_rows(mask, leading)
    if target is not None:
        check_target(student_logits, target)
        soft = target.is_floating_point()
        target = target.reshape(-1, classes) if soft else target.reshape(-1)
        if not soft:
            ignored = target == ignore_index if ignored is None else ignored | (target == ignore_index)
        if ignored is not None:
            target = target.masked_fill(ignored[:, None] if soft else ignored, 0)
    if ignored is not None:
        # Filled before the loss, so that NaN or −∞ in an ignored row reaches no gradient.
        student, teacher = (x.masked_fill(ignored[:, None], 0.0) for x in (student, teacher))
    losses = samples(student, teacher, target)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses.reshape(leading)
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if ignored is None else losses.sum() / (~ignored).sum().clamp(min=1)


def ignored_rows(mask: Tensor, leading: Sequence[int]) -> Tensor:
    """Returns the complement of a mask as one row per sample, bool [N]; raises a `ConfigError` for others."""
    if mask.dtype != torch.bool or list(mask.shape) != list(leading):
        raise ConfigError(
            f"mask must be bool {list(leading)}, the logits' shape without the classes; "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return ~mask.reshape(-1)


def kd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Target | None = None,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the KL divergence of the student's from the teacher's softened class probabilities.

    $$\frac{T^2}{B} \sum_b \mathrm{KL}\big(\sigma(z^T_b / T) \,\|\, \sigma(z^S_b / T)\big)$$

    A class whose logit is −∞ in both models (masked or padded) has no part in the sum.

    Args:
        student_logits: [..., C]; B counts all leading positions.
        teacher_logits: [..., C], detached: the loss also has a gradient for the teacher.
        target: int64 [...] class ids, read only to find ignored samples.
        temperature: T > 0; the factor T² keeps the scale of the gradient independent of T.
        reduction: "mean", "sum", or "none" for the losses [...] of all samples.
        ignore_index: class id of samples that have no part in the mean and the sum, and 0 in "none".
        mask: bool [...], False for samples that are ignored as well.

    Returns:
        The loss in nats.

    Raises:
        ConfigError: shapes that differ or are not [..., C], C ≥ 2; a target or a mask of another shape; a
            temperature that is not positive; an unknown reduction.

    Source: Hinton et al. 2015, section 2.
    """
    given = student_logits, teacher_logits, target, reduction, ignore_index, mask
    return reduce_samples(lambda s, t, y: kd_samples(s, t, temperature), *given)


class KDConfig(MethodConfig):
    """Hyperparameters of KD; the defaults are the usual ones for CIFAR-100."""

    task_weight: float = Field(default=0.1, ge=0)
    """Weight of the task loss."""
    weight: float = Field(default=0.9, ge=0)
    """Weight of the KD loss."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both probability distributions."""


@register_method("kd")
class KD(LogitMethod[KDConfig]):
    """Matches the teacher's softened class probabilities."""

    Config = KDConfig
    card = Card(
        "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015",
        "The first method to try, with any pair of models, with or without labels",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        return {"kd": c.weight * kd_samples(student_logits, teacher_logits, c.temperature)}
