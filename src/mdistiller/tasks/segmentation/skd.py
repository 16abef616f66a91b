r"""Structured knowledge, its pair-wise term (Liu, Chen, Liu, Qin, Luo, Wang: CVPR 2019, arXiv 1903.04197).

With $a_{ij}$ the cosine similarity of the features of two nodes of the image, each a square of positions,
$L = \frac{1}{N^2} \sum_{i,j} (a^S_{ij} - a^T_{ij})^2$.
"""

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Losses, Scalar, promote
from mdistiller.methods.features import FeatureConfig, sum_pairs
from mdistiller.tasks.segmentation.pixels import MapMethod, check_maps
from mdistiller.types import Batch, Outputs

_EPS = 1e-8


def skd_loss(
    student: Float[Tensor, "b _ h w"], teacher: Float[Tensor, "b _ h w"], *, scale: float = 0.5
) -> Scalar:
    r"""Computes the mean squared difference of the similarities of nodes, the pair-wise term.

    Args:
        student: map [B, C, H, W].
        teacher: map [B, C', H, W]; channels may differ.
        scale: side of a node as a fraction of the map's; a node has the largest value of each channel.

    Returns:
        A scalar, the mean over images and pairs of nodes.

    Raises:
        ConfigError: maps of different sizes or not [B, C, H, W]; a scale out of (0, 1].

    Source: Liu et al., CVPR 2019, equation 2; max pooling, and lengths without a gradient, as in the authors'
    code.
    """
    check_maps(student, teacher)
    if not 0 < scale <= 1:
        raise ConfigError(f"scale: got {scale}; allowed: above 0, at most 1")
    window = tuple(max(1, int(side * scale)) for side in teacher.shape[2:])

    def similarities(x: Tensor) -> Tensor:
        nodes = F.max_pool2d(promote(x), window, window, ceil_mode=True)
        length = nodes.square().sum(1, keepdim=True).sqrt().detach() + _EPS
        rows = (nodes / length).flatten(2)
        return rows.transpose(1, 2) @ rows

    return (similarities(student) - similarities(teacher)).square().mean()


class SKDConfig(FeatureConfig):
    """Hyperparameters of SKD."""

    own_name = "skd"

    weight: float = Field(default=10.0, ge=0)
    """Weight of the pair-wise loss; 10 in the comparison of the authors of CIRKD, 1 in the code of SKD."""
    scale: float = Field(default=0.5, gt=0, le=1)
    """Side of a node as a fraction of the map's side."""


class SKD(MapMethod):
    """Matches the similarities of an image's regions, in the map that the head's last layer classifies."""

    Config = SKDConfig
    config: SKDConfig
    name = "skd"
    card = Card(
        "Liu, Chen, Liu, Qin, Luo, Wang: Structured Knowledge Distillation for Semantic Segmentation, "
        "CVPR 2019",
    )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features, targets = self.read(student, teacher, batch.image)
        scale = self.config.scale
        return {"skd": self.weight * sum_pairs(lambda s, t: skd_loss(s, t, scale=scale), features, targets)}
