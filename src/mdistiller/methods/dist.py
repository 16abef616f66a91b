r"""DIST: distillation from a stronger teacher (Huang, You, Wang, Qian, Xu: NeurIPS 2022, arXiv 2205.10536).

The probabilities of a strong teacher are hard to match exactly. Pearson's correlation requires only a linear
relation, between the classes of a sample and between the samples of a class, so the student may differ from
the teacher in shift and scale.
"""

import torch
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, Logits, Losses, Method, MethodConfig, Scalar
from mdistiller.methods.gather import gather
from mdistiller.methods.kd import soften
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs


def _deviations(p: Tensor, dim: int) -> Tensor:
    """Returns `p` less its mean along `dim`; zero without gradient where it is constant up to rounding."""
    centered = p - p.mean(dim, keepdim=True)
    norm, size = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (centered, p))
    return centered.masked_fill(norm <= 1e-6 * size, 0.0)  # NaN stays


def _distances(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Returns 1 − Pearson's correlation along `dim`; 1 where one of the two is constant."""
    s, t = _deviations(student, dim), _deviations(teacher, dim)
    # The authors' 1e-8 also suppresses classes that are absent from the batch at low temperature.
    norms = torch.linalg.vector_norm(s, dim=dim) * torch.linalg.vector_norm(t, dim=dim)
    return 1 - (s * t).sum(dim) / (norms + 1e-8)


def dist_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 4.0,
) -> Scalar:
    r"""Computes correlation distances of the softened class probabilities, per sample and per class.

    $$T^2 \Big( \frac{\beta}{B} \sum_b \big(1 - \rho(p^S_{b,:}, p^T_{b,:})\big)
    + \frac{\gamma}{C} \sum_c \big(1 - \rho(p^S_{:,c}, p^T_{:,c})\big) \Big)$$

    $p = \sigma(z / T)$, $\rho$ is Pearson's correlation. A constant row or column has correlation 0
    with everything, so with one sample the second part is the constant $\gamma T^2$. The loss is between 0
    and 2 T² (β + γ). The second part needs the samples of a batch, so logits are [B, C] and there is no
    `reduction`. Errors: as `kd_loss`.

    Source: Huang et al., NeurIPS 2022, section 4.
    """
    student, teacher = (x.softmax(1) for x in soften(student_logits, teacher_logits, temperature))
    inter = _distances(student, teacher, dim=1).mean()
    intra = _distances(student, teacher, dim=0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


class DISTConfig(MethodConfig):
    """Hyperparameters of DIST; the defaults are the authors' for CIFAR-100."""

    beta: float = Field(default=2.0, ge=0)
    """Weight of the inter-class relation, within each sample."""
    gamma: float = Field(default=2.0, ge=0)
    """Weight of the intra-class relation, within each class over the batch."""
    temperature: float = Field(default=4.0, gt=0)
    """Temperature of both probability distributions; the authors use 1 on ImageNet."""


@register_method("dist")
class DIST(Method[DISTConfig]):
    """Correlates the probabilities over the classes of a sample and over the samples of a class."""

    Config = DISTConfig
    card = Card(
        "Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022",
        "The teacher is much stronger: matches correlations instead of probabilities",
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        logits = gather(student.logits), gather(teacher.logits)
        return {"dist": dist_loss(*logits, beta=c.beta, gamma=c.gamma, temperature=c.temperature)}
