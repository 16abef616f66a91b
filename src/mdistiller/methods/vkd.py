r"""VkD: distillation by orthogonal projections (Miles, Elezi, Deng: CVPR 2024, arXiv 2403.06213).

A projection that is learned freely can take over a part of the student's task. One with orthonormal columns
preserves the similarities between samples, so the student's embedding itself has to learn them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from mdistiller.methods.base import Card, Example, Losses, Scalar, promote
from mdistiller.methods.features import FeatureConfig, FeatureMethod, Vectors, Weight, check_shapes
from mdistiller.methods.registry import register_method
from mdistiller.types import Batch, DataInfo, Outputs


def vkd_loss(student_embedding: Vectors, teacher_embedding: Vectors) -> Scalar:
    r"""Computes the smooth absolute difference from the teacher's standardized embedding.

    $$\frac{1}{BD} \sum_{b,d} \ell\big( h^S_{bd} - \hat h^T_{bd} \big), \quad
    \hat h_{bd} = \frac{h_{bd} - \mu_b}{\sqrt{\sigma_b^2 + 10^{-5}}}, \quad
    \ell(x) = \begin{cases} x^2 / 2 & |x| < 1 \\ |x| - 1/2 & \text{else} \end{cases}$$

    with mean and variance of each sample over the dimensions.

    Args:
        student_embedding: [B, D], projected to the teacher's width.
        teacher_embedding: [B, D], detached.

    Raises:
        ConfigError: not two embeddings of one shape [B, D].

    Source: Miles et al., CVPR 2024, the loss with standardized targets; equals the authors' code.
    """
    check_shapes(student_embedding, teacher_embedding, "B, D")
    student, teacher = promote(student_embedding), promote(teacher_embedding)
    return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:]))


class VkDConfig(FeatureConfig):
    """Hyperparameters of VkD; the defaults are the authors' for DeiT on ImageNet."""

    weight: Weight = 1.0
    """Weight of the loss."""


@register_method("vkd")
class VkD(FeatureMethod[VkDConfig]):
    """Matches an orthogonal projection of the student's embedding with the teacher's standardized one."""

    Config = VkDConfig
    sequences = True
    card = Card(
        "Miles, Elezi, Deng: VkD: Improving Knowledge Distillation using Orthogonal Projections, CVPR 2024",
        "Like SRD, with an orthogonal projection that keeps similarities; small transformers",
        example=Example(("pooled",), ("pooled",), 65_536),
    )
    taps_by_default = "embedding"

    def __init__(self, config: VkDConfig, student: nn.Module, teacher: nn.Module, data: DataInfo) -> None:
        super().__init__(config, student, teacher, data)
        shapes = zip(self.student_shapes, self.teacher_shapes, strict=True)
        self.projectors = nn.ModuleList(orthogonal(nn.Linear(s[1], t[1], bias=False)) for s, t in shapes)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: Tensor) -> Losses:
        pairs = zip(self.projectors, *self.embeddings(student, teacher), strict=True)
        losses = [vkd_loss(promote(project(s)), t) for project, s, t in pairs]
        return {"vkd": self.weight * torch.stack(losses).sum()}
