"""Similarity-preserving distillation (Tung, Mori: ICCV 2019, arXiv 1907.09682)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Example, Losses, Scalar, exact, promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Weight, sum_pairs
from mdistiller.methods.gather import gather
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, Outputs


def sp_loss(student_feature: Float[Tensor, "b ..."], teacher_feature: Float[Tensor, "b ..."]) -> Scalar:
    r"""Computes the squared distance of the row-normalized similarity matrices of a batch.

    $$\frac{1}{B^2} \| \hat G^T - \hat G^S \|_F^2, \quad G = F F^\top, \quad
    \hat G_{i,:} = G_{i,:} / \| G_{i,:} \|_2$$

    $F$ [B, D] are the features, flattened; their shapes may differ.

    Raises:
        ConfigError: features of different batch sizes or with fewer than two dimensions.

    Source: Tung and Mori, ICCV 2019, equations 1 to 4.
    """
    if min(student_feature.ndim, teacher_feature.ndim) < 2 or len(student_feature) != len(teacher_feature):
        raise ConfigError(
            f"features must be [B, …] with one B; got student {list(student_feature.shape)}, "
            f"teacher {list(teacher_feature.shape)}"
        )

    def similarity(feature: Tensor) -> Tensor:
        x = promote(feature).flatten(1)
        return F.normalize(x @ x.mT)

    with exact(student_feature):
        return (similarity(teacher_feature) - similarity(student_feature)).square().mean()


class SPConfig(FeatureConfig):
    """Hyperparameters of SP; the defaults are the usual ones for CIFAR-100."""

    weight: Weight = 3000.0
    """Weight of the similarity loss."""


@register_method("sp")
class SP(FeatureMethod[SPConfig]):
    """Matches the similarities among the images of a batch."""

    Config = SPConfig
    sequences = True
    card = Card(
        "Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019",
        "Similarities between images of a batch, without extra layers; widths may differ",
        example=Example(("stage3",), ("stage3",)),
    )
    taps_by_default = "last stage"

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        features = (map(gather, found) for found in self.read(student, teacher, batch.image))
        return {"sp": self.weight * sum_pairs(sp_loss, *features)}
