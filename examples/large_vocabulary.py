r"""Losses of large vocabularies, from hidden states and the weights of the last linear layer.

    from large_vocabulary import linear_dkd_loss, linear_kd_loss

Copy this file beside your own code; `causal_lm.py` trains with it.

Logits of 512 tokens and 151,936 words take 311 MB in float32, and a loss keeps several tensors of that size
for its gradient. Here, rows are worked off in chunks: the logits of a chunk, its losses, and at once its part
of the gradients for hidden states and weights, from formulas. No tensor of all logits ever exists.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.errors import ConfigError

Linear = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states [..., D], weights [V, D] and biases [V] of a model."""
Divergence = Literal["kl", "reverse_kl", "js"]
Rule = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Function of softened logits of student and teacher [n, V], which it may overwrite, and class ids [n] or
None. It returns the losses [n] and their gradients for the student's softened logits [n, V]."""

_LOW = -1e30  # a logit whose probability is 0; unlike −∞, its differences are finite
_CHUNK = 1 << 23  # logits of a chunk, 32 MB in float32


def _terms(teacher: Tensor, student: Tensor) -> Tensor:
    """Returns the terms p (log p − log q) of KL(p ‖ q) from log-probabilities; a term with p = 0 is zero."""
    absent = teacher == float("-inf")
    return teacher.exp() * (teacher.masked_fill(absent, 0.0) - student.masked_fill(absent, 0.0))


def _log_softmax(logits: Tensor) -> Tensor:
    """Computes log-probabilities in place."""
    return logits.sub_(logits.logsumexp(1, keepdim=True))


def _expect(p: Tensor, values: Tensor) -> Tensor:
    """Computes Σ p·values of each row in place of the values; a term with p = 0 is zero."""
    return values.masked_fill_(p == 0, 0.0).mul_(p).sum(1)


