r"""Decoupled Knowledge Distillation (Zhao, Cui, Song, Qiu, Liang: CVPR 2022, arXiv 2203.08679).

With $p$ the softened probabilities, $t$ the target, $b = (p_t, 1 - p_t)$ and $\hat p_i = p_i / (1 - p_t)$
for $i \ne t$, the KD loss splits exactly into

$$\mathrm{KL}(p^T \| p^S) = \mathrm{KL}(b^T \| b^S) + (1 - p^T_t)\,\mathrm{KL}(\hat p^T \| \hat p^S)
= \mathrm{TCKD} + (1 - p^T_t)\,\mathrm{NCKD}.$$

The factor $1 - p^T_t$ mutes NCKD where the teacher is confident; DKD weighs the two parts freely.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import AfterValidator, Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import LogitMethod, MethodConfig, promote
from mdistiller.methods.kd import soften
from mdistiller.methods.registry import register_method

Target = Int[Tensor, "b"] | Float[Tensor, "b c"]
_MINUS_INF = float("-inf")


def _tckd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """TCKD of each sample [B], from softened logits [B, C] and class ids [B]."""
    column = target[:, None]

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:  # log p_t and log(1 - p_t)
        log_p = logits.log_softmax(1)
        rest = log_p.scatter(1, column, _MINUS_INF).logsumexp(1)
        return log_p.gather(1, column)[:, 0], rest

    (s_target, s_rest), (t_target, t_rest) = split(student), split(teacher)
    return t_target.exp() * (t_target - s_target) + t_rest.exp() * (t_rest - s_rest)


def _nckd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """NCKD of each sample [B], from softened logits [B, C] and class ids [B]."""
    column = target[:, None]
    s = student.scatter(1, column, _MINUS_INF).log_softmax(1)
    t = teacher.scatter(1, column, _MINUS_INF).log_softmax(1)
    # The target's own term would be 0 · (−∞ + ∞); it has no part in the sum.
    return (t.exp() * (t.scatter(1, column, 0.0) - s.scatter(1, column, 0.0))).sum(1)


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 − p_c) for every class c [B, C]; exact where p_c is near 1, as log1p alone is not."""
    top = log_p.argmax(1, keepdim=True)
    others = log_p.scatter(1, top, _MINUS_INF)
    return torch.log1p(-others.exp()).scatter(1, top, others.logsumexp(1, keepdim=True))


