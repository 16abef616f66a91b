"""Relational Knowledge Distillation (Park, Kim, Lu, Cho: CVPR 2019, arXiv 1904.05068)."""

from functools import partial

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mdistiller.methods.base import Card, Example, Losses, Scalar, exact
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Vectors, Weight, sum_pairs
from mdistiller.methods.pkt import float_embeddings
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs

_EPS = 1e-12


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns distances [B, B] over their mean, and cosines [B, B, B] of the angle at i between j and k."""
    # ‖a‖² + ‖b‖² − 2ab would lose the digits of small distances.
    difference = x[None] - x[:, None]
    square = difference.square().sum(2)
    # Equal samples have no distance, no direction and no gradient.
    equal = square <= _EPS
    root = square.masked_fill(equal, 1.0).sqrt()
    unit = difference / root[:, :, None]
    distance = root.masked_fill(equal, 0.0)
    mean = distance.sum() / max(len(x) * (len(x) - 1), 1)
    return distance / mean.clamp(min=_EPS), unit @ unit.mT


def rkd_loss(
    student_embedding: Vectors,
    teacher_embedding: Vectors,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
) -> Scalar:
    r"""Computes the differences of distances and angles among samples between two embeddings.

    $$\frac{\lambda_D}{B^2} \sum_{i,j} \ell_1(d^S_{ij}, d^T_{ij}) +
    \frac{\lambda_A}{B^3} \sum_{i,j,k} \ell_1(\cos\angle^S_{jik}, \cos\angle^T_{jik})$$

    where $d_{ij} = \|x_i - x_j\| / \mu$, $\mu$ is the mean over all pairs of different samples, the angle at
    $i$ is that between $x_j - x_i$ and $x_k - x_i$, and $\ell_1$ is the Huber loss with threshold 1. The loss
    relates the samples of a batch: with several processes, gather the embeddings first. Memory grows with B³.
    Equal samples have distance and cosine 0, and no gradient, so the loss is 0 for a batch of one. Errors: as
    `float_embeddings`.

    Source: Park et al., CVPR 2019, equations 4 to 9.
    """
    student, teacher = float_embeddings(student_embedding, teacher_embedding)
    with exact(student):
        s_distance, s_angle = _relations(student)
        t_distance, t_angle = _relations(teacher)
    distance = F.smooth_l1_loss(s_distance, t_distance)
    return distance_weight * distance + angle_weight * F.smooth_l1_loss(s_angle, t_angle)


class RKDConfig(FeatureConfig):
    """Hyperparameters of RKD; the defaults are the usual ones for CIFAR-100."""

    weight: Weight = 1.0
    """Weight of the RKD loss."""
    distance_weight: float = Field(default=25.0, ge=0)
    """Weight of the distances between two samples within the RKD loss."""
    angle_weight: float = Field(default=50.0, ge=0)
    """Weight of the angles among three samples within the RKD loss."""


@register_method("rkd")
class RKD(FeatureMethod[RKDConfig]):
    """Matches the distances and angles among the samples in the teacher's embedding."""

    Config = RKDConfig
    sequences = True
    card = Card(
        "Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019",
        "Embeddings for search or metric learning: distances and angles between images",
        example=Example(("pooled",), ("pooled",)),
    )
    taps_by_default = "pooled"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        c = self.config
        loss = partial(rkd_loss, distance_weight=c.distance_weight, angle_weight=c.angle_weight)
        return {"rkd": self.weight * sum_pairs(loss, *self.gathered(student, teacher))}
