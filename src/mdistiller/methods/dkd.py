r"""Decoupled Knowledge Distillation (Zhao, Cui, Song, Qiu, Liang: CVPR 2022, arXiv 2203.08679).

With $p$ the softened probabilities, $t$ the target, $b = (p_t, 1 - p_t)$ and $\hat p_i = p_i / (1 - p_t)$
for $i \ne t$, the KD loss splits exactly into

$$\mathrm{KL}(p^T \| p^S) = \mathrm{KL}(b^T \| b^S) + (1 - p^T_t)\,\mathrm{KL}(\hat p^T \| \hat p^S)
= \mathrm{TCKD} + (1 - p^T_t)\,\mathrm{NCKD}.$$

The factor $1 - p^T_t$ suppresses NCKD where the teacher is confident; DKD weights the two parts freely.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import (
    Card,
    Example,
    Labels,
    LogitMethod,
    Logits,
    Losses,
    MethodConfig,
    Needs,
    not_negative,
    promote,
)
from mdistiller.methods.kd import (
    AnyLogits,
    Loss,
    Mask,
    Reduction,
    Target,
    check_target,
    divergence,
    reduce_samples,
    soften,
)
from mdistiller.methods.registry import register_method
from mdistiller.types import IGNORED, DataInfo

_MINUS_INF = float("-inf")
_LOW = -1e30  # a logit whose probability is 0; unlike −∞, its differences are finite


def _tckd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Computes TCKD of each sample [B] from softened logits [B, C] and class ids [B]."""
    (s_target, s_rest), (t_target, t_rest) = _split(student, target), _split(teacher, target)
    return divergence(t_target, s_target) + t_rest.exp() * (t_rest - s_rest)


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Computes log p_t and log(1 − p_t) of each sample [B]."""
    log_p, column = logits.log_softmax(1), target[:, None]
    return log_p.gather(1, column)[:, 0], log_p.scatter(1, column, _LOW).logsumexp(1)


def _nckd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Computes NCKD of each sample [B] from softened logits [B, C] and class ids [B]."""
    column = target[:, None]
    absent = (teacher == _MINUS_INF).scatter(1, column, True)
    s = student.scatter(1, column, _LOW).log_softmax(1).masked_fill(absent, 0.0)
    t = teacher.scatter(1, column, _LOW).log_softmax(1).masked_fill(absent, 0.0)
    return (t.exp() * (t - s)).sum(1)


def _log_rest(log_p: Tensor) -> Tensor:
    """Returns log(1 − p_c) of every class c [B, C], exact also near p_c = 1, unlike log1p."""
    top = log_p.argmax(1, keepdim=True)
    others = log_p.scatter(1, top, _LOW)
    return torch.log1p(-others.exp()).scatter(1, top, others.logsumexp(1, keepdim=True))