def _every_class(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD with each class in turn as the target, [B, C] each, in O(B·C)."""
    s, t = student.log_softmax(1), teacher.log_softmax(1)
    s_rest, t_rest = _log_rest(s), _log_rest(t)
    terms = t.exp() * (t - s)
    tckd = terms + t_rest.exp() * (t_rest - s_rest)
    # Σ_{i≠c} p_i (log p_i − log q_i) / (1 − p_c) − log(1 − p_c) + log(1 − q_c). At the teacher's top class
    # the division would magnify rounding (or overflow), so that column is computed directly.
    top = t.argmax(1, keepdim=True)
    t_rest = t_rest.scatter(1, top, 0.0)
    nckd = (terms.sum(1, keepdim=True) - terms) * (-t_rest).exp() - t_rest + s_rest
    return tckd, nckd.scatter(1, top, _nckd(student, teacher, top[:, 0])[:, None])


def _of_target(every: Tensor, target: Tensor) -> Tensor:
    """The target's column of [B, C], [B]; soft labels take the expectation over the classes."""
    if target.is_floating_point():
        return (promote(target) * every).sum(1)
    return every.gather(1, target[:, None])[:, 0]


def logit_gap(logits: Float[Tensor, "b c"], target: Target) -> Float[Tensor, " b"]:
    r"""How far the target's logit lies above the best other one: $z_t - \max_{i \ne t} z_i$.

    Args:
        logits: [B, C], C ≥ 2.
        target: int64 [B] class ids, or float [B, C] soft labels, over which the gap is averaged.

    Returns:
        [B], negative where another class is ahead.

    Source: Zhao et al., CVPR 2022, appendix, which relates the best β to the teacher's gap.
    """
    z = promote(logits)
    best, second = z.topk(2, dim=1).values.split(1, dim=1)
    others = torch.where(z == best, second, best)  # two best: either's best other is the same value
    return _of_target(z - others, target)


def _log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Log p_t − log(1 − p_t) of each sample [B]: ranks samples by p_t where p_t itself rounds to 1."""
    log_p = promote(logits).log_softmax(1)
    return _of_target(log_p - _log_rest(log_p), target)


def dkd_samples(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of each sample [B], times T²."""
    student, teacher = soften(student_logits, teacher_logits, temperature)
    scale = temperature**2
    if target.is_floating_point() and target.shape == student.shape:
        tckd, nckd = _every_class(student, teacher)
        weights = promote(target)
        return (weights * tckd).sum(1) * scale, (weights * nckd).sum(1) * scale
    if target.is_floating_point() or target.shape != student.shape[:1]:
        raise ConfigError(
            f"target must be class ids int64 [{student.shape[0]}] or soft labels float "
            f"{list(student.shape)}; got {target.dtype} {list(target.shape)}"
        )
    return _tckd(student, teacher, target) * scale, _nckd(student, teacher, target) * scale


def tckd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    target: Target,
    *,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    r"""Target-class KD: the divergence of the two-way probabilities 'target' against 'all others'.

    $$\frac{T^2}{B} \sum_b \mathrm{KL}\big((p^T_t, 1 - p^T_t) \,\|\, (p^S_t, 1 - p^S_t)\big)$$

    Arguments, soft labels, errors and source: as `dkd_loss`, less the weights.
    """
    return dkd_samples(student_logits, teacher_logits, target, temperature)[0].mean()


def nckd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    target: Target,
    *,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    r"""Non-target-class KD: the divergence among the other classes, the target taken out.

    $$\frac{T^2}{B} \sum_b \mathrm{KL}\big(\hat p^T \,\|\, \hat p^S\big), \quad
    \hat p_i = p_i / \textstyle\sum_{j \ne t} p_j,\; i \ne t$$

    Zero for two classes, where nothing is left to compare. Arguments, soft labels, errors and source: as
    `dkd_loss`, less the weights.
    """
    return dkd_samples(student_logits, teacher_logits, target, temperature)[1].mean()


def dkd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    target: Target,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    r"""Decoupled KD: $\alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD}$.

    A soft label stands for its classes in expectation: the loss is $\sum_c y_c\,\mathrm{DKD}_c$, as
    cross-entropy is, so one-hot labels give what class ids give.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C], detached: the loss has a gradient for them, too, and would train the teacher.
        target: int64 [B] class ids, or float [B, C] soft labels whose rows sum to one.
        alpha: weight of TCKD.
        beta: weight of NCKD, a number; a β that follows the teacher is a setting of the method alone
            (`DKDConfig(beta="auto")`).
        temperature: T > 0; both parts are multiplied by T².

    Returns:
        A scalar: the mean over the batch, in nats.

    Raises:
        ConfigError: logits of different shapes or not [B, C] with C ≥ 2; a target that is neither; a
            temperature that is not positive; a β that is a text.

    Source: Zhao et al., CVPR 2022, equations 6 and 7. Equals the authors' code on class ids; soft labels,
    two classes and extreme logits (finite ones, up to ±1e4 at the least; not −∞) are defined here and not
    there.
    """
    if isinstance(beta, str):
        raise ConfigError(
            f"beta must be a number in dkd_loss; got {beta!r}, which is for the method: DKDConfig(beta=...)"
        )
    tckd, nckd = dkd_samples(student_logits, teacher_logits, target, temperature)
    return (alpha * tckd + beta * nckd).mean()


def _not_negative(beta: float | str) -> float | str:
    if isinstance(beta, float) and not beta >= 0:
        raise ValueError("Input should be greater than or equal to 0")
    return beta


class DKDConfig(MethodConfig):
    """Hyper-parameters of DKD; the defaults are the paper's for resnet32x4 → resnet8x4."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of TCKD."""
    # A limit on the number alone would give two errors for one value.
    beta: Annotated[float | Literal["auto", "auto-sample"], AfterValidator(_not_negative)] = 8.0
    """Weight of NCKD; the paper takes larger values for teachers with a larger logit gap. `auto`: the mean
    of that gap over the batch; `auto-sample`: each sample's own."""
    temperature: float = Field(default=4.0, gt=0)
    """Softens both probability distributions."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the DKD loss grows from nothing to its full weight."""
    nckd_samples: Literal["all", "confident", "unsure"] = "all"
    """NCKD on all samples, or only on the half of each batch of whose label the teacher is the most, or the
    least, certain (the paper's Table 5)."""


@register_method("dkd")
class DKD(LogitMethod):
    """TCKD and NCKD, each with its own weight; β = 0 or α = 0 leaves one of them."""

    Config = DKDConfig
    config: DKDConfig
    paper = "Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022"
    year = 2022

    def sample_losses(
        self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor
    ) -> dict[str, Tensor]:
        """`{"dkd": …}`."""
        c = self.config
        tckd, nckd = dkd_samples(student_logits, teacher_logits, label, c.temperature)
        beta: Tensor | float
        if isinstance(c.beta, str):
            # Where the teacher is wrong there is no knowledge to weigh up.
            beta = logit_gap(teacher_logits, label).clamp(min=0)
            beta = beta.mean() if c.beta == "auto" else beta
        else:
            beta = c.beta
        if c.nckd_samples != "all":
            rank = _log_odds(teacher_logits, label).argsort().argsort()
            confident = rank >= len(rank) // 2
            nckd = nckd * (confident if c.nckd_samples == "confident" else ~confident)
        return {"dkd": c.alpha * tckd + beta * nckd}
