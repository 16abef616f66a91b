r"""Generalized decoupled KD (Zheng, Cheng: Rethinking Decoupled KD, 2025, arXiv 2512.04625).

Any partition of the classes splits the divergence into one between the groups' masses and one within each
group. The groups of DKD are the target and all others; those of GDKD are the teacher's top k classes and the
rest. GDKD does not use the labels, and several likely classes do not suppress the rest.
"""

from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, LogitMethod, Losses, MethodConfig
from mdistiller.methods.kd import AnyLogits, Loss, Mask, Reduction, reduce_samples, soften
from mdistiller.methods.registry import register_method


def _only(logits: Tensor, members: Tensor) -> Tensor:
    """Replaces the logits of non-members, and −∞, by the lowest finite number.

    Unlike with −∞, an empty set gives equal logits and hence a divergence of 0.
    """
    return logits.masked_fill(~members | (logits == float("-inf")), torch.finfo(logits.dtype).min)


def kl_within(student: Tensor, teacher: Tensor, members: Tensor) -> Tensor:
    """Computes the KL [B] of logits [B, C] among `members`, bool [B, C]; 0 for fewer than two members."""
    s, t = (_only(x, members).log_softmax(1) for x in (student, teacher))
    return F.kl_div(s, t, reduction="none", log_target=True).sum(1)


def log_masses(logits: Tensor, members: Tensor) -> Tensor:
    """Returns the log-masses of `members`, bool [B, C], and of all other classes, [B, 2]."""
    log_p = logits.log_softmax(1)
    return torch.stack([_only(log_p, group).logsumexp(1) for group in (members, ~members)], 1)


def gdkd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    *,
    w0: float = 1.0,
    w1: float = 1.0,
    w2: float = 8.0,
    k: int = 5,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the weighted divergences between and within the teacher's top k classes and the rest.

    With $p = \sigma(z/T)$, $P = \sum_{i \in \text{top}} p_i$, and $p|_G$ the distribution within a group:

    $$\frac{T^2}{B} \sum_b \Big( w_0\,\mathrm{KL}\big((P^T, 1-P^T) \,\|\, (P^S, 1-P^S)\big)
    + w_1\,\mathrm{KL}\big(p^T|_\text{top} \,\|\, p^S|_\text{top}\big)
    + w_2\,\mathrm{KL}\big(p^T|_\text{rest} \,\|\, p^S|_\text{rest}\big) \Big)$$

    Weights $1, P^T, 1 - P^T$ would give KD. k = 1 gives DKD where the teacher is right; for k ≥ C the loss is
    $w_1$ times KD. The loss is in nats. Shapes, `reduction`, `mask` and errors: as `kd_loss`; a k below 1.

    Source: Zheng and Cheng 2025.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1; got {k}")

    def samples(student: Tensor, teacher: Tensor, target: None) -> Tensor:
        student, teacher = soften(student, teacher, temperature)
        best = teacher.topk(min(k, teacher.shape[1]), dim=1, sorted=False).indices
        top = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, best, True)
        masses = log_masses(student, top), log_masses(teacher, top)
        groups = F.kl_div(*masses, reduction="none", log_target=True).sum(1) * temperature**2
        within, rest = (kl_within(student, teacher, x) * temperature**2 for x in (top, ~top))
        return w0 * groups + w1 * within + w2 * rest

    return reduce_samples(samples, student_logits, teacher_logits, None, reduction, mask=mask)


class GDKDConfig(MethodConfig):
    """Hyperparameters of GDKD; the defaults are those of the authors' code for CIFAR-100."""

    w0: float = Field(default=1.0, ge=0)
    """Weight of the divergence between the groups."""
    w1: float = Field(default=1.0, ge=0)
    """Weight of the divergence within the teacher's top k classes."""
    w2: float = Field(default=8.0, ge=0)
    """Weight of the divergence within the rest."""
    k: int = Field(default=5, ge=1)
    """Number of the teacher's top classes."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both probability distributions."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the GDKD loss grows from zero to its full weight."""


@register_method("gdkd")
class GDKD(LogitMethod[GDKDConfig]):
    """Decouples the teacher's top k classes, in place of the target, from the rest."""

    Config = GDKDConfig
    card = Card(
        "Zheng, Cheng: Rethinking Decoupled Knowledge Distillation: "
        "A Predictive Distribution Perspective, 2025",
        "Many classes: splits off the teacher's top k instead of the target; needs no labels",
    )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        loss = partial(gdkd_loss, w0=c.w0, w1=c.w1, w2=c.w2, k=c.k, temperature=c.temperature)
        return {"gdkd": loss(student_logits, teacher_logits, reduction="none")}
