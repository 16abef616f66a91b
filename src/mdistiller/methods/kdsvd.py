"""Distillation by singular value decomposition (Lee, Kim, Song: ECCV 2018, arXiv 1807.06819)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import STAGES, Card, Example, Losses, Scalar, exact
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Maps, Weight, map_pairs
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs

# Number of additional student vectors among which the match of a teacher's vector is sought.
_MORE = 3
# Smaller gaps between eigenvalues, relative to the largest one, are damped in the gradient: the vectors of
# equal eigenvalues are arbitrary, and their derivative is infinite.
_GAP = 1e-7


def _decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns singular values [B, min(M, W)], descending, and right vectors [B, W, W] of x [B, M, W]."""
    # R has the singular values and right vectors of x and is smaller.
    r = torch.linalg.qr(x.detach(), mode="r").R
    _, values, vectors = torch.linalg.svd(r)
    return values, vectors.mT


def _aligned(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns matched leading right vectors of two matrices [B, M, W], [B, W, k] each.

    Each of the teacher's vectors is matched with the student's vector of the largest absolute cosine, with
    its sign aligned. Both are scaled by the teacher's singular values. Only the student gets a gradient.
    """
    s_values, s_vectors = _decompose(student)
    t_values, t_vectors = _decompose(teacher)
    target = t_vectors[:, :, :k]
    # Vectors beyond the singular values are an arbitrary basis and are left out.
    cosine = s_vectors[:, :, : min(k + _MORE, s_values.shape[1])].mT @ target
    best = cosine.abs().argmax(1, keepdim=True)  # [B, 1, k]
    sign = cosine.gather(1, best).sign()
    chosen = s_vectors.gather(2, best.expand(-1, s_vectors.shape[1], -1))

    # Derivative of an eigenvector of xᵀx: dv = Σ_j v_j (v_jᵀ d(xᵀx) v) / (λ − λ_j). `change` is zero and has
    # the gradient.
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


def kdsvd_loss(student_features: Maps, teacher_features: Maps, *, k: int = 1) -> Scalar:
    r"""Computes the squared difference of the relations between singular vectors of neighboring stages.

    $$\frac{1}{B} \sum_{b} \sum_{l \ge 2} \sum_{i,j,n} \big( e^{-(s_{l,in} - s_{l-1,jn})^2 / 8} -
    e^{-(t_{l,in} - t_{l-1,jn})^2 / 8} \big)^2$$

    $t_{l,\cdot n}$ is the n-th right singular vector, $n \le k$, of the teacher's map [B, C, H, W] as a
    matrix [C·H, W], times its singular value over the norm of the first k; k is smaller if the smallest of
    the teacher's matrices has fewer vectors. $s_{l,\cdot n}$ is the most similar one of the student's first
    k + 3 vectors, with the same sign and factor. The larger map is average-pooled to the size of the smaller
    one; channels may differ. The teacher gets no gradient. Errors: as `map_pairs`; fewer than two pairs; k
    below 1.

    Source: Lee, Kim and Song, ECCV 2018, with the matrices and scales of the reference code base. As in that
    code, the signs of the teacher's vectors are those of the decomposition.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1; got {k}")
    _check_count(len(student_features))
    pairs = map_pairs(student_features, teacher_features)
    k = min(k, *(min(t.shape[1] * t.shape[2], t.shape[3]) for _, t in pairs))
    with exact(pairs[0][0]):
        # The decomposition refuses values that are not finite, so it gets zeros, and the loss becomes NaN.
        finite = torch.stack([x.isfinite().all() for pair in pairs for x in pair]).all()
        vectors = [_aligned(_matrices(s), _matrices(t), k) for s, t in pairs]
        terms = [
            (_rbf(s, s_before) - _rbf(t, t_before)).square().sum() / len(s)
            for (s_before, t_before), (s, t) in pairwise(vectors)
        ]
    return torch.stack(terms).sum().where(finite, torch.nan)


def _check_count(stages: int) -> None:
    if stages < 2:
        raise ConfigError(f"kdsvd relates each stage to the one before: it needs at least two, got {stages}")


def _matrices(x: Tensor) -> Tensor:
    """Reshapes maps [B, C, H, W] to finite matrices [B, C·H, W]."""
    return x.flatten(1, 2).nan_to_num(0.0, 0.0, 0.0)


def _rbf(x: Tensor, y: Tensor) -> Tensor:
    """Computes the radial basis function of vectors [B, W, k] and [B, V, k], [B, W, V, k]."""
    return (-(x[:, :, None] - y[:, None]).square() / 8).exp()


class KDSVDConfig(FeatureConfig):
    """Hyperparameters of KDSVD; the defaults are the usual ones for CIFAR-100."""

    weight: Weight = 1.0
    """Weight of the loss."""
    k: int = Field(default=1, ge=1)
    """Number of singular vectors compared per map."""


@register_method("kdsvd")
class KDSVD(FeatureMethod[KDSVDConfig]):
    """Matches the relations between the leading singular vectors of neighboring stages."""

    Config = KDSVDConfig
    card = Card(
        "Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, "
        "ECCV 2018",
        "A baseline that older papers report: compares changes between stages",
        example=Example(STAGES, STAGES),
    )

    def __init__(self, config: KDSVDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        _check_count(len(self.student_taps))  # before the first step

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        loss = kdsvd_loss(*self.read(student, teacher, batch.image), k=self.config.k)
        return {"kdsvd": self.weight * loss}
