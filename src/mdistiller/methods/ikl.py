r"""IKL: Improved KL divergence (Cui, Tian, Zhong, Qi, Yu, Zhang: NeurIPS 2024, arXiv 2305.13948).

The gradient of the KL divergence is that of a cross-entropy with soft labels plus that of a squared error of
logit differences, weighted by the teacher's probabilities (decoupled KL, DKL). With a fixed teacher, the
squared error has no gradient for the student. IKL gives it one, and may weight it by the mean probabilities
of the image's class.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, LogitMethod, Losses, MethodConfig, exact, promote
from mdistiller.methods.class_means import ClassMeans, class_shares
from mdistiller.methods.kd import (
    AnyLogits,
    Loss,
    Mask,
    Reduction,
    absent_classes,
    ignored_rows,
    reduce_samples,
    soften,
)
from mdistiller.methods.registry import register_method
from mdistiller.taps import probe
from mdistiller.types import DataInfo


def ikl_loss(
    student_logits: AnyLogits,
    teacher_logits: AnyLogits,
    weights: AnyLogits | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    weight_temperature: float = 100.0,
    reduction: Reduction = "mean",
    mask: Mask | None = None,
) -> Loss:
    r"""Computes the decoupled KL: a cross-entropy and a squared error of logit differences.

    $$\frac1B \sum_b \Big( -\alpha \sum_c p^T_c \log p^S_c + \frac{\beta}{4} \sum_{ij} w_i w_j
    \big( (z^T_i - z^T_j) - (z^S_i - z^S_j) \big)^2 \Big), \quad p = \sigma(z / T)$$

    without a factor T², in O(B·C). At α = β = 1, with w the teacher's probabilities at T = 1, the gradients
    for student and teacher together are those of the KL divergence.

    Args:
        student_logits: [..., C], C ≥ 2; B counts all leading positions.
        teacher_logits: [..., C], detached.
        weights: w, probabilities [..., C], such as the mean ones of the image's class. None: the teacher's
            own, $\sigma(z^T / T_w)$.
        alpha: weight of the cross-entropy.
        beta: weight of the squared error.
        temperature: T > 0 of the cross-entropy.
        weight_temperature: T_w > 0.
        reduction: "mean", "sum", or "none" for the losses [...] of all samples.
        mask: bool [...], False for samples that have no part in the mean and the sum, and 0 in "none".

    Raises:
        ConfigError: as `kd_loss`; weights of another shape.

    Source: Cui et al., NeurIPS 2024, equation of the IKL loss for distillation; equals the authors' code.
    """
    if not weight_temperature > 0:
        raise ConfigError(f"weight_temperature must be positive; got {weight_temperature}")
    if weights is None:
        weights = (promote(teacher_logits.detach()) / weight_temperature).softmax(-1)
    if weights.shape != student_logits.shape:
        raise ConfigError(
            f"weights must have the logits' shape {list(student_logits.shape)}; got {list(weights.shape)}"
        )
    rows = promote(weights).reshape(-1, weights.shape[-1])
    if mask is not None:
        rows = rows.masked_fill(ignored_rows(mask, weights.shape[:-1])[:, None], 0.0)

    def samples(student: Tensor, teacher: Tensor, target: None) -> Tensor:
        student, teacher = soften(student, teacher, temperature)
        absent = absent_classes(student, teacher)
        cross_entropy = -(teacher.softmax(1) * student.log_softmax(1).masked_fill(absent, 0.0)).sum(1)
        difference = (student - teacher).masked_fill(absent, 0.0) * temperature
        shares = rows.masked_fill(absent, 0.0)
        total = shares.sum(1)
        # Σ_ij p_i p_j (d_i − d_j)² = 2 Σ_i p_i Σ_j p_j (d_j − mean)², which does not cancel for large d.
        mean = (shares * difference).sum(1) / total.clamp(min=torch.finfo(total.dtype).tiny)
        squared = total * (shares * (difference - mean[:, None]).square()).sum(1) / 2
        return alpha * cross_entropy + beta * squared

    return reduce_samples(samples, student_logits, teacher_logits, None, reduction, mask=mask)


class IKLConfig(MethodConfig):
    """Hyperparameters of IKL; the defaults are the authors' for resnet32x4 → resnet8x4."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with the teacher's probabilities."""
    beta: float = Field(default=8.0, ge=0)
    """Weight of the squared error of logit differences."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of the cross-entropy."""
    weights: Literal["sample", "class"] = "sample"
    """Weights in the squared error: the teacher's probabilities of the image (`sample`), or their mean over
    all images of its class so far (`class`)."""
    weight_temperature: float = Field(default=100.0, gt=0)
    """Temperature of these probabilities; 100 makes them nearly equal."""
    warmup: float = Field(default=20 / 240, ge=0, le=1)
    """Fraction of training over which the loss grows from zero to its full weight."""


@register_method("ikl")
class IKL(LogitMethod[IKLConfig]):
    """Adds a weighted squared error of logit differences to the cross-entropy of KD."""

    Config = IKLConfig
    card = Card(
        "Cui, Tian, Zhong, Qi, Yu, Zhang: Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024",
        "You want to match pairwise logit differences as well as probabilities",
        example=Example(),
    )

    def __init__(self, config: IKLConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        if config.weights == "class":
            if self.has_unlabeled:
                raise ConfigError(
                    "method.weights: got 'class'; with training images without a class, allowed is 'sample'"
                )
            self.needs = replace(self.needs, labels=True)
            classes = probe(teacher, (), data).logits.shape[1]
            self.means = ClassMeans(classes, classes)

    def sample_losses(self, student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Losses:
        """Computes the loss [B]; in training, it first adds the batch to the means of the classes."""
        c = self.config
        weights = (promote(teacher_logits.detach()) / c.weight_temperature).softmax(1)
        if c.weights == "class":
            shares = class_shares(label, weights.shape[1], weights.dtype)
            if self.training:
                self.means.update(weights, shares)
            with exact(shares):
                weights = shares @ self.means().to(shares.dtype)
        loss = partial(ikl_loss, alpha=c.alpha, beta=c.beta, temperature=c.temperature, reduction="none")
        return {"ikl": loss(student_logits, teacher_logits, weights)}
