r"""Distillation by Pearson correlation (Cao, Zhang, Gao, Cheng, Cheng, Li: NeurIPS 2022, arXiv 2207.02039).

Each channel of a level is standardized over batch and positions in student and teacher, so that the loss does
not depend on the sizes of their activations: detectors of different kinds may teach each other.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mdistiller.methods.base import Card, Losses, promote
from mdistiller.methods.features import FeatureConfig, Weight, check_shapes
from mdistiller.tasks.detection.adapter import Kind
from mdistiller.tasks.detection.levels import LevelMethod, without_pooled
from mdistiller.types import Batch, Outputs


def pkd_loss(
    student_features: Float[Tensor, "b c h w"], teacher_features: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    r"""Computes one minus the correlation of two maps, the mean over channels: $1 - \frac{1}{C}\sum_c r_c$.

    $r_c$ is Pearson's correlation of channel c over batch and positions, so the loss is half the mean squared
    error of the standardized maps. A constant channel counts as uncorrelated, with the loss 1/2.

    Args:
        student_features: a level, [B, C, h, w].
        teacher_features: of the same shape.

    Returns:
        A scalar in [0, 2].

    Raises:
        ConfigError: maps of different shapes or not [B, C, H, W].

    Source: Cao et al., NeurIPS 2022, equations 2 to 5.
    """
    check_shapes(student_features, teacher_features, "B, C, H, W")
    return (_standardize(student_features) - _standardize(teacher_features)).square().mean() / 2


def _standardize(feature: Tensor) -> Tensor:
    feature = promote(feature)
    variance, mean = torch.var_mean(feature, dim=(0, 2, 3), keepdim=True, correction=0)
    return (feature - mean) / (variance + 1e-12).sqrt()


class PKDConfig(FeatureConfig):
    """Hyperparameters of PKD."""

    own_name = "pkd"

    weight: Weight = 1.0
    """Weight of the mean over the levels, which lies between 0 and 2 whatever their number and sizes. mmrazor
    has 6 (Faster R-CNN) or 10 (RetinaNet) for each of four levels, which is 24 or 40 here. On a small set the
    student with 24 was 3 AP worse than the student alone, so the default is not theirs."""


class PKD(LevelMethod):
    """Matches the levels up to the scale and offset of each channel."""

    Config = PKDConfig
    config: PKDConfig
    name = "pkd"
    card = Card(
        "Cao, Zhang, Gao, Cheng, Cheng, Li: PKD: General Distillation Framework for Object Detectors via "
        "Pearson Correlation Coefficient, NeurIPS 2022",
    )

    @classmethod
    def choose(cls, pairs: list[tuple[str, str]], kind: Kind) -> list[tuple[str, str]]:
        return without_pooled(pairs, kind)[:4]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        losses = torch.stack([pkd_loss(s, t) for s, t in self.adapted(student, teacher)])
        return {"pkd": self.weight * losses.mean()}
