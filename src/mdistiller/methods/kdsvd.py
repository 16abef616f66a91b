r"""Distillation by singular value decomposition (Lee, Kim, Song: ECCV 2018, arXiv 1807.06819).

A feature map is summed up by its leading right singular vectors; what is transferred is how those of one
stage relate to those of the stage before, through a radial basis function (RBF).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.at import map_pairs
from mdistiller.methods.base import exact
from mdistiller.methods.features import FeatureConfig, FeatureMethod
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs

# The student's vector that meets a teacher's is sought among this many more than the teacher has.
_MORE = 3
# Gaps between eigenvalues below this fraction of the largest fade out of the gradient: the vectors of equal
# eigenvalues are arbitrary, and their derivative infinite.
_GAP = 1e-7


def _decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Constants: singular values [B, min(M, W)] of x [B, M, W], largest first, right vectors [B, W, W]."""
    # R has the singular values and right vectors of x, and is small.
    r = torch.linalg.qr(x.detach(), mode="r").R
    _, values, vectors = torch.linalg.svd(r)
    return values, vectors.mT


def _aligned(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Leading right vectors of matrices [B, M, W], [B, W, k] each, with the student's gradient.

    For each of the teacher's, that of the student's with the largest absolute cosine, its sign turned; both
    are scaled by the teacher's singular values.
    """
    s_values, s_vectors = _decompose(student)
    t_values, t_vectors = _decompose(teacher)
    target = t_vectors[:, :, :k]
    # Without those beyond the singular values, which are any basis of the rest.
    cosine = s_vectors[:, :, : min(k + _MORE, s_values.shape[1])].mT @ target
    best = cosine.abs().argmax(1, keepdim=True)  # [B, 1, k]
    sign = cosine.gather(1, best).sign()
    chosen = s_vectors.gather(2, best.expand(-1, s_vectors.shape[1], -1))

    # The derivative of an eigenvector of xᵀx: dv = Σ_j v_j (v_jᵀ d(xᵀx) v) / (λ − λ_j). Here `change` is zero
    # and carries the gradient.
    largest = s_values[:, :1].clamp_min(torch.finfo(student.dtype).tiny)
    x, values = student / largest[:, :, None], s_values / largest
    gram = x.mT @ x
    change = s_vectors.mT @ (gram - gram.detach()) @ chosen
    own = values.gather(1, best[:, 0])[:, None, :]
    other = F.pad(values, (0, x.shape[2] - values.shape[1]))[:, :, None]
    gap = (own - other) * (own + other)
    chosen = chosen + s_vectors @ (change * gap / (gap.square() + _GAP**2))

    scale = F.normalize(t_values[:, :k])[:, None, :]
    return chosen * sign * scale, target * scale


def kdsvd_loss(
    student_features: list[Float[Tensor, "b _ _ _"]],
    teacher_features: list[Float[Tensor, "b _ _ _"]],
    *,
    k: int = 1,
) -> Float[Tensor, ""]:
    r"""Squared difference of the relations between the singular vectors of neighbouring stages.

    $$\frac{1}{B} \sum_{b} \sum_{l \ge 2} \sum_{i,j,n} \big( e^{-(s_{l,in} - s_{l-1,jn})^2 / 8} -
    e^{-(t_{l,in} - t_{l-1,jn})^2 / 8} \big)^2$$

    $t_{l,\cdot n}$ is the n-th right singular vector, $n \le k$, of the teacher's map as a matrix
    [C·H, W], times its singular value over the norm of the first k; $s_{l,\cdot n}$ is the most similar of
    the student's first k + 3, with the sign that agrees and the same factor. Where sizes differ, the
    larger map is average-pooled to the smaller one's; channels may differ. The teacher gets no gradient.

    Args:
        student_features: one [B, C, H, W] a stage, at least two.
        teacher_features: as many, of the same B.
        k: how many singular vectors, at least 1; fewer if the smallest of the teacher's matrices has fewer.

    Returns:
        A scalar: the sum over stages, positions and vectors, the mean over the batch.

    Raises:
        ConfigError: fewer than two pairs, lists of different length, different batch sizes, features that
            are no maps, k below 1.

    Source: Lee, Kim and Song, ECCV 2018, with the matrices and scales of the reference code base. The signs
    of the teacher's vectors are the decomposition's, as there.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1; got {k}")
    if len(student_features) < 2:
        raise ConfigError(
            f"kdsvd relates each stage to the one before: it needs at least two, got {len(student_features)}"
        )
    pairs = map_pairs(student_features, teacher_features)
    k = min(k, *(min(t.shape[1] * t.shape[2], t.shape[3]) for _, t in pairs))
    with exact(pairs[0][0]):
        # The decomposition refuses what is not finite; the loss has to show it, as others do.
        finite = torch.stack([x.isfinite().all() for pair in pairs for x in pair]).all()
        vectors = [_aligned(_matrices(s), _matrices(t), k) for s, t in pairs]
        terms = [
            (_rbf(s, s_before) - _rbf(t, t_before)).square().sum() / len(s)
            for (s_before, t_before), (s, t) in pairwise(vectors)
        ]
    return torch.stack(terms).sum().where(finite, torch.nan)


def _matrices(x: Tensor) -> Tensor:
    """[B, C, H, W] to finite [B, C·H, W]."""
    return x.flatten(1, 2).nan_to_num(0.0, 0.0, 0.0)


def _rbf(x: Tensor, y: Tensor) -> Tensor:
    """[B, W, k] and [B, V, k] to [B, W, V, k]."""
    return (-(x[:, :, None] - y[:, None]).square() / 8).exp()


class KDSVDConfig(FeatureConfig):
    """Hyper-parameters of KDSVD; the defaults are the field's for CIFAR-100."""

    weight: float = Field(default=1.0, ge=0)
    """Weight of the loss."""
    k: int = Field(default=1, ge=1)
    """How many singular vectors of each map are compared."""


@register_method("kdsvd")
class KDSVD(FeatureMethod):
    """Match how the leading singular vectors of one stage relate to those of the next."""

    Config = KDSVDConfig
    config: KDSVDConfig
    paper = (
        "Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018"
    )
    year = 2018

    def __init__(
        self, config: KDSVDConfig, student: nn.Module, teacher: nn.Module | None, data: DataInfo
    ) -> None:
        super().__init__(config, student, teacher, data)
        if len(self.student_taps) < 2:
            raise ConfigError(
                "kdsvd relates each stage to the one before: it needs at least two taps, got "
                f"{list(self.student_taps)}"
            )

    def forward(
        self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor
    ) -> dict[str, Tensor]:
        """`{"task": …, "kdsvd": …}`."""
        loss = kdsvd_loss(*self.read(student, teacher), k=self.config.k)
        return {"task": self.task_loss(student, batch), "kdsvd": self.config.weight * loss}