def _kl(student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes KL(p ‖ q); its gradient is q − p."""
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    p = log_p.exp()
    loss = _expect(p, log_p.sub_(log_q))
    return loss, log_q.exp_().sub_(p)


def _reverse_kl(student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes L = KL(q ‖ p); its gradient is q (log q − log p − L)."""
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    q = log_q.exp()
    terms = log_q.sub_(log_p).masked_fill_(q == 0, 0.0)
    loss = torch.mul(q, terms, out=log_p).sum(1)
    return loss, terms.sub_(loss[:, None]).mul_(q)


def _js(student: Tensor, teacher: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2.

    Its gradient is ½ q (log q − log m − KL(q ‖ m)).
    """
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    log_m = torch.logaddexp(log_q, log_p).sub_(math.log(2))
    q, p = log_q.exp(), log_p.exp()
    first = _expect(p, log_p.sub_(log_m))
    terms = log_q.sub_(log_m).masked_fill_(q == 0, 0.0)
    second = torch.mul(q, terms, out=log_m).sum(1)
    return (first + second) / 2, terms.sub_(second[:, None]).mul_(q).div_(2)


def _split(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log p_t and log(1 − p_t), [n] each; the logits become log-probabilities among the others."""
    target = logits.gather(1, column)
    rest = logits.scatter_(1, column, _LOW).logsumexp(1, keepdim=True)
    total = torch.logaddexp(target, rest)
    logits.sub_(rest)
    return (target - total)[:, 0], (rest - total)[:, 0]


def _dkd(
    student: Tensor, teacher: Tensor, target: Tensor | None, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    r"""Computes DKD.

    With $\hat q$ among the other classes, the gradient is $\alpha (q_t - p_t)$ for the target, and
    $\alpha (p_t - q_t)\,\hat q_i + \beta (\hat q_i - \hat p_i)$ for the others.
    """
    assert target is not None, "linear_dkd_loss has a target"
    column = target[:, None]
    (q_in, q_out), (p_in, p_out) = _split(student, column), _split(teacher, column)
    tckd = _terms(p_in, q_in) + _terms(p_out, q_out)
    p = teacher.exp()
    nckd = _expect(p, teacher.sub_(student))
    # The difference of two numbers near 1 is that of their complements, without the rounding.
    less = torch.where(p_in > p_out, q_out.exp() - p_out.exp(), p_in.exp() - q_in.exp())
    gradient = student.exp_().mul_((alpha * less + beta)[:, None]).sub_(p.mul_(beta))
    return alpha * tckd + beta * nckd, gradient.scatter_(1, column, -alpha * less[:, None])


def _headroom(gradient: Tensor, hidden: Tensor) -> Tensor:
    """Returns the power of two by which gradients [n, V] times hidden states [n, D] just fit float16."""
    bound = gradient.abs().sum(0).max() * hidden.abs().max().to(gradient.dtype).clamp(min=1)
    return (2.0**15 / bound.clamp(min=1e-20)).log2().floor().exp2()


class _LinearLoss(torch.autograd.Function):
    """Sum of weighted losses of all rows, whose gradients the forward pass computes, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: torch.autograd.Function,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Linear,
        target: Tensor | None,
        shares: Tensor,
        rule: Rule,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        needs = list(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=precise) if needs[1] else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=precise) if needs[2] else None
        total = shares.new_zeros(())
        t_hidden, t_weight, t_bias = teacher
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            student_logits = F.linear(hidden[rows], weight, bias).to(precise).div_(temperature)
            teacher_logits = F.linear(t_hidden[rows], t_weight, t_bias).to(precise).div_(temperature)
            losses, gradient = rule(student_logits, teacher_logits, None if target is None else target[rows])
            share = shares[rows] * temperature**2
            total = total + (losses * share).sum()
            gradient.mul_(share[:, None] / temperature)
            if d_bias is not None:
                d_bias.add_(gradient.sum(0))
            rounded = gradient.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = rounded @ weight
            if d_weight is None:
                continue
            if d_weight.dtype == rounded.dtype:
                d_weight.addmm_(rounded.T, hidden[rows])
            elif rounded.dtype == torch.float16:
                factor = _headroom(gradient, hidden[rows])
                product = gradient.mul_(factor).to(torch.float16).T @ hidden[rows]
                d_weight.add_(product.float().div_(factor))
            else:
                d_weight.add_(rounded.T @ hidden[rows])
        ctx.save_for_backward(*(x for x in (d_hidden, d_weight, d_bias) if x is not None))
        return total

    @staticmethod
    def backward(ctx: torch.autograd.Function, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outputs
        # In place: a second copy of the weights' gradient would double the memory.
        found = iter(ctx.saved_tensors)
        scaled = (next(found).mul_(scale) if needed else None for needed in list(ctx.needs_input_grad)[:3])
        return (*scaled, *(None,) * 6)


def _reduce(
    rule: Rule,
    student: Linear,
    teacher: Linear,
    target: Tensor | None,
    temperature: float,
    reduction: str,
    ignore_index: int,
    mask: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """Checks the arguments of a loss and computes it; `student` and `teacher` are hidden, weight and bias."""
    _check(student, teacher, target, mask, temperature, reduction, chunk_size)
    hidden, weight, bias = student
    keep = None if mask is None else mask.reshape(-1)
    if target is not None:
        target = target.reshape(-1)
        labeled = target != ignore_index
        target = target.masked_fill(~labeled, 0)
        keep = labeled if keep is None else keep & labeled
    precise = torch.promote_types(hidden.dtype, torch.float32)
    hidden, t_hidden = (x.reshape(-1, x.shape[-1]) for x in (hidden, teacher[0]))
    if keep is None:
        shares = torch.ones(len(hidden), dtype=precise, device=hidden.device)
    else:
        shares = keep.to(precise)
        hidden, t_hidden = (x.masked_fill(~keep[:, None], 0.0) for x in (hidden, t_hidden))
    # Outside of the function, so that a loss scale comes before the rounding to half precision.
    count = shares.sum().clamp(min=1) if reduction == "mean" else 1
    chunk = chunk_size or max(1, _CHUNK // weight.shape[0])
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        hidden, weight, t_hidden = hidden.to(half), weight.to(half), t_hidden.to(half)
        bias = None if bias is None else bias.to(half)
        teacher = t_hidden, teacher[1].to(half), None if teacher[2] is None else teacher[2].to(half)
    with torch.autocast(device, enabled=False):
        given = (t_hidden.detach(), *(x if x is None else x.detach() for x in teacher[1:]))
        total: Tensor = _LinearLoss.apply(
            hidden, weight, bias, given, target, shares, rule, temperature, chunk
        )
        return total / count


def _check(
    student: Linear,
    teacher: Linear,
    target: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    chunk: int | None,
) -> None:
    """Raises a `ConfigError` for arguments that do not fit together."""
    leading = list(student[0].shape[:-1])
    for name, (hidden, weight, bias) in (("student", student), ("teacher", teacher)):
        fits = weight.ndim == 2 and hidden.ndim > 0 and hidden.shape[-1] == weight.shape[1]
        fits = fits and list(hidden.shape[:-1]) == leading and weight.shape[0] == student[1].shape[0] > 1
        if not fits or (bias is not None and bias.shape != weight.shape[:1]):
            raise ConfigError(
                "hidden states [..., D] and weights [V, D], V ≥ 2, of student and teacher must have one [...]"
                f" and one V, and a bias the shape [V]; got of the {name} {list(hidden.shape)}, "
                f"{list(weight.shape)} and bias {None if bias is None else list(bias.shape)}, where the "
                f"student has {leading} and {student[1].shape[0]} classes"
            )
    if target is not None and (target.is_floating_point() or list(target.shape) != leading):
        raise ConfigError(
            f"target must be class ids int64 {leading}; got {target.dtype} {list(target.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or list(mask.shape) != leading):
        raise ConfigError(f"mask must be bool {leading}; got {mask.dtype} {list(mask.shape)}")
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive; got {temperature}")
    if reduction not in ("mean", "sum"):
        raise ConfigError(
            f"reduction must be 'mean' or 'sum'; got {reduction!r}, but the gradient is computed with the "
            "loss, for one number"
        )
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk_size must be a number of rows, 1 or more, or None; got {chunk}")


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: Divergence = "kl",
    temperature: float = 4.0,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Computes a divergence of class probabilities, times T², without a tensor of all logits.

    With the teacher's p and the student's q at temperature T: `kl` is $\mathrm{KL}(p \| q)$ and equals
    `kd_loss` of the logits, `reverse_kl` is $\mathrm{KL}(q \| p)$, and `js` the Jensen-Shannon divergence
    $\frac12 \mathrm{KL}(p \| m) + \frac12 \mathrm{KL}(q \| m)$, $m = (p + q) / 2$.

    The gradient for the student's hidden states, weights and bias is computed in the forward pass. The
    teacher gets none, and it can be propagated once, without a second derivative. Products of matrices are in
    the type of the hidden states (or autocast's), all else in at least float32.

    Args:
        student_hidden: [..., D], the input of the student's last layer.
        student_weight: [V, D], its weights; a class that both models shall leave out has a bias of −∞.
        teacher_hidden: [..., D'].
        teacher_weight: [V, D'].
        target: int64 [...] class ids, read only to find ignored rows.
        student_bias: [V].
        teacher_bias: [V].
        divergence: "kl", "reverse_kl" or "js".
        temperature: T > 0.
        reduction: "mean" over the rows that are not ignored, or "sum".
        ignore_index: class id of rows that are ignored.
        mask: bool [...], False for rows that are ignored as well.
        chunk_size: rows that are worked off at once; None: as many as have 2²³ logits. The memory beside the
            gradients is a few times that of a chunk's logits in float32.

    Returns:
        The loss in nats.

    Raises:
        ConfigError: shapes that do not fit together; a temperature that is not positive; an unknown
            divergence or reduction.

    Source: Hinton et al. 2015; the loss and its gradient in chunks follow Hsu et al. 2024 (Liger Kernel).
    """
    rules: dict[str, Rule] = {"kl": _kl, "reverse_kl": _reverse_kl, "js": _js}
    if divergence not in rules:
        raise ConfigError(f"divergence must be 'kl', 'reverse_kl' or 'js'; got {divergence!r}")
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    settings = temperature, reduction, ignore_index, mask, chunk_size
    return _reduce(rules[divergence], student, teacher, target, *settings)


def linear_dkd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Computes decoupled KD without a tensor of all logits; it equals `dkd_loss` of the logits.

    `target` is class ids int64 [...], α and β are as in `dkd_loss`. All else, errors too, is as in
    `linear_kd_loss`.

    Source: Zhao et al., CVPR 2022, equations 6 and 7; the chunks as in `linear_kd_loss`.
    """
    rule = functools.partial(_dkd, alpha=alpha, beta=beta)
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    settings = temperature, reduction, ignore_index, mask, chunk_size
    return _reduce(rule, student, teacher, target, *settings)