def _every_class(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Computes TCKD and NCKD with each class in turn as the target, [B, C] each, in O(B·C)."""
    s, t = student.log_softmax(1), teacher.log_softmax(1)
    s_rest, t_rest = _log_rest(s), _log_rest(t)
    terms = divergence(t, s)
    tckd = terms + divergence(t_rest, s_rest)
    # Σ_{i≠c} p_i (log p_i − log q_i) / (1 − p_c) − log(1 − p_c) + log(1 − q_c). At the teacher's top class
    # the division would magnify rounding (or overflow), so that column is computed directly.
    top = t.argmax(1, keepdim=True)
    s_rest, t_rest = s_rest.scatter(1, top, 0.0), t_rest.scatter(1, top, 0.0)
    nckd = (terms.sum(1, keepdim=True) - terms) * (-t_rest).exp() - t_rest + s_rest
    return tckd, nckd.scatter(1, top, _nckd(student, teacher, top[:, 0])[:, None])


def _of_target(every: Tensor, target: Tensor) -> Tensor:
    """Returns the target's column of [B, C], [B]; for soft labels the expectation over the classes."""
    if target.is_floating_point():
        return (promote(target) * every.masked_fill(target == 0, 0.0)).sum(1)
    return every.gather(1, target[:, None])[:, 0]


def logit_gap(logits: Logits, target: Labels) -> Float[Tensor, " b"]:
    r"""Computes the target's logit less the largest other one: $z_t - \max_{i \ne t} z_i$.

    It is negative where another class has a larger logit, and an average over soft labels.

    Source: Zhao et al., CVPR 2022, appendix, which relates the best β to the teacher's gap.
    """
    z = promote(logits)
    best, second = z.topk(2, dim=1).values.split(1, dim=1)
    others = torch.where(z == best, second, best)  # with two best, either one's best other has the same value
    return _of_target(z - others, target)


def _log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Returns log p_t − log(1 − p_t) of each sample [B], which ranks samples even where p_t rounds to 1."""
    log_p = promote(logits).log_softmax(1)
    return _of_target(log_p - _log_rest(log_p), target)


def dkd_samples(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Computes TCKD and NCKD of each sample [B], times T², from logits [B, C]."""
    student, teacher = soften(student_logits, teacher_logits, temperature)
    check_target(student, target)
    if target.is_floating_point():
        tckd, nckd = (_of_target(every, target) for every in _every_class(student, teacher))
    else:
        nckd, tckd = _nckd(student, teacher, target), _tckd(student, teacher, target)
    return tckd * temperature**2, nckd * temperature**2


def dkd_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    target: Target,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORED,
    mask: Mask | None = None,
) -> Loss:
    r"""Computes decoupled KD, $\alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD}$.

    A soft label stands for its classes in expectation: the loss is $\sum_c y_c\,\mathrm{DKD}_c$, as
    cross-entropy is, so one-hot labels give the same loss as class ids. A class whose logit is −∞ in both
    models (masked or padded) has no part in the sum. The loss and its gradient are finite for finite logits
    up to at least ±1e4. With β = 0 or α = 0 it is TCKD or NCKD alone; NCKD is zero for two classes.

    Args:
        student_logits: [..., C]; the mean is over all leading positions.
        teacher_logits: [..., C], detached: the loss also has a gradient for the teacher.
        target: int64 [...] class ids, or float [..., C] soft labels whose rows sum to one.
        alpha: weight of TCKD.
        beta: weight of NCKD, a number; only the method takes a β that follows the teacher
            (`DKDConfig(beta="auto")`).
        temperature: T > 0; both parts are multiplied by T².
        reduction: "mean", "sum", or "none" for the losses [...] of all samples.
        ignore_index: class id of samples that have no part in the mean and the sum, and 0 in "none".
        mask: bool [...], False for samples that are ignored as well.

    Returns:
        The loss in nats.

    Raises:
        ConfigError: as `kd_loss`; a β that is a string.

    Source: Zhao et al., CVPR 2022, equations 6 and 7. Equals the authors' code on class ids; soft labels, two
    classes and extreme or infinite logits are defined only here.
    """
    if isinstance(beta, str):
        raise ConfigError(
            f"beta must be a number in dkd_loss; got {beta!r}, which is for the method: DKDConfig(beta=...)"
        )

    def samples(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        tckd, nckd = dkd_samples(student, teacher, target, temperature)
        return alpha * tckd + beta * nckd

    return reduce_samples(samples, student_logits, teacher_logits, target, reduction, ignore_index, mask)


class DKDConfig(MethodConfig):
    """Hyperparameters of DKD; the defaults are the paper's for resnet32x4 → resnet8x4."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of TCKD."""
    # A `ge` limit on the float would give two errors for one wrong value.
    beta: Annotated[float | Literal["auto", "auto-sample"], AfterValidator(not_negative)] = 8.0
    """Weight of NCKD; larger in the paper for teachers with a larger logit gap. `auto`: the mean gap of the
    batch; `auto-sample`: the gap of each sample."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both probability distributions."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the DKD loss grows from zero to its full weight."""
    nckd_samples: Literal["all", "confident", "unsure"] = "all"
    """Samples with NCKD: all, or the half of each batch with the teacher's highest (`confident`) or lowest
    (`unsure`) probability of the label (the paper's Table 5)."""


@register_method("dkd")
class DKD(LogitMethod[DKDConfig]):
    """Weights target-class (TCKD) and non-target-class (NCKD) distillation separately."""

    Config = DKDConfig
    card = Card(
        "Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022",
        "The teacher is so confident that KD transfers little; you choose β",
        example=Example(),
    )
    needs = Needs(labels=True, every_label=False)

    def __init__(
        self, config: DKDConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        if self.has_unlabeled and (config.beta == "auto" or config.nckd_samples != "all"):
            raise ConfigError(
                f"method: got beta={config.beta!r} and nckd_samples={config.nckd_samples!r}; with training "
                "images without a class, allowed are beta a number or 'auto-sample', and nckd_samples 'all'"
            )

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        c = self.config
        tckd, nckd = dkd_samples(student_logits, teacher_logits, label, c.temperature)
        beta: Tensor | float | str = c.beta
        if isinstance(beta, str):
            # A negative gap, where the teacher is wrong, gives no weight.
            gap = logit_gap(teacher_logits, label).clamp(min=0)
            beta = gap.mean() if beta == "auto" else gap
        if c.nckd_samples != "all":
            rank = _log_odds(teacher_logits, label).argsort().argsort()
            confident = rank >= len(rank) // 2
            nckd = nckd * (confident if c.nckd_samples == "confident" else ~confident)
        return {"dkd": c.alpha * tckd + beta * nckd}
