r"""Fine-grained feature imitation (Wang, Yuan, Zhang, Feng: CVPR 2019, arXiv 1906.03609).

The student imitates the teacher's feature map near objects only, at positions with an anchor whose overlap
with an object is more than $\psi$ times the best overlap that any anchor has with that object:
$L = \frac{1}{2N} \sum_{i} I_i \sum_c \big(a(F^S)_{ic} - F^T_{ic}\big)^2$, $N = \sum_i I_i$.
"""

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mdistiller.errors import ConfigError
from mdistiller.methods.base import Card, Losses
from mdistiller.methods.features import FeatureConfig, Weight, float_pairs
from mdistiller.tasks.detection.levels import OVERLAP, LevelMethod
from mdistiller.types import Batch, Outputs


def fgfi_loss(
    student_features: list[Float[Tensor, "b _ _ _"]],
    teacher_features: list[Float[Tensor, "b _ _ _"]],
    masks: list[Bool[Tensor, "b 1 _ _"]],
) -> Float[Tensor, ""]:
    r"""Computes the squared error near objects over all levels: $\frac{1}{2N} \sum_i I_i \|s_i - t_i\|^2$.

    Args:
        student_features: levels [B, C, H, W], each of the shape of the teacher's.
        teacher_features: as many levels.
        masks: $I$, as many masks [B, 1, H, W] of the positions that count; $N = \sum_i I_i$.

    Returns:
        A scalar: the sum over channels, half the mean over the positions that count; 0 without any.

    Raises:
        ConfigError: lists of different or no length, or shapes that differ.

    Source: Wang et al., CVPR 2019, equation 3.
    """
    pairs = float_pairs(student_features, teacher_features)
    total, count = torch.zeros(2, device=masks[0].device)
    for (student, teacher), mask in zip(pairs, masks, strict=True):
        if student.shape != teacher.shape or mask.shape[2:] != student.shape[2:]:
            raise ConfigError(
                f"each pair of features must have one shape [B, C, H, W], and their mask [B, 1, H, W]; "
                f"got {list(student.shape)}, {list(teacher.shape)} and {list(mask.shape)}"
            )
        total = total + ((student - teacher).square() * mask).sum()
        count = count + mask.sum()
    return total / (2 * count.clamp(min=1))


class FGFIConfig(FeatureConfig):
    """Hyperparameters of FGFI."""

    own_name = "fgfi"

    weight: Weight = 0.01
    """Weight of the imitation loss; the default is from the authors' code."""
    threshold: float = Field(default=0.5, ge=0, lt=1)
    """ψ, the fraction of an object's best overlap above which an anchor is near the object."""
    relu: bool = False
    """Put a ReLU behind the convolution, as in the authors' code, whose maps are not negative."""


class FGFI(LevelMethod):
    """Imitates the teacher's pyramid at the anchors near objects, through one 3x3 convolution per level."""

    Config = FGFIConfig
    config: FGFIConfig
    name = "fgfi"
    derived = OVERLAP
    card = Card(
        "Wang, Yuan, Zhang, Feng: Distilling Object Detectors with Fine-grained Feature Imitation, CVPR 2019"
    )

    def adapter(self, student: int, teacher: int) -> nn.Module:
        return nn.Conv2d(student, teacher, 3, padding=1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        adapted, targets = map(list, zip(*self.adapted(student, teacher), strict=True))
        adapted = [x.relu() for x in adapted] if self.config.relu else adapted
        near = [student.features[name + OVERLAP] > self.config.threshold for name in self.levels]
        return {"fgfi": self.weight * fgfi_loss(adapted, targets, near)}
