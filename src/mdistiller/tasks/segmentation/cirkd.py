r"""Cross-image relational distillation, its mini-batch pixel-to-pixel term (Yang, Zhou, An, Jiang, Xu, Zhang:
CVPR 2022, arXiv 2204.06986).

With unit vectors $f$ of all positions, each pair of images $i, j$ of a batch has similarities
$S_{ij} = F_i F_j^\top$, whose rows become distributions: $L = \frac{1}{B^2} \sum_{i,j} \frac{1}{N} \sum_a
\mathrm{KL}\big(\sigma(S^T_{ij,a} / \tau) \,\|\, \sigma(S^S_{ij,a} / \tau)\big)$.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Losses, Scalar, exact, promote
from mdistiller.methods.features import FeatureConfig, sum_pairs
from mdistiller.methods.kd import divergence
from mdistiller.tasks.segmentation.pixels import MapMethod, check_maps
from mdistiller.types import Batch, Outputs


def cirkd_loss(
    student: Float[Tensor, "b _ h w"],
    teacher: Float[Tensor, "b _ h w"],
    *,
    temperature: float = 0.1,
    pool: int = 1,
) -> Scalar:
    r"""Computes the divergence of each pixel's similarities to the pixels of every image of the batch.

    Args:
        student: map [B, C, H, W].
        teacher: map [B, C', H, W]; channels may differ.
        temperature: $\tau$ > 0 of the distributions over the other image's pixels.
        pool: side of the squares of positions that are averaged first.

    Returns:
        A scalar in nats, the mean over pairs of images and over pixels. Memory grows with (B·H·W)² / pool⁴.

    Raises:
        ConfigError: maps of different sizes or not [B, C, H, W]; a temperature or side that is not positive.

    Source: Yang et al., CVPR 2022, equations 4 and 5.
    """
    check_maps(student, teacher)
    if not temperature > 0 or pool < 1:
        raise ConfigError(f"temperature and pool must be positive; got {temperature} and {pool}")

    def units(x: Tensor) -> Tensor:
        x = promote(x)
        x = x if pool == 1 else F.avg_pool2d(x, pool, pool, ceil_mode=True)
        return F.normalize(x, dim=1).flatten(2).transpose(1, 2)

    with exact(student):
        s, t = units(student), units(teacher)
        count = s.shape[1]
        losses = []
        for own_s, own_t in zip(s, t, strict=True):
            rows = [
                (own @ others.flatten(0, 1).T / temperature).unflatten(1, (-1, count)).log_softmax(2)
                for own, others in ((own_t, t), (own_s, s))
            ]
            losses.append(divergence(*rows).sum(2).mean())
        return torch.stack(losses).mean()


class CIRKDConfig(FeatureConfig):
    """Hyperparameters of CIRKD's pixel-to-pixel term; the defaults are the authors'."""

    own_name = "cirkd"

    weight: float = Field(default=1.0, ge=0)
    """Weight of the loss."""
    temperature: float = Field(default=0.1, gt=0)
    """Temperature of the distributions over the other image's pixels."""
    pool: int = Field(default=1, ge=1)
    """Side of the squares of positions that are averaged first; the authors' code takes 4 for maps
    of 256 x 256 positions or more. Memory falls with its fourth power."""


class CIRKD(MapMethod):
    """Matches the similarities of pixels across the images of a batch, before the head's last layer."""

    Config = CIRKDConfig
    config: CIRKDConfig
    name = "cirkd"
    card = Card(
        "Yang, Zhou, An, Jiang, Xu, Zhang: Cross-Image Relational Knowledge Distillation for Semantic "
        "Segmentation, CVPR 2022",
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher, batch.image)
        c = self.config

        def loss(s: Tensor, t: Tensor) -> Tensor:
            return cirkd_loss(s, t, temperature=c.temperature, pool=c.pool)

        return {"cirkd": self.weight * sum_pairs(loss, features, targets)}
